"""Forward-mode derivatives."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    leaves,
    outputs_of,
    positions,
    tangents_of,
    with_tangents,
)
from manual_bp.verify._budget import exact_budget, largest, rounding_budget
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import SLOPE, VALUE, check
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import narrowest
from manual_bp.verify.checks._digits import asking_no_more_than_half
from manual_bp.verify.checks._shared import (
    Change,
    Derivatives,
    against_reference,
    changed,
    refuse_operators,
)
from manual_bp.verify.checks._slopes import inner, slope, step_for

Tangents = dict[int, Tensor]


@check(capability=True, builds_on=(*VALUE, "full_precision"))
def forward_ad(ctx: CheckContext, sample: Sample) -> None:
    """Forward-mode derivatives match the reference or reverse mode, by all arguments and each."""
    refuse_operators(ctx, sample)
    places = positions(sample)
    for moved in [places, *([i] for i in places if len(places) > 1)]:
        tangents = {i: ctx.random_like(sample[i]) for i in moved}
        names = ", ".join(map(ctx.label, moved))

        def run(call: Call, change: Change, tangents: Tangents = tangents) -> Derivatives:
            return tangents_of(call, change(sample), changed(tangents, change))

        if ctx.case.reference is None:
            _compare_with_reverse_mode(ctx, sample, tangents, run(ctx.call, tuple), names)
            continue
        found, expected, budgets = against_reference(ctx, sample, run)
        for one, other, budget in zip(found, expected, budgets, strict=True):
            ctx.compare(f"tangent of the output along {names}", one, other, budget=budget)


@check(capability=True, builds_on=(*SLOPE, "double_backward", "forward_ad"))
def forward_over_reverse(ctx: CheckContext, sample: Sample) -> None:
    """The forward-mode derivative of the gradient matches the reference, or the slope."""
    refuse_operators(ctx, sample)
    upstream = ctx.upstream(ctx.call, sample)
    places = positions(sample)
    tangents = ctx.directions_in_domain(sample, {i: ctx.random_like(sample[i]) for i in places})

    def run(call: Call, change: Change) -> Derivatives:
        along = changed(tangents, change)
        found = _tangents_of_gradients(call, change(sample), along, change(upstream))
        return [found.get(i) for i in places]

    if ctx.case.reference is None:
        found = dict(zip(places, run(ctx.call, tuple), strict=True))
        _compare_with_slopes(ctx, sample, tangents, upstream, found)
        return
    ours, expected, budgets = against_reference(ctx, sample, run)
    ctx.compare_gradients(
        sample,
        dict(zip(places, ours, strict=True)),
        dict(zip(places, expected, strict=True)),
        ", its tangent",
        diagnosis="second-order term missing",
        budgets={i: b for i, b in zip(places, budgets, strict=True) if b is not None},
    )


def _compare_with_reverse_mode(
    ctx: CheckContext,
    sample: Sample,
    tangents: Tangents,
    found: Derivatives,
    names: str,
) -> None:
    """Compare <u, J v> with <Jᵀ u, v>, for a random upstream gradient u and tangents v."""
    upstream = ctx.upstream(ctx.call, sample)
    _, reverse = gradients(ctx.call, leaves(sample), upstream)
    ours = torch.cat([inner(one, u) for one, u in zip(found, upstream, strict=True)])
    theirs = torch.cat([inner(reverse[i], tangent) for i, tangent in tangents.items()])
    usual = torch.stack([ours.abs().sum(), theirs.abs().sum()])
    budget, low = exact_budget(theirs.sum(), usual), narrowest(sample)
    if low is not None:
        budget = rounding_budget(low, largest(usual), 8 * torch.finfo(low).eps, 0.0)
    what = f"slope along {names}, by forward mode as by reverse mode"
    with asking_no_more_than_half(ctx, sample, upstream):
        ctx.compare(what, ours.sum(), theirs.sum(), budget=budget)


def _compare_with_slopes(
    ctx: CheckContext,
    sample: Sample,
    tangents: Tangents,
    upstream: Sequence[Tensor],
    found: Gradients,
) -> None:
    """Compare the tangent of each gradient with the slope of that gradient."""
    if narrowest(sample) is not None:
        raise NotApplicable("no reference, and finite differences of a gradient need float64")
    weights = {i: ctx.random_like(sample[i]) for i in tangents}

    def terms(i: int, shift: float) -> Tensor:
        moved = tuple(t + shift * tangents[j] if j in tangents else t for j, t in enumerate(sample))
        _, gradient = gradients(ctx.call, leaves(ctx.in_domain(moved)), upstream)
        return inner(gradient[i], weights[i])

    for i, weight in weights.items():
        claimed = [inner(found[i], weight)]
        along = slope(
            "all arguments",
            partial(terms, i),
            claimed,
            step_for(outputs_of(sample)),
            rtol=ctx.case.rtol,
            atol=ctx.case.atol,
        )
        if along.jumps:
            continue
        ctx.comparisons += 1
        along.require(f"tangent of the gradient of {ctx.label(i)}")


def _tangents_of_gradients(
    call: Call, sample: Sample, tangents: Mapping[int, Tensor | None], upstream: Sequence[Tensor]
) -> Gradients:
    with fwAD.dual_level():
        arguments = with_tangents(leaves(sample), tangents)
        _, found = gradients(call, arguments, upstream, create_graph=True)
        unpacked: Gradients = {}
        for i, gradient in found.items():
            tangent = None if gradient is None else fwAD.unpack_dual(gradient).tangent
            unpacked[i] = None if tangent is None else tangent.detach()
        return unpacked
