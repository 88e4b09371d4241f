"""Slopes of a call along random directions and along the axes of an argument."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import narrowest, widen, widened
from manual_bp.verify.checks._slopes import Slope, inner, slope, step_for, steps_for


def directions_of(ctx: CheckContext, value: Tensor, gradient: Tensor | None) -> list[Tensor]:
    """Random directions for an argument, one along its gradient, and the axes of a small one."""
    directions = [ctx.random_like(value) for _ in range(3)]
    if gradient is not None:  # so that no terms cancel, which are larger than their rounding
        directions.append(directions[0].abs() * gradient.sgn())
    if value.numel() <= 24:
        axes = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        directions += [axis.view(value.shape) for axis in axes]
    return directions


def slope_along(
    ctx: CheckContext,
    sample: Sample,
    upstream: Sequence[Tensor],
    i: int,
    direction: Tensor,
    gradient: Tensor | None,
    *,
    rounds: bool = False,
) -> Slope:
    """The slope of gradient_of, or, for a low precision, of the reference; else of the call.

    rounds: Whether the call rounds to half precision on the way.
    """
    low = narrowest(sample)
    reference = ctx.case.gradient_of or (None if low is None else ctx.case.reference)
    call, start = ctx.call, sample
    if reference is not None:
        call, start = reference, ctx.in_domain(widened(sample))
    # A call may round to a lower precision than that of its arguments.
    coarsest = narrowest((*sample, *upstream) if reference is None else start)
    coarsest = torch.bfloat16 if rounds else coarsest

    def at(step: float) -> Slope:
        along, noise = direction, 0.0
        if coarsest is not None or i in ctx.case.project:
            # Moved arguments are rounded, and kept in their domain: not exactly along it.
            ahead, behind = (_shifted(ctx, start, i, along, shift)[i] for shift in (step, -step))
            along = (widen(ahead) - widen(behind)) / (2 * step)
        if not along.any():  # all of it is rounded away
            return Slope(ctx.label(i), 0.0, math.nan, 0.0, jumps=True)
        if low is not None:
            lost = 8 * torch.finfo(low).eps * largest(gradient) + 5 * ctx.usual_loss().error(i)
            noise = lost * float(along.abs().norm())
        return slope(
            ctx.label(i),
            partial(terms_at, ctx, call, start, upstream, i, along),
            [inner(gradient, along)],
            step,
            eps=eps,
            rtol=ctx.case.rtol,
            atol=ctx.case.atol + noise,
        )

    eps = torch.finfo(coarsest or torch.float64).eps
    tried = map(at, steps_for(start[i], eps))
    usual = next(tried)
    return usual if not usual.jumps else next((one for one in tried if not one.jumps), usual)


def terms_at(
    ctx: CheckContext,
    call: Call,
    sample: Sample,
    upstream: Sequence[Tensor],
    i: int,
    direction: Tensor,
    shift: float,
) -> Tensor:
    """The terms of the sum of the outputs, weighted by upstream gradients, at a moved sample."""
    with torch.no_grad():
        results = outputs_of(call(*_shifted(ctx, sample, i, direction, shift)))
    return torch.cat([inner(t, u) for t, u in zip(results, upstream, strict=True)])


def _shifted(ctx: CheckContext, sample: Sample, i: int, direction: Tensor, shift: float) -> Sample:
    """The sample with one argument moved along a direction, in its dtype and its domain."""
    moved = (sample[i] + shift * direction).to(sample[i].dtype)
    moved = ctx.in_domain((*sample[:i], moved, *sample[i + 1 :]))[i]
    return leaves((*sample[:i], moved, *sample[i + 1 :]), ())


def numeric_gradients(ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor]) -> Gradients:
    """The gradients of the call in float64, by the slope along each element."""
    found: Gradients = {}
    for i in positions(sample):
        gradient = torch.zeros_like(sample[i], memory_format=torch.contiguous_format)
        for k in range(gradient.numel()):
            for unit in (1, 1j) if gradient.is_complex() else (1,):
                axis = torch.zeros_like(gradient)
                axis.view(-1)[k] += unit
                terms = partial(terms_at, ctx, ctx.call, sample, upstream, i, axis)
                along = slope(ctx.label(i), terms, [inner(None, axis)], step_for([sample[i]]))
                gradient += axis * along.measured
        found[i] = gradient
    return found
