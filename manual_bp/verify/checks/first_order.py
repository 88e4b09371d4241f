"""The value, and the first derivative."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    leaves,
    outputs_of,
    positions,
    subsets,
)
from manual_bp.verify._budget import Budget, largest
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import VALUE, check
from manual_bp.verify._clues import is_linear, known_mistakes
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._diagnose import DEMOTED
from manual_bp.verify._precision import exact, narrowest, widened
from manual_bp.verify.checks._along import directions_of, numeric_gradients, slope_along, terms_at
from manual_bp.verify.checks._digits import is_demoted, results_of, rounds_to_half
from manual_bp.verify.checks._far_out import far_out
from manual_bp.verify.checks._shared import (
    TO_GRADIENT_OF,
    Change,
    changed,
    clues_from,
    compare_slopes,
    compare_values,
    diagnosed,
)
from manual_bp.verify.checks._slopes import (
    Slope,
    fault_of_reference,
    inner,
    slope,
    step_for,
    supported,
)

_NO_GRADIENT = (
    "no gradient at all; close over an argument that never has one, "
    "as in lambda x: Layer.apply(x, mask.to(x.dtype))"
)

_MOST_ELEMENTS = 64
_RUNS_AGAIN = (
    "what runs again in backward, as in a reentrant checkpoint, gives its parameters no gradient "
    "unless one of its inputs requires one"
)
_FAR = 30.0  # times the sample


@check(builds_on=("writes_nothing", "deterministic"))
def forward_matches_reference(ctx: CheckContext, sample: Sample) -> None:
    """The value equals the reference's."""
    right = ctx.reference(*leaves(widened(sample), ()))
    found = ctx.call(*leaves(sample, ()))
    try:
        compare_values(ctx, found, right, ctx.loss(sample))
    except Mismatch as mismatch:
        raise mismatch.diagnosed(_lost_digits(ctx, sample) or mismatch.diagnosis) from None


def _require_a_slope_for_every_argument(ctx: CheckContext) -> None:
    missing = [label for label, count in ctx.slopes.items() if not count]
    if missing and ctx.case.reference is None:
        raise Mismatch(
            f"slopes by {', '.join(missing)}: every direction starts at a kink, or rounding hides "
            f"its slope, and there is no reference to compare with\n"
            f"diagnosis: unsuitable samples, or a missing reference"
        )


@check(
    after_all=_require_a_slope_for_every_argument,
    builds_on=(
        "writes_nothing",
        "deterministic",
        "without_graph",
        "gradients_match_reference",
        "full_precision",
    ),
)
def finite_differences(ctx: CheckContext, sample: Sample) -> None:
    """The gradient is the slope: in random directions, and along every axis of small arguments.

    In a lower precision than float64 it is the slope of the reference in float64, if there is one.
    """
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
    rounds = rounds_to_half(ctx, sample, upstream)
    for i in positions(sample):
        before = ctx.comparisons
        for direction in directions_of(ctx, sample[i], found[i]):
            along = slope_along(ctx, sample, upstream, i, direction, found[i], rounds=rounds)
            if along.jumps:
                ctx.kinks += along.has_quotient
                continue
            ctx.comparisons += 1
            try:
                along.require("slope")
            except Mismatch as mismatch:
                why = _shared_by_reference(ctx, sample, upstream, i, direction, along)
                if found[i] is None:
                    why = why or _NO_GRADIENT
                why = why or _mistake(ctx, sample, upstream, found, i)
                raise mismatch.diagnosed(why) from None
        ctx.slopes[ctx.label(i)] += ctx.comparisons - before


@check(builds_on=("writes_nothing", "deterministic", "without_graph", "finite_differences"))
def slopes_far_out(ctx: CheckContext, sample: Sample) -> None:
    """Without a reference: at large values, where functions saturate, the gradient is the slope."""
    if ctx.case.reference is not None:
        raise NotApplicable("large_values compares with the reference")
    if narrowest(sample) is not None:
        raise NotApplicable("in a low precision, finite differences find gross mistakes only")
    # Further out the steps are so long that they hide what happens within one.
    for i, arguments, where in far_out(ctx, sample, [_FAR]):
        upstream = ctx.upstream(ctx.call, arguments)
        result, found = gradients(ctx.call, leaves(arguments, [i]), upstream)
        gradient = found[i]
        if gradient is None or not gradient.isfinite().all():
            continue  # finite_differences and no_nan look at it
        upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
        rounds = rounds_to_half(ctx, arguments, upstream)
        for direction in directions_of(ctx, arguments[i], gradient):
            along = slope_along(ctx, arguments, upstream, i, direction, gradient, rounds=rounds)
            if along.has_quotient and not along.jumps:
                ctx.comparisons += 1
                along.require(f"slope{where}")


@check(builds_on=VALUE)
def gradients_match_reference(ctx: CheckContext, sample: Sample) -> None:
    """The gradients equal those that autograd finds through the reference."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = exact(ctx.reference, sample, upstream)
    _, found = gradients(ctx.call, leaves(sample), upstream)
    clues = clues_from(ctx, ctx.reference, sample, upstream, expected)
    lost = ctx.loss(sample, [upstream])
    try:
        compare_slopes(ctx, sample, found, expected, lost, clues=clues)
    except Mismatch as mismatch:
        why = (
            _fault_of_reference(ctx, sample, upstream, found, expected)
            or _lost_digits(ctx, sample)
            or mismatch.diagnosis
            or _nonlinearity(ctx, sample, upstream, found)
        )
        raise mismatch.diagnosed(why) from None


@check(builds_on=("writes_nothing", "deterministic"))
def requires_grad_subsets(ctx: CheckContext, sample: Sample) -> None:
    """Each gradient is the same, whichever arguments require one."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = gradients(ctx.call, leaves(sample), upstream)
    for wanted in subsets(positions(sample)):
        where = f" when only {', '.join(map(ctx.label, wanted))} require gradients"
        _, found = gradients(ctx.call, leaves(sample, wanted), upstream)
        with diagnosed(_RUNS_AGAIN if ctx.case.by_backward else ""):
            ctx.compare_gradients(sample, found, {i: expected[i] for i in wanted}, where)


def _shared_by_reference(
    ctx: CheckContext,
    sample: Sample,
    upstream: Sequence[Tensor],
    i: int,
    direction: Tensor,
    along: Slope,
) -> str:
    """The diagnosis if the reference's gradient is the same; else empty.

    Nothing is asked if that is known not to be the slope. In a module with buffers, a state that
    forward updates counts as a constant, as in `spectral_norm`. A gradient that is not the
    derivative on purpose may need detach().
    """
    case, low = ctx.case, narrowest(sample)
    module = case.reference_module
    has_state = module is not None and any(True for _ in module.buffers())
    if case.reference is None:
        return ""
    gradient = exact(ctx.reference, sample, upstream)[1][i]
    claimed = slope_along(ctx, sample, upstream, i, direction, gradient).claimed
    noise = 0.0 if low is None else 8 * torch.finfo(low).eps
    if abs(along.claimed - claimed) > (1e-6 + noise) * abs(along.claimed):
        return ""
    if has_state or case.gradient_of is not None:
        raise NotApplicable("the gradient is not the slope, but nor is the reference's")
    return (
        "the reference has the same gradient, which is not the slope: if that is on purpose, as "
        "with detach(), give the reference as gradient_of, too"
    )


def _lost_digits(ctx: CheckContext, sample: Sample) -> str:
    """Why results are right to about seven digits only; empty if they are not."""
    if narrowest(sample) is not None:
        return ""
    upstream = ctx.upstream(ctx.call, sample)
    got = results_of(ctx, ctx.call, sample, upstream)
    expected = results_of(ctx, ctx.reference, sample, upstream)
    return DEMOTED if is_demoted(ctx, sample, upstream, got, expected) else ""


def _fault_of_reference(
    ctx: CheckContext,
    sample: Sample,
    upstream: Sequence[Tensor],
    found: Gradients,
    expected: Gradients,
) -> str:
    """What finite differences say of the reference, if they support the call; else empty."""
    if ctx.case.gradient_of is not None:
        return ""  # the gradient is not the slope, on purpose
    directions = {i: ctx.random_like(sample[i]) for i in found}

    def slopes(call: Call, change: Change, gradient: Gradients) -> list[Slope]:
        start, given = change(sample), change(upstream)
        moved = {i: v for i, v in changed(directions, change).items() if v is not None}
        return [
            slope(
                ctx.label(i),
                partial(terms_at, ctx, call, start, given, i, along),
                [inner(gradient[i], along)],
                step_for([start[i]]),
                rtol=ctx.case.rtol,
                atol=ctx.case.atol,
            )
            for i, along in ctx.directions_in_domain(start, moved).items()
        ]

    ours = None if narrowest(sample) else slopes(ctx.call, tuple, found)
    theirs = slopes(ctx.reference, widened, expected)
    is_theirs = supported(ours, theirs) == "call"
    return fault_of_reference("gradient", theirs) if is_theirs else ""


def _mistake(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], found: Gradients, i: int
) -> str:
    """The diagnosis of a wrong slope, from a gradient by finite differences."""
    count = sum(t.numel() for t in outputs_of(sample))
    if narrowest(sample) is not None or ctx.case.project or count > _MOST_ELEMENTS:
        return ""
    try:
        expected = numeric_gradients(ctx, sample, upstream)
    except Exception:
        return ""
    if found[i] is not None and not any(g.any() for g in expected.values() if g is not None):
        return f"the value does not change, and the call has a gradient: {TO_GRADIENT_OF}"
    right = partial(numeric_gradients, ctx)
    clues = partial(known_mistakes, sample, upstream, expected, right, ctx.label)
    budgets = {i: Budget(1e-5, 1e-6 * largest(expected[i]))}
    try:
        ctx.compare_gradients(sample, {i: found[i]}, {i: expected[i]}, clues=clues, budgets=budgets)
    except Mismatch as mismatch:
        return mismatch.diagnosis or _nonlinearity(ctx, sample, upstream, found)
    return ""


def _nonlinearity(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], found: Gradients
) -> str:
    is_right = is_linear(ctx.call, sample, upstream, found)
    return "" if is_right else "not linear in the upstream gradient"
