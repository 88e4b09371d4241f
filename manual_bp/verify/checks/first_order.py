"""The value, and the first derivative."""

import math
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
from manual_bp.verify._check import VALUE, CheckContext, check
from manual_bp.verify._clues import is_linear, known_mistakes
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._diagnose import DEMOTED
from manual_bp.verify._numeric import numeric_gradients
from manual_bp.verify._precision import exact, narrowest, widen, widened
from manual_bp.verify.checks._digits import is_demoted, results_of
from manual_bp.verify.checks._shared import (
    Change,
    changed,
    clues_from,
    compare_slopes,
    compare_values,
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
    "\ndiagnosis: no gradient at all; close over an argument that never has one, "
    "as in lambda x: Layer.apply(x, mask.to(x.dtype))"
)


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
            f"slopes by {', '.join(missing)}: every direction starts at a kink, and there is no "
            f"reference to compare with\ndiagnosis: unsuitable samples, or a missing reference"
        )


@check(
    after_all=_require_a_slope_for_every_argument,
    builds_on=("writes_nothing", "deterministic", "without_graph", "gradients_match_reference"),
)
def finite_differences(ctx: CheckContext, sample: Sample) -> None:
    """The gradient is the slope: in random directions, and along every axis of small arguments.

    In a lower precision than float64 it is the slope of the reference in float64, if there is one.
    """
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
    differ = _Differences(ctx, sample, upstream)
    for i in positions(sample):
        before = ctx.comparisons
        for direction in _directions(ctx, differ.sample[i]):
            try:
                differ.compare(i, direction, found[i])
            except Mismatch as mismatch:
                why = mismatch.diagnosis or _mistake(ctx, sample, upstream, found, i)
                raise mismatch.diagnosed(why) from None
        ctx.slopes[ctx.label(i)] += ctx.comparisons - before


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
        ctx.compare_gradients(sample, found, {i: expected[i] for i in wanted}, where)


def _directions(ctx: CheckContext, value: Tensor) -> list[Tensor]:
    directions = [ctx.random_like(value) for _ in range(3)]
    if value.numel() <= 24:
        axes = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        directions += [axis.view(value.shape) for axis in axes]
    return directions


class _Differences:
    """Difference quotients of a call at a sample, weighted by upstream gradients.

    In a low precision they are the reference's, in float64. Without a reference they are those of
    the call, with a step that balances rounding, eps / step, and curvature, step².
    """

    def __init__(self, ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor]) -> None:
        low = narrowest(sample)
        reference = None if low is None else ctx.case.reference
        self.ctx, self.call = ctx, reference or ctx.call
        self.sample = widened(sample) if reference else sample
        self.upstream = widened(upstream)
        # A call may round to a lower precision than that of its arguments.
        coarsest = narrowest(self.sample if reference else (*sample, *upstream))
        self.is_low = coarsest is not None
        self.eps = torch.finfo(coarsest or torch.float64).eps
        self.step = self.eps ** (1 / 3) if self.is_low else 1e-6
        self.noise = 0.0 if low is None else torch.finfo(low).eps

    def value(self, i: int, argument: Tensor) -> tuple[Tensor, float]:
        """The weighted sum of the outputs, and its rounding error."""
        arguments = tuple(argument if j == i else t for j, t in enumerate(self.sample))
        with torch.no_grad():
            results = outputs_of(self.call(*arguments))
        terms = [(u.conj() * widen(t)).real for u, t in zip(self.upstream, results, strict=True)]
        rounding = self.eps * math.hypot(*(float(t.norm()) for t in terms))
        return torch.stack([t.sum() for t in terms]).sum(), rounding

    def compare(self, i: int, direction: Tensor, gradient: Tensor | None) -> None:
        """Compare <gradient, direction> with the quotient, unless the slope jumps there."""
        ctx, start = self.ctx, self.sample[i]
        step = self.step * max(1.0, largest(start))
        moved = [(start + shift * direction).to(start.dtype) for shift in (-step, step)]
        (here, rounding), (behind, _), (ahead, _) = (self.value(i, t) for t in (start, *moved))
        right, left = (ahead - here) / step, (here - behind) / step
        numeric = (ahead - behind) / (2 * step)
        if not numeric.isfinite():  # a step leaves the domain
            return
        # The arguments were rounded, so the step was not exactly along the direction.
        along = (widen(moved[1]) - widen(moved[0])) / (2 * step) if self.is_low else direction
        slopes = torch.zeros_like(along.real)
        if gradient is not None:
            slopes = (widen(gradient).conj() * along).real
        slope, size = slopes.sum(), slopes.abs().nan_to_num(0, 0).sum() + numeric.abs()
        kink, rtol = (2 * self.step, 3 * self.step**2) if self.is_low else (1e-3, 1e-6)
        rounding = max(1e-9 * float(here.abs()) + 1e-9, 4 * rounding / step)
        if (right - left).abs() > kink * size + 1e3 * rounding:
            ctx.kinks += 1
            return
        ctx.comparisons += 1
        allowed = (rtol + ctx.case.rtol) * size + rounding + ctx.case.atol
        if self.is_low:
            allowed += (right - left).abs() / 2
        if gradient is not None:
            allowed += 8 * self.noise * largest(gradient) * float(along.abs().norm())
        if (slope - numeric).abs() <= allowed:
            return
        # Near a pole the quotient is not the slope yet: half the step tells how far it is from it.
        half = [self.value(i, start + shift * direction)[0] for shift in (-step / 2, step / 2)]
        halved = (half[1] - half[0]) / step
        # Not >, since the slope may be nan.
        if not (slope - halved).abs() <= 2 * allowed + (numeric - halved).abs():
            raise Mismatch(
                f"slope along a direction of {ctx.label(i)}: expected {numeric.item():.10g} by "
                f"finite differences, got {slope.item():.10g}, ratio {(slope / numeric).item():.6g}"
                + ("" if gradient is not None else _NO_GRADIENT)
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
    directions = {i: ctx.random_like(sample[i]) for i in found}

    def slopes(call: Call, change: Change, gradient: Gradients) -> list[Slope]:
        start, given = change(sample), change(upstream)

        def terms(i: int, along: Tensor, shift: float) -> Tensor:
            results = outputs_of(call(*start[:i], start[i] + shift * along, *start[i + 1 :]))
            return torch.cat([inner(t, u) for t, u in zip(results, given, strict=True)])

        return [
            slope(ctx.label(i), partial(terms, i, v), [inner(gradient[i], v)], step_for([start[i]]))
            for i, v in changed(directions, change).items()
            if v is not None
        ]

    ours = None if narrowest(sample) else slopes(ctx.call, tuple, found)
    theirs = slopes(ctx.reference, widened, expected)
    is_theirs = supported(ours, theirs) == "call"
    return fault_of_reference("gradient", theirs) if is_theirs else ""


def _mistake(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], found: Gradients, i: int
) -> str:
    """The diagnosis of a wrong slope, from a gradient by finite differences."""
    if narrowest(sample) is not None:
        return ""
    try:
        expected = numeric_gradients(ctx.call, sample, upstream)
    except Exception:
        return ""
    right = partial(numeric_gradients, ctx.call)
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
