"""The value, and the first derivative."""

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
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify.checks._shared import LAYOUTS, is_plain

_NO_GRADIENT = (
    "\ndiagnosis: no gradient at all; close over an argument that never has one, "
    "as in lambda x: Layer.apply(x, mask.to(x.dtype))"
)


@check()
def forward_matches_reference(ctx: CheckContext, sample: Sample) -> None:
    """The value equals the reference's."""
    expected = ctx.reference(*leaves(sample, ()))
    ctx.compare_outputs(ctx.call(*leaves(sample, ())), expected)


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
    """The gradient is the slope: in random directions, and along every axis of small arguments."""
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
    for i in positions(sample):
        before = ctx.comparisons
        for direction in _directions(ctx, sample[i]):
            _compare_slope(ctx, sample, i, direction, upstream, found[i])
        ctx.slopes[ctx.label(i)] += ctx.comparisons - before


@check()
def gradients_match_reference(ctx: CheckContext, sample: Sample) -> None:
    """The gradients equal those that autograd finds through the reference."""
    upstream = ctx.upstream(ctx.reference, sample)
    _, found = gradients(ctx.call, leaves(sample), upstream)
    _, expected = gradients(ctx.reference, leaves(sample), upstream)
    clues = _clues(ctx.reference, sample, upstream, expected)
    ctx.compare_gradients(sample, found, expected, clues=clues)


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


def _compare_slope(
    ctx: CheckContext,
    sample: Sample,
    i: int,
    direction: Tensor,
    upstream: Sequence[Tensor],
    gradient: Tensor | None,
) -> None:
    """Compare <gradient, direction> with the difference quotient, unless the slope jumps there."""
    largest = sample[i].abs().max().item() if sample[i].numel() else 0.0
    step = 1e-6 * max(1.0, largest)

    def value(shift: float) -> Tensor:
        arguments = tuple(t + shift * direction if j == i else t for j, t in enumerate(sample))
        with torch.no_grad():
            results = outputs_of(ctx.call(*arguments))
        weighted = [(u.conj() * t).real.sum() for u, t in zip(upstream, results, strict=True)]
        return torch.stack(weighted).sum()

    here, ahead, behind = value(0.0), value(step), value(-step)
    right, left = (ahead - here) / step, (here - behind) / step
    numeric = (ahead - behind) / (2 * step)
    slope = (
        torch.zeros_like(direction.real) if gradient is None else (gradient.conj() * direction).real
    )
    size = slope.abs().sum() + numeric.abs()
    rounding = 1e-9 * here.abs() + 1e-9
    if (right - left).abs() > 1e-3 * size + 1e3 * rounding:
        ctx.kinks += 1
        return
    ctx.comparisons += 1
    if (slope.sum() - numeric).abs() > 1e-6 * size + rounding:
        ratio = (slope.sum() / numeric).item()
        raise Mismatch(
            f"slope along a direction of {ctx.label(i)}: expected {numeric.item():.10g} by "
            f"finite differences, got {slope.sum().item():.10g}, ratio {ratio:.6g}"
            + ("" if gradient is not None else _NO_GRADIENT)
        )


def _clues(
    reference: Call, sample: Sample, upstream: Sequence[Tensor], expected: Gradients
) -> dict[str, Gradients]:
    """The gradients that known mistakes would give."""
    scale = upstream[0].flatten()[0] if upstream[0].numel() else 1.0
    clues: dict[str, Gradients] = {
        "everything is scaled by the first element of the upstream gradient": {
            i: None if g is None else g * scale for i, g in expected.items()
        }
    }
    if upstream[0].ndim and upstream[0].shape[0] > 1:
        first = [u if not u.ndim else torch.cat([u[:1], torch.zeros_like(u[1:])]) for u in upstream]
        _, only_first = gradients(reference, leaves(sample), first)
        clues["only the first row of the batch counts: missing a sum over the batch"] = only_first
    return clues
