"""Several calls, several backwards, and one tensor as two arguments."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import SLOPE, CheckContext, check
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference, pairs_of_one_shape, tied


@check(builds_on=("writes_nothing", "deterministic", "interleaved_calls"))
def repeatable_backward(ctx: CheckContext, sample: Sample) -> None:
    """Two backwards through one graph give the same gradients, and `.grad` adds up."""
    arguments = leaves(sample)
    result = ctx.call(*arguments)
    upstream = [ctx.random_like(t) for t in outputs_of(result)]
    first = gradients_of(result, arguments, upstream, retain_graph=True)
    kept = {i: None if g is None else g.clone() for i, g in first.items()}
    second = gradients_of(result, arguments, upstream, retain_graph=True)
    ctx.compare_gradients(sample, second, kept, " of a second backward")
    gradients_of(result, arguments, [2 * u for u in upstream], retain_graph=True)
    where = " of the first backward, read after another one"
    diagnosis = "a buffer is returned, and overwritten by the next backward"
    ctx.compare_gradients(sample, first, kept, where, diagnosis=diagnosis)
    if not all(output.requires_grad for output in outputs_of(result)):
        return
    for _ in range(2):
        torch.autograd.backward(outputs_of(result), upstream, retain_graph=True)
    added = {i: arguments[i].grad for i in positions(sample)}
    twice: Gradients = {i: None if g is None else 2 * g for i, g in kept.items()}
    ctx.compare_gradients(sample, added, twice, " added up in .grad by two backwards")


@check(builds_on=("writes_nothing", "deterministic"))
def interleaved_calls(ctx: CheckContext, sample: Sample) -> None:
    """A call between another call's forward and backward changes nothing for either of them."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = gradients(ctx.call, leaves(sample), upstream)
    for other in _other_samples(ctx, sample):
        try:
            other_upstream = ctx.upstream(ctx.trusted, other)
            _, other_expected = gradients(ctx.call, leaves(other), other_upstream)
        except Exception:
            continue  # out of the domain
        arguments = leaves(sample)
        other_arguments = _with_parameters(ctx, leaves(other), arguments)
        result, other_result = ctx.call(*arguments), ctx.call(*other_arguments)
        # First in, first out: a stack would be right in the opposite order.
        found = gradients_of(result, arguments, upstream)
        other_found = gradients_of(other_result, other_arguments, other_upstream)
        diagnosis = "kept in one place for all calls, where the next call overwrites it"
        where = " with another call before its backward"
        ctx.compare_gradients(sample, found, expected, where, diagnosis=diagnosis)
        where = " with another call's backward before its own"
        ctx.compare_gradients(other, other_found, other_expected, where, diagnosis=diagnosis)


@check(builds_on=SLOPE)
def tied_inputs(ctx: CheckContext, sample: Sample) -> None:
    """One tensor given as two arguments gets the sum of both gradients."""
    pairs = pairs_of_one_shape(sample)
    if not pairs:
        raise NotApplicable("no two arguments have the same shape")
    for i, j in pairs:
        if ctx.case.project.get(i) is not ctx.case.project.get(j):
            continue  # one tensor may not be in both domains
        wanted = [place for place in positions(sample) if place != j]
        once = partial(tied, i=i, j=j)
        where = f" where {ctx.label(j)} is the same tensor as {ctx.label(i)}"
        compare_with_reference(ctx, sample, where, change=once, wanted=wanted)


def _other_samples(ctx: CheckContext, sample: Sample) -> list[Sample]:
    """Samples for a call in between: newly drawn ones, and changes of this one.

    The first has the shapes of this one, the second those of the next one.
    """
    drawn = ctx.draw(ctx.dtypes_of(sample))
    place = next(i for i, other in enumerate(ctx.samples) if other is sample)
    others = [drawn[i % len(drawn)] for i in {place % len(drawn), (place + 1) % len(drawn)}]
    others += [_changed(sample, how) for how in (_flipped, torch.neg, lambda t: t / 2)]
    return [ctx.in_domain(_with_parameters(ctx, other, sample)) for other in others]


def _with_parameters(ctx: CheckContext, other: Sample, sample: Sample) -> Sample:
    """Other inputs of a module with the parameters of a sample: two calls of it share them."""
    count = len(sample) - ctx.case.parameters
    return (*other[: len(other) - ctx.case.parameters], *sample[count:])


def _flipped(value: Tensor) -> Tensor:
    return value.flip(0) if value.ndim else value


def _changed(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return tuple(change(t) if is_differentiable(t) else t for t in sample)
