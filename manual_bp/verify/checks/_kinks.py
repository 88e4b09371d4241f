"""Gradients where slopes may jump: any slope between the one-sided ones is right."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Sample
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import exact, narrowest, widened
from manual_bp.verify.checks._shared import compare_slopes, compare_values, compare_with_reference
from manual_bp.verify.checks._slopes import inner, step_for

_MOST = 24  # elements of arguments and of outputs that are looked at

Axis = tuple[int, int]  # the position of an argument, and of an element in it
Direction = dict[int, Tensor]  # by the position of the argument that moves


def compare_except_at_kinks(
    ctx: CheckContext, arguments: Sample, where: str, *, is_cast: bool = False
) -> None:
    """Compare with the reference; where a slope jumps, any gradient in between is right, too."""
    arguments = ctx.in_domain(arguments)
    try:
        compare_with_reference(ctx, arguments, where, is_cast=is_cast, judges_kinks=True)
    except Mismatch as mismatch:
        upstream = ctx.upstream(ctx.call, arguments)
        result, found = gradients(ctx.call, leaves(arguments), upstream)
        right, expected = exact(ctx.reference, arguments, upstream)
        lost = ctx.loss(arguments, [upstream])
        lost.slack = 4.0 if is_cast else 1.0
        compare_values(ctx, result, right, lost, where, same_dtype=is_cast)
        differing = _differing(found, expected)
        if not differing or _has_complex(arguments, result):
            raise mismatch from None
        some = _some(ctx, differing)
        jumping = require_slopes_between(ctx, arguments, some, where)
        excused = differing if len(jumping) == len(some) else jumping
        ours = _replaced(found, expected, excused)
        compare_slopes(ctx, arguments, ours, expected, lost, where, judges_kinks=True)


def judge_slopes(
    ctx: CheckContext, arguments: Sample, where: str, axes: Sequence[Axis] | None = None
) -> None:
    """Judge without a reference, unless the call refuses the arguments or has no values there.

    Args:
        ctx: The context.
        arguments: A sample, or one like it. If more than two elements are equal, a right slope may
            be outside of the one-sided ones, as for a median.
        where: Added to the names in messages.
        axes: Where to look; by default along some of all axes.
    """
    if narrowest(arguments) is not None:
        raise NotApplicable("no reference, and one-sided slopes need float64")
    arguments = ctx.in_domain(arguments)
    try:
        results = outputs_of(ctx.call(*leaves(arguments, ())))
    except Exception:
        return
    if _has_complex(arguments, results):
        raise NotApplicable("complex numbers have no one-sided slopes")
    if any(t.numel() for t in results) and all(t.isfinite().all() for t in results):
        every = [(i, k) for i in positions(arguments) for k in range(arguments[i].numel())]
        require_slopes_between(ctx, arguments, axes or _some(ctx, every), where)


def require_slopes_between(
    ctx: CheckContext, arguments: Sample, axes: Sequence[Axis], where: str
) -> set[Axis]:
    """Compare gradients of single outputs with the one-sided slopes along axes, and of all at once.

    The slopes are the reference's in float64, or, without one, those of the call. None is known
    where one side is out of the domain. With gradient_of, its gradient on the two sides takes
    their place, since it need not be a slope.

    Returns:
        The axes along which the slope of some output jumps.

    Raises:
        Mismatch: A slope is outside of the two.
    """
    outputs = _Outputs(ctx, arguments)
    jumping = set()
    for axis in (*axes, None):
        direction = _direction(outputs.start, axis)
        direction = ctx.directions_in_domain(outputs.start, direction)
        left, right = outputs.one_sided_slopes(direction)
        some = outputs.worth_a_look(left, right)
        terms = [_along(outputs.gradient_of(k), direction) for k in some]
        claimed = torch.stack([t.sum() for t in terms])
        least, most = torch.minimum(left, right)[some], torch.maximum(left, right)[some]
        # Not of the sum, since terms may cancel but for their rounding.
        size = torch.stack([t.abs().sum() for t in terms]) + least.abs() + most.abs()
        scale = 1 + outputs.values[some].abs()
        # Steeper than this, the value itself jumps, or the point is singular.
        is_slope = (size < 1e3 * scale) & outputs.is_regular(some)
        allowed = outputs.rtol * size + 1e-5 * scale + ctx.case.atol
        is_outside = (claimed < least - allowed) | (claimed > most + allowed)
        ctx.comparisons += 1
        wrong = (is_slope & is_outside).nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            name = "all arguments at once" if axis is None else f"an axis of {ctx.label(axis[0])}"
            raise Mismatch(
                f"slope of an output along {name}{where}: expected one between the one-sided "
                f"slopes, {least[k].item():.10g} and {most[k].item():.10g}, "
                f"got {claimed[k].item():.10g}"
            )
        if axis is not None and bool(
            (is_slope & (most - least > 1e-3 * size + 1e-5 * scale)).any()
        ):
            jumping.add(axis)
    return jumping


class _Outputs:
    """The elements of all outputs, one after the other: their values, slopes and gradients.

    Values and slopes are the reference's in float64, if there is one; gradients are the call's.
    """

    def __init__(self, ctx: CheckContext, arguments: Sample) -> None:
        self.ctx, self.arguments = ctx, arguments
        self.start = ctx.in_domain(widened(arguments))
        self.results = outputs_of(ctx.call(*leaves(arguments)))
        self.judged = [i for i, t in enumerate(self.results) if t.requires_grad]
        self.values = self._values(self.start)
        self.step = step_for(outputs_of(arguments))
        low = narrowest(arguments)
        self.rtol = ctx.case.rtol + (1e-5 if low is None else 8 * torch.finfo(low).eps)
        self.found: dict[int, Gradients] = {}

    def one_sided_slopes(self, direction: Direction) -> tuple[Tensor, Tensor]:
        """The slopes on the two sides along a direction; nan where the arguments are refused."""
        sides = [_shifted(self.start, direction, shift) for shift in (-self.step, self.step)]
        if self.ctx.case.gradient_of is not None:
            left, right = (self._or_nan(self._derivative, direction, side) for side in sides)
            return left, right
        behind, ahead = (self._or_nan(self._values, direction, side) for side in sides)
        return (self.values - behind) / self.step, (ahead - self.values) / self.step

    def worth_a_look(self, left: Tensor, right: Tensor) -> list[int]:
        """The outputs whose slopes jump most, and those looked at before."""
        order = (right - left).abs().nan_to_num(0, 0, 0).argsort(descending=True)
        return list({*order[:2].tolist(), *list(self.found)[:_MOST]})

    def gradient_of(self, k: int) -> Gradients:
        """The gradient of the element at k."""
        if k not in self.found:
            upstream = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in self.results]
            offset = 0
            for i in self.judged:
                size = self.results[i].numel()
                if 0 <= k - offset < size:
                    upstream[i].view(-1)[k - offset] = 1
                offset += size
            self.found[k] = gradients(self.ctx.call, leaves(self.arguments), upstream)[1]
        return self.found[k]

    def is_regular(self, some: Sequence[int]) -> Tensor:
        """Whether the gradients of these elements are finite, and not huge."""
        return torch.tensor(
            [_steepest(self.gradient_of(k)) < 1e6 for k in some], device=self.values.device
        )

    def _or_nan(self, of: Any, direction: Direction, moved: Sample) -> Tensor:
        """Values or derivatives of all elements; nan out of the domain."""
        inside = self.ctx.in_domain(moved)
        is_inside = all(
            largest(inside[i] - moved[i]) <= 1e-3 * self.step * largest(along)
            for i, along in direction.items()
        )
        try:
            found: Tensor = of(inside, direction) if is_inside else torch.tensor(torch.nan)
        except Exception:
            found = torch.tensor(torch.nan)
        return found.to(self.values).expand_as(self.values)

    def _derivative(self, arguments: Sample, direction: Direction) -> Tensor:
        """The derivative of all elements along a direction, as autograd has it."""

        def values(*moved: Tensor) -> Tensor:
            new = dict(zip(direction, moved, strict=True))
            results = outputs_of(
                self.ctx.trusted(*(new.get(i, t) for i, t in enumerate(arguments)))
            )
            return torch.cat([results[i].flatten() for i in self.judged])

        start = tuple(arguments[i] for i in direction)
        derivative: Tensor = jvp(values, start, tuple(direction.values()))[1]
        return derivative

    def _values(self, arguments: Sample, _: Direction | None = None) -> Tensor:
        results = outputs_of(self.ctx.trusted(*leaves(arguments, ())))
        return torch.cat([results[i].detach().flatten() for i in self.judged])


def _some(ctx: CheckContext, axes: Sequence[Axis]) -> list[Axis]:
    return [axes[k] for k in torch.randperm(len(axes), generator=ctx.generator)[:_MOST]]


def _steepest(gradient: Gradients) -> float:
    sizes = [g.abs().nan_to_num(torch.inf) for g in gradient.values() if g is not None]
    return max((float(size.max()) for size in sizes if size.numel()), default=0.0)


def _has_complex(*values: object) -> bool:
    return any(t.is_complex() for t in outputs_of(values))


def _differing(found: Gradients, expected: Gradients) -> list[Axis]:
    """The elements in which two gradients differ."""
    axes = []
    for i, right in expected.items():
        one = found[i]
        if one is not None and right is not None:
            rtol = max(1e-8, torch.finfo(one.dtype).eps)
            differs = ~((one - right).abs() <= rtol * right.abs())
            axes += [(i, k) for k in differs.flatten().nonzero().flatten().tolist()]
    return axes


def _replaced(found: Gradients, expected: Gradients, axes: Collection[Axis]) -> Gradients:
    """Gradients with the expected elements at some axes."""
    replaced = dict(found)
    for i in {i for i, _ in axes}:
        gradient, right = replaced[i], expected[i]
        if gradient is not None and right is not None:
            chosen = torch.zeros(gradient.numel(), dtype=torch.bool, device=gradient.device)
            chosen[[k for j, k in axes if j == i]] = True
            right = right.to(gradient.dtype)
            replaced[i] = torch.where(chosen.view(gradient.shape), right, gradient)
    return replaced


def _direction(arguments: Sample, axis: Axis | None) -> Direction:
    if axis is None:
        return {i: torch.ones_like(arguments[i]) for i in positions(arguments)}
    i, k = axis
    unit = torch.zeros(arguments[i].numel(), dtype=arguments[i].dtype, device=arguments[i].device)
    unit[k] = 1
    return {i: unit.view(arguments[i].shape)}


def _along(gradient: Gradients, direction: Direction) -> Tensor:
    """The terms whose sum is the slope along a direction."""
    return torch.cat([inner(gradient[i], v) for i, v in direction.items()])


def _shifted(arguments: Sample, direction: Direction, shift: float) -> Sample:
    return tuple(t + shift * direction[i] if i in direction else t for i, t in enumerate(arguments))
