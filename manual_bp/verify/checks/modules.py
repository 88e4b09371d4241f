"""What a module has to do besides."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.verify._bench import Bench, leaves, outputs_of
from manual_bp.verify._case import Sample
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify.checks._shared import cast


def state_dict(bench: Bench) -> None:
    """A second module given the first one's state_dict computes the same."""
    module, inputs = _module(bench)
    torch.manual_seed(bench.case.seed + 1)
    other = _factory(bench)().to(bench.case.device).double()
    other.load_state_dict(module.state_dict())
    bench.same_outputs(other(*inputs), module(*inputs), " after load_state_dict")
    if bench.case.reference_factory is not None:
        theirs = bench.case.reference_factory()
        bench.comparisons += 1
        if set(theirs.state_dict()) != set(module.state_dict()):
            raise Mismatch(
                f"keys of state_dict: expected {sorted(theirs.state_dict())}, as the reference, "
                f"got {sorted(module.state_dict())}"
            )


def pickled(bench: Bench) -> None:
    """A pickled module computes the same."""
    module, inputs = _module(bench)
    if "<locals>" in type(module).__qualname__:
        raise NotApplicable("the class is local to a function, which pickle never takes")
    copied = pickle.loads(pickle.dumps(module))
    bench.same_outputs(copied(*inputs), module(*inputs), " after pickling")


def deepcopied(bench: Bench) -> None:
    """A deepcopy computes the same, and gives its own parameters the gradients."""
    module, inputs = _module(bench)
    copied = copy.deepcopy(module)
    bench.same_outputs(copied(*inputs), module(*inputs), " after deepcopy")
    theirs = {name: p.shape for name, p in module.named_parameters()}
    ours = {name: p.shape for name, p in copied.named_parameters()}
    bench.comparisons += 1
    if ours != theirs:
        raise Mismatch(f"parameters of the deepcopy: expected {theirs}, got {ours}")
    before = [t.detach().clone() for t in outputs_of(module(*inputs))]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    for was, now, there in zip(
        before, outputs_of(module(*inputs)), outputs_of(copied(*inputs)), strict=True
    ):
        bench.same("output of the original after its copy was changed", now.detach(), was)
        if theirs and torch.equal(there, was):
            raise Mismatch(
                "output of the copy: expected it to follow the copy's parameters, got the "
                "original's output\ndiagnosis: the copy still computes with the original"
            )


def to_dtype(bench: Bench) -> None:
    """After .to(dtype) parameters and outputs have it, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        module, inputs = _module(bench)
        module.to(dtype)
        result = module(*cast(inputs, dtype))
        for name, tensor in (*module.named_parameters(), *_numbered(outputs_of(result))):
            bench.comparisons += 1
            if tensor.dtype is not dtype:
                raise Mismatch(f"{name} after .to({dtype}): got {tensor.dtype}")


def factory_kwargs(bench: Bench) -> None:
    """The factory takes device and dtype, and its parameters heed them."""
    made: Any = _factory(bench)
    module = made(device="meta", dtype=torch.float16)
    for name, parameter in module.named_parameters():
        bench.comparisons += 1
        if parameter.dtype is not torch.float16 or parameter.device.type != "meta":
            raise Mismatch(
                f"{name}, made with device='meta', dtype=torch.float16: got {parameter.dtype} "
                f"on {parameter.device}"
            )


def frozen_parameters(bench: Bench) -> None:
    """A frozen parameter stays frozen and gets no gradient; the others get theirs."""
    module, inputs = _module(bench)
    if not any(p.requires_grad for p in module.parameters()):
        raise NotApplicable("the module has no parameters")
    upstream = bench.upstream(module, inputs)
    torch.autograd.backward(outputs_of(module(*inputs)), upstream)
    expected = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for frozen in expected:
        for name, parameter in learning.items():
            parameter.grad = None
            parameter.requires_grad_(name != frozen)
        result = outputs_of(module(*leaves(inputs)))
        learned = [(t, u) for t, u in zip(result, upstream, strict=True) if t.requires_grad]
        for output, above in learned:
            output.backward(above, retain_graph=True)
        for name, parameter in learning.items():
            if name != frozen:
                bench.same(
                    f"gradient of {name} with {frozen} frozen", parameter.grad, expected[name]
                )
                continue
            bench.comparisons += 1
            if parameter.requires_grad or parameter.grad is not None:
                raise Mismatch(f"{name}: expected it to stay frozen, without a gradient")


def train_eval(bench: Bench) -> None:
    """In training and in evaluation mode as the reference."""
    if bench.case.reference_factory is None:
        raise NotApplicable("no reference was given")
    module, inputs = _module(bench)
    trusted = bench.case.reference_factory().to(bench.case.device).double()
    trusted.load_state_dict(module.state_dict(), strict=False)
    for mode in (True, False):
        module.train(mode)
        trusted.train(mode)
        torch.manual_seed(bench.case.seed)
        ours = module(*inputs)
        torch.manual_seed(bench.case.seed)
        bench.same_outputs(ours, trusted(*inputs), f" in mode train({mode})")


def _factory(bench: Bench) -> Callable[[], nn.Module]:
    if bench.case.factory is None:
        raise NotApplicable("the case is a function")
    return bench.case.factory


def _module(bench: Bench) -> tuple[nn.Module, Sample]:
    torch.manual_seed(bench.case.seed)
    module = _factory(bench)().to(bench.case.device).double()
    sample = bench.most_telling()
    count = len(sample) - sum(1 for _ in module.named_parameters())
    return module, sample[:count]


def _numbered(results: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"output {i}", t) for i, t in enumerate(results)]
