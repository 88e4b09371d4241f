"""The mode, the buffers and the parameters of a module, from one call to the next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.verify._autograd import Gradients, gradients_of, leaves
from manual_bp.verify._calling import gradients_by_backward
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._global_state import seed_pytorch
from manual_bp.verify.checks._modules import in_dtype_of, new_module
from manual_bp.verify.checks._shared import diagnosed


@check(for_modules=True, best_sample=True, builds_on=SLOPE)
def train_eval(ctx: CheckContext, sample: Sample) -> None:
    """In training and in evaluation mode output, gradients and buffers match the reference."""
    if ctx.case.reference_factory is None:
        raise NotApplicable("no reference was given")
    for mode in (True, False):
        module, _ = new_module(ctx, sample)
        reference = in_dtype_of(sample, ctx.case.reference_factory().to(ctx.case.device))
        reference.load_state_dict(module.state_dict(), strict=False)
        upstream = _upstream(ctx, sample, mode)
        module.train(mode)
        reference.train(mode)
        # Each call sees what the one before it left in the buffers.
        for number in ("first", "second"):
            where = f" in mode train({mode}), {number} call"
            # The reference has the value only, if the gradient is not its derivative on purpose.
            with torch.set_grad_enabled(ctx.case.gradient_of is None):
                _compare_modules(ctx, module, reference, sample, upstream, where)
        with torch.no_grad():
            where = f" in mode train({mode}), without gradients"
            _compare_modules(ctx, module, reference, sample, upstream, where)


@check(for_modules=True, best_sample=True, builds_on=("deterministic", "train_eval"))
def mode_switch(ctx: CheckContext, sample: Sample) -> None:
    """Switching to evaluation or training mode after forward does not change the backward."""
    for mode in (True, False):
        module, _ = new_module(ctx, sample)
        upstream = _upstream(ctx, sample, mode)
        expected, _ = _backward(ctx, module.train(mode), sample, upstream)
        again, _ = new_module(ctx, sample)
        found, _ = _backward(ctx, again.train(mode), sample, upstream, switch=True)
        where = f" after a forward in mode train({mode}), once the mode was switched"
        diagnosis = "self.training is read in backward: keep on ctx what forward saw"
        ctx.compare_gradients(sample, found, expected, where, diagnosis=diagnosis)


@check(
    for_modules=True, best_sample=True, builds_on=("deterministic", "train_eval", "stale_caches")
)
def optimizer_step(ctx: CheckContext, sample: Sample) -> None:
    """After a step of an optimizer a module computes with its new parameters, in both modes."""
    for mode in (True, False):
        module, _ = new_module(ctx, sample)
        if not any(p.requires_grad for p in module.parameters()):
            raise NotApplicable("the module has no parameters")
        upstream = _upstream(ctx, sample, mode)
        _backward(ctx, module.train(mode), sample, upstream)
        _backward(ctx, module.train(), sample, upstream)
        for parameter in module.parameters():
            parameter.grad = ctx.random_like(parameter) if parameter.requires_grad else None
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        fresh, _ = new_module(ctx, sample)
        fresh.load_state_dict(module.state_dict())
        where = f" in mode train({mode}) after a step of an optimizer"
        module.train(mode)
        fresh.train(mode)
        with diagnosed("what an earlier call left is used, and is not in the state_dict"):
            _compare_modules(ctx, module, fresh, sample, upstream, where)


@check(for_modules=True, best_sample=True, builds_on=("writes_nothing",))
def module_left_alone(ctx: CheckContext, sample: Sample) -> None:
    """A call changes no parameter, no .grad, no requires_grad and no mode of a module."""
    for mode in (True, False):
        module, _ = new_module(ctx, sample)
        upstream = _upstream(ctx, sample, mode)
        changes = _changes(ctx, module.train(mode), sample, upstream)
        ctx.comparisons += 1
        if changes and ctx.case.reference_factory is not None:
            reference = in_dtype_of(sample, ctx.case.reference_factory().to(ctx.case.device))
            excused = _changes(ctx, reference.train(mode), sample, upstream)
            changes = [change for change in changes if change not in excused]
        if changes:
            raise Mismatch(f"{changes[0]} in mode train({mode}): expected no change by a call")


def _changes(
    ctx: CheckContext, module: nn.Module, sample: Sample, upstream: Sequence[Tensor]
) -> list[str]:
    """What a call changes of a module, apart from buffers."""
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = ctx.random_like(parameter) if parameter.requires_grad else None
    modes = {name: part.training for name, part in module.named_modules()}
    needs = {name: p.requires_grad for name, p in parameters.items()}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    added = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    _backward(ctx, module, sample, upstream)
    changes = [
        f"the mode of {name or 'the module'}"
        for name, part in module.named_modules()
        if part.training != modes[name]
    ]
    for name, p in parameters.items():
        if p.requires_grad != needs[name]:
            changes.append(f"requires_grad of {name}")
        if not torch.equal(p.nan_to_num(), values[name].nan_to_num()):
            changes.append(name)
        if name in added and (p.grad is None or not torch.equal(p.grad, added[name])):
            changes.append(f"the .grad of {name}")
    return changes


def _compare_modules(
    ctx: CheckContext,
    module: nn.Module,
    other: nn.Module,
    sample: Sample,
    upstream: Sequence[Tensor],
    where: str,
) -> None:
    """Compare outputs, gradients and buffers with those of another module, after one call."""
    found, result = _backward(ctx, module, sample, upstream)
    expected, right = _backward(ctx, other, sample, upstream)
    ctx.compare_outputs(result, right, where)
    ctx.compare_gradients(sample, found, expected, where)
    buffers = dict(module.named_buffers())
    for name, buffer in other.named_buffers():
        if name in buffers:
            ctx.compare_outputs(buffers[name], buffer, f", the buffer {name},{where}")


def _backward(
    ctx: CheckContext,
    module: nn.Module,
    sample: Sample,
    upstream: Sequence[Tensor],
    *,
    switch: bool = False,
) -> tuple[Gradients, Any]:
    """The gradients of inputs and parameters by position in the sample, and the result.

    Without grad mode there are no gradients.
    """
    parameters = list(module.parameters())
    inputs = leaves(sample[: len(sample) - len(parameters)])
    seed_pytorch(ctx.case.seed)
    result = module(*ctx.case.nested_inputs(inputs))
    if not torch.is_grad_enabled():
        return {}, result
    if switch:
        module.train(not module.training)
    find = gradients_by_backward if ctx.case.by_backward else gradients_of
    return find(result, (*inputs, *parameters), upstream), result


def _upstream(ctx: CheckContext, sample: Sample, mode: bool) -> list[Tensor]:
    """Upstream gradients for a module, from a call of another one like it."""
    module, inputs = new_module(ctx, sample)
    return ctx.upstream(module.train(mode), inputs)
