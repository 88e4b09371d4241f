"""Outputs and gradients that share memory with something else, and outputs marked wrongly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manual_bp._torch import version_of
from manual_bp.verify._autograd import (
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
    tensors_of,
)
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import STATE, CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify.checks._shared import diagnosed

_UNSEEN = (
    "both share memory and autograd does not know it: one is the .data of the other, or a buffer"
)
_SHARED = "the gradient shares memory with it, so that adding to .grad corrupts it: return a copy"


@check(builds_on=("writes_nothing", "deterministic"))
def differentiable_outputs(ctx: CheckContext, sample: Sample) -> None:
    """An output requires a gradient only if the reference's does."""
    ours = tensors_of(ctx.call(*leaves(sample)))
    theirs = tensors_of(ctx.reference(*leaves(sample)))
    for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        ctx.comparisons += 1
        if one.requires_grad and not other.requires_grad:
            raise Mismatch(
                f"output {i}: expected requires_grad=False, as the reference's, got True\n"
                f"diagnosis: not marked: ctx.mark_non_differentiable is missing, so a gradient of "
                f"zeros hides that there is none"
            )


@check(builds_on=("writes_nothing", "deterministic", *STATE))
def output_in_place(ctx: CheckContext, sample: Sample) -> None:
    """Changing an output in place raises or is part of the graph; nothing else changes unseen."""
    _judge(ctx, sample, _change_outputs)


@check(builds_on=("writes_nothing", "deterministic", *STATE))
def gradient_in_place(ctx: CheckContext, sample: Sample) -> None:
    """Changing a gradient in place changes no argument, other gradient or later backward."""
    _judge(ctx, sample, _change_gradients)


def _judge(
    ctx: CheckContext, sample: Sample, judge: Callable[[CheckContext, Call, Sample], None]
) -> None:
    """Judge the call, unless the reference makes the same mistake (as some views of PyTorch do)."""
    try:
        judge(ctx, ctx.call, sample)
    except Mismatch:
        if ctx.case.reference is not None:
            try:
                judge(ctx, ctx.case.reference, sample)
            except Exception:
                return
        raise


def _change_outputs(ctx: CheckContext, call: Call, sample: Sample) -> None:
    upstream = ctx.upstream(call, sample)
    first = call(*leaves(sample))
    before = tuple(t.detach().clone() for t in tensors_of(first))
    for k, output in enumerate(outputs_of(first)):
        if not output.requires_grad:
            continue
        doubled = [2 * u if i == k else u for i, u in enumerate(upstream)]
        _, expected = gradients(call, leaves(sample), doubled)
        arguments = leaves(sample)
        result = call(*arguments)
        outputs = outputs_of(result)
        name = "the output" if len(outputs) == 1 else f"output {k}"
        others = _named(ctx, arguments)
        others |= {f"output {i}": t for i, t in enumerate(outputs) if i != k}
        seen = {other: t.detach().clone() for other, t in others.items()}
        versions = {other: version_of(t) for other, t in others.items()}
        ctx.comparisons += 1
        try:
            outputs[k].mul_(2)
        except RuntimeError:
            continue  # a view, or expanded: PyTorch refuses
        touched = _changed(others, seen)
        for other in touched:
            if version_of(others[other]) == versions[other]:
                raise _mismatch(other, f"{name} was changed in place", _UNSEEN)
        if touched:
            continue  # tensors that share memory, as autograd knows
        try:
            found = gradients_of(result, arguments, upstream)
        except RuntimeError:
            found = None  # saved, and the change was noticed
        if found is not None:
            diagnosis = "backward uses the output, and the change in place went unnoticed"
            where = f" after {name} was doubled in place"
            ctx.compare_gradients(sample, found, expected, where, diagnosis=diagnosis)
        with diagnosed("the output is a buffer that is kept and returned again"):
            where = f" of a call after {name} of another was doubled in place"
            ctx.compare_outputs(call(*leaves(sample)), before, where)


def _change_gradients(ctx: CheckContext, call: Call, sample: Sample) -> None:
    usual = ctx.upstream(call, sample)
    # Ones are what .backward() gives a cost, and a shortcut for them may skip the product.
    for upstream in (usual, [torch.ones_like(u) for u in usual]):
        _change_gradients_of(ctx, call, sample, upstream)


def _change_gradients_of(
    ctx: CheckContext, call: Call, sample: Sample, upstream: Sequence[Tensor]
) -> None:
    arguments = leaves(sample)
    result = call(*arguments)
    outputs = [t for t in outputs_of(result) if t.requires_grad]
    given = [u for t, u in zip(outputs_of(result), upstream, strict=True) if t.requires_grad]
    if not outputs:
        return
    # The product keeps the upstream gradient out of it, whose memory a view of PyTorch may return.
    torch.autograd.backward([t * 1 for t in outputs], given, retain_graph=True)
    added = {i: g for i in positions(sample) if (g := arguments[i].grad) is not None}
    kept = {i: g.clone() for i, g in added.items()}
    for i, gradient in added.items():
        others = {f"gradient of {ctx.label(j)}": g for j, g in added.items() if j != i}
        others |= _named(ctx, arguments)
        others |= {f"output {j}": t for j, t in enumerate(outputs)}
        seen = {name: t.detach().clone() for name, t in others.items()}
        ctx.comparisons += 1
        try:
            gradient.mul_(2).add_(1)
        except RuntimeError:
            continue  # PyTorch refuses: all its elements are one, or an implicit zero
        for name in _changed(others, seen):
            raise _mismatch(name, f"the gradient of {ctx.label(i)} was changed in place", _SHARED)
    try:
        found = gradients_of(result, arguments, upstream)
    except RuntimeError:
        return  # a saved tensor was returned, and the change was noticed
    diagnosis = "a gradient is returned that shares memory with what backward keeps"
    where = " of a backward after the gradients of another were changed in place"
    ctx.compare_gradients(sample, found, kept, where, diagnosis=diagnosis)


def _named(ctx: CheckContext, arguments: Sample) -> dict[str, Tensor]:
    return {ctx.label(i): arguments[i] for i in positions(arguments)}


def _changed(now: dict[str, Tensor], before: dict[str, Tensor]) -> list[str]:
    """The names of the tensors whose values changed."""
    return [
        name
        for name, was in before.items()
        if not torch.equal(now[name].detach().nan_to_num(), was.nan_to_num())
    ]


def _mismatch(name: str, when: str, diagnosis: str) -> Mismatch:
    return Mismatch(f"{name}: expected no change when {when}, got one\ndiagnosis: {diagnosis}")
