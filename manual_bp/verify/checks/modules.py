"""What modules must do in addition."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp._torch import map_tensors
from manual_bp.verify._autograd import outputs_of
from manual_bp.verify._case import Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._precision import narrowest
from manual_bp.verify.checks._modules import factory_of, new_module, output_of


@check(for_modules=True, best_sample=True)
def state_dict(ctx: CheckContext, sample: Sample) -> None:
    """A second module that loads the state_dict computes the same."""
    module, inputs = new_module(ctx, sample)
    other, _ = new_module(ctx, sample, seed=ctx.case.seed + 1)
    other.load_state_dict(module.state_dict())
    ctx.compare_outputs(
        output_of(ctx, other, inputs), output_of(ctx, module, inputs), " after load_state_dict"
    )
    if ctx.case.reference_factory is not None:
        expected = sorted(ctx.case.reference_factory().state_dict())
        ctx.comparisons += 1
        if sorted(module.state_dict()) != expected:
            raise Mismatch(
                f"keys of state_dict: expected {expected}, as the reference, "
                f"got {sorted(module.state_dict())}"
            )


@check(for_modules=True, best_sample=True)
def pickle_(ctx: CheckContext, sample: Sample) -> None:
    """A pickled module computes the same."""
    module, inputs = new_module(ctx, sample)
    if "<locals>" in type(module).__qualname__:
        raise NotApplicable("the class is local to a function, so it cannot be pickled")
    try:
        copied = pickle.loads(pickle.dumps(module))
    except Exception:
        if ctx.case.reference_factory is None or _can_be_pickled(ctx.case.reference_factory()):
            raise
        raise NotApplicable("the reference cannot be pickled either") from None
    ctx.compare_outputs(
        output_of(ctx, copied, inputs), output_of(ctx, module, inputs), " after pickling"
    )


@check(for_modules=True, best_sample=True, builds_on=("deterministic",))
def deepcopy(ctx: CheckContext, sample: Sample) -> None:
    """A deepcopy computes the same, with its own parameters."""
    module, inputs = new_module(ctx, sample)
    copied = copy.deepcopy(module)
    ctx.compare_outputs(
        output_of(ctx, copied, inputs), output_of(ctx, module, inputs), " after deepcopy"
    )
    expected = {name: p.shape for name, p in module.named_parameters()}
    found = {name: p.shape for name, p in copied.named_parameters()}
    ctx.comparisons += 1
    if found != expected:
        raise Mismatch(f"parameters of the deepcopy: expected {expected}, got {found}")
    before = [t.detach().clone() for t in outputs_of(output_of(ctx, module, inputs))]
    # Another one, changed alike: its output tells whether this sample shows the change at all.
    other, _ = new_module(ctx, sample)
    with torch.no_grad():
        for parameter in (*copied.parameters(), *other.parameters()):
            parameter.add_(1)
    after = (outputs_of(output_of(ctx, m, inputs)) for m in (module, copied, other))
    for was, now, of_copy, of_other in zip(before, *after, strict=True):
        ctx.compare("output of the original after its copy was changed", now.detach(), was)
        if torch.equal(of_copy, was) and not torch.equal(of_other, was):
            raise Mismatch(
                "output of the copy: expected it to follow the copy's parameters, got the "
                "original's output\ndiagnosis: the copy still computes with the original"
            )


@check(for_modules=True, best_sample=True)
def to_dtype(ctx: CheckContext, sample: Sample) -> None:
    """After .to(dtype), parameters and outputs have that dtype, in float32 and in bfloat16."""
    if narrowest(sample) is not None:
        raise NotApplicable("the case names its dtypes, and the module is made in them")
    for dtype in (torch.float32, torch.bfloat16):
        module, inputs = new_module(ctx, sample)
        low = _changed(inputs, partial(torch.Tensor.to, dtype=dtype))
        try:
            outputs = outputs_of(module.to(dtype)(*low))
        except Exception:
            if _reference_refuses(ctx, low, dtype):
                continue
            raise
        named = [(f"output {i}", t) for i, t in enumerate(outputs)]
        for name, tensor in (*module.named_parameters(), *named):
            ctx.comparisons += 1
            if tensor.dtype is not dtype:
                raise Mismatch(f"{name} after .to({dtype}): got {tensor.dtype}")


@check(capability=True, for_modules=True)
def factory_kwargs(ctx: CheckContext, sample: Sample) -> None:
    """The factory takes device and dtype, and its parameters have them."""
    if sample is not ctx.samples[0]:
        return  # the samples make no difference
    factory: Any = factory_of(ctx)
    for name, parameter in factory(device="meta", dtype=torch.float16).named_parameters():
        ctx.comparisons += 1
        if parameter.dtype is not torch.float16 or parameter.device.type != "meta":
            raise Mismatch(
                f"{name}, made with device='meta', dtype=torch.float16: got {parameter.dtype} "
                f"on {parameter.device}"
            )


@check(for_modules=True, best_sample=True, builds_on=("requires_grad_subsets",))
def frozen_parameters(ctx: CheckContext, sample: Sample) -> None:
    """A frozen parameter stays frozen and gets no gradient; the others get theirs."""
    module, inputs = new_module(ctx, sample)
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not learning:
        raise NotApplicable("the module has no parameters")
    upstream = ctx.upstream(module, inputs)
    for output, u in zip(outputs_of(output_of(ctx, module, inputs)), upstream, strict=True):
        if output.requires_grad:
            output.backward(u, retain_graph=True)
    expected = {name: p.grad for name, p in learning.items()}
    for frozen in learning:
        for name, parameter in learning.items():
            parameter.grad = None
            parameter.requires_grad_(name != frozen)
        variables = _changed(inputs, lambda t: t.clone().requires_grad_())
        outputs = outputs_of(output_of(ctx, module, variables))
        for output, u in zip(outputs, upstream, strict=True):
            if output.requires_grad:
                output.backward(u, retain_graph=True)
        for name, parameter in learning.items():
            if name != frozen:
                what = f"gradient of {name} with {frozen} frozen"
                ctx.compare(what, parameter.grad, expected[name])
                continue
            ctx.comparisons += 1
            if parameter.requires_grad or parameter.grad is not None:
                raise Mismatch(f"{name}: expected it to stay frozen, without a gradient")


def _reference_refuses(ctx: CheckContext, inputs: Sample, dtype: torch.dtype) -> bool:
    """Whether the reference cannot compute in this dtype either."""
    if ctx.case.reference_factory is None:
        return False
    try:
        ctx.case.reference_factory().to(ctx.case.device, dtype)(*inputs)
    except Exception:
        return True
    return False


def _can_be_pickled(module: nn.Module) -> bool:
    try:
        pickle.dumps(module)
    except Exception:
        return False
    return True


def _changed(inputs: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    """Nested inputs whose floating tensors are changed."""
    changed: Sample = map_tensors(lambda t: change(t) if t.is_floating_point() else t, inputs)
    return changed
