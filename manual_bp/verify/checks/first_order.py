"""The value, and the first derivative."""

import math
from collections.abc import Sequence

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
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._precision import exact, narrowest, widen, widened
from manual_bp.verify.checks._shared import LAYOUTS, compare_slopes, compare_values, is_plain

_NO_GRADIENT = (
    "\ndiagnosis: no gradient at all; close over an argument that never has one, "
    "as in lambda x: Layer.apply(x, mask.to(x.dtype))"
)


@check()
def forward_matches_reference(ctx: CheckContext, sample: Sample) -> None:
    """The value equals the reference's."""
    right = ctx.reference(*leaves(widened(sample), ()))
    compare_values(ctx, ctx.call(*leaves(sample, ())), right, ctx.loss(sample))


@check()
def argument_layouts(ctx: CheckContext, sample: Sample) -> None:
    """The strides of the arguments do not matter: a contiguous copy gives the same."""
    tensors = [i for i, t in enumerate(sample) if isinstance(t, Tensor)]
    for name, layout in LAYOUTS.items():
        for chosen in [tensors, *([i] for i in tensors if len(tensors) > 1)]:
            arguments = tuple(layout(t) if i in chosen else t for i, t in enumerate(sample))
            if all(is_plain(arguments[i]) for i in chosen):
                continue
            where = f" for {name} {', '.join(map(ctx.label, chosen))}"
            try:
                _compare_with_copy(ctx, ctx.call, arguments, where)
            except Exception as problem:
                if not _reference_fails_too(ctx, arguments, problem):
                    raise


def _require_a_slope_for_every_argument(ctx: CheckContext) -> None:
    missing = [label for label, count in ctx.slopes.items() if not count]
    if missing and ctx.case.reference is None:
        raise Mismatch(
            f"slopes by {', '.join(missing)}: every direction starts at a kink, and there is no "
            f"reference to compare with\ndiagnosis: unsuitable samples, or a missing reference"
        )


@check(after_all=_require_a_slope_for_every_argument)
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
            differ.compare(i, direction, found[i])
        ctx.slopes[ctx.label(i)] += ctx.comparisons - before


@check()
def gradients_match_reference(ctx: CheckContext, sample: Sample) -> None:
    """The gradients equal those that autograd finds through the reference."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = exact(ctx.reference, sample, upstream)
    _, found = gradients(ctx.call, leaves(sample), upstream)
    clues = _clues(ctx.reference, sample, upstream, expected)
    lost = ctx.loss(sample, [upstream])
    compare_slopes(ctx, sample, found, expected, lost, clues=clues)


@check()
def requires_grad_subsets(ctx: CheckContext, sample: Sample) -> None:
    """Each gradient is the same, whichever arguments require one."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = gradients(ctx.call, leaves(sample), upstream)
    for wanted in subsets(positions(sample)):
        where = f" when only {', '.join(map(ctx.label, wanted))} require gradients"
        _, found = gradients(ctx.call, leaves(sample, wanted), upstream)
        ctx.compare_gradients(sample, found, {i: expected[i] for i in wanted}, where)


def _reference_fails_too(ctx: CheckContext, arguments: Sample, problem: Exception) -> bool:
    """Whether the reference also refuses these strides or values, or is wrong for them."""
    if ctx.case.reference is None:
        return not isinstance(problem, Mismatch)
    try:
        _compare_with_copy(ctx, ctx.case.reference, arguments, "")
    except Exception:
        return True
    return False


def _compare_with_copy(ctx: CheckContext, call: Call, arguments: Sample, where: str) -> None:
    copied = tuple(
        t.clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t
        for t in arguments
    )
    upstream = ctx.upstream(call, copied)
    result, expected = gradients(call, leaves(copied), upstream)
    # leaves() would copy the arguments, and lose their strides.
    views = tuple(t.detach().requires_grad_() if is_differentiable(t) else t for t in arguments)
    found_result, found = gradients(call, views, upstream)
    ctx.compare_outputs(found_result, result, where)
    diagnosis = "right only for contiguous arguments"
    ctx.compare_gradients(copied, found, expected, where, diagnosis=diagnosis)


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
        low, reference = narrowest(sample), ctx.case.reference
        uses_reference = low is not None and reference is not None
        self.ctx, self.call = ctx, reference if uses_reference and reference else ctx.call
        self.sample = widened(sample) if uses_reference else sample
        self.upstream = widened(upstream)
        # A call may round to a lower precision than that of its arguments.
        coarsest = narrowest(self.sample if uses_reference else (*sample, *upstream))
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


def _clues(
    reference: Call, sample: Sample, upstream: Sequence[Tensor], expected: Gradients
) -> dict[str, Gradients]:
    """The gradients that known mistakes would give."""
    scale = upstream[0].flatten()[0].item() if upstream[0].numel() else 1.0
    clues: dict[str, Gradients] = {
        "everything is scaled by the first element of the upstream gradient": {
            i: None if g is None else g * scale for i, g in expected.items()
        }
    }
    if upstream[0].ndim and upstream[0].shape[0] > 1:
        first = [u if not u.ndim else torch.cat([u[:1], torch.zeros_like(u[1:])]) for u in upstream]
        _, only_first = exact(reference, sample, first)
        clues["only the first row of the batch counts: missing a sum over the batch"] = only_first
    return clues
