"""Special values, and other devices."""

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference, first_line


@check()
def at_zero(ctx: CheckContext, sample: Sample) -> None:
    """At 0, where slopes may jump, value and gradient match the reference."""
    for share in (0.5, 1.0):
        arguments = tuple(
            torch.where(torch.rand_like(t.real) < share, 0.0, t) if is_differentiable(t) else t
            for t in sample
        )
        compare_with_reference(ctx, arguments, " at zero, where slopes may jump")


@check()
def large_values(ctx: CheckContext, sample: Sample) -> None:
    """At large values, where functions saturate, value and gradient match the reference."""
    for factor in (30.0, 1e4):
        for i in positions(sample):
            scaled = tuple(factor * t if j == i else t for j, t in enumerate(sample))
            where = f" at {factor:g} times the sample"
            compare_with_reference(ctx, scaled, where, is_large=True)


@check(capability=True, only_if_declared=True)
def infinite_values(ctx: CheckContext, sample: Sample) -> None:
    """For inf, -inf and nan, value and gradient match the reference."""
    i = positions(sample)[0]
    if not sample[i].numel() or sample[i].is_complex() or i in ctx.case.project:
        return
    for value in (torch.inf, -torch.inf, torch.nan):
        changed = sample[i].clone()
        changed[(0,) * changed.ndim] = value
        arguments = tuple(changed if j == i else t for j, t in enumerate(sample))
        compare_with_reference(ctx, arguments, f" with {value} in {ctx.label(i)}")


@check()
def device_parity(ctx: CheckContext, sample: Sample) -> None:
    """An accelerator gives the same numbers as the CPU."""
    if ctx.case.device.type == "cpu":
        raise NotApplicable("the case runs on the CPU")
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    on_cpu = tuple(t.cpu() if isinstance(t, Tensor) else t for t in sample)
    try:
        expected_result, expected = gradients(ctx.call, leaves(on_cpu), [u.cpu() for u in upstream])
    except Exception as error:
        raise NotApplicable(f"it does not run on the CPU: {first_line(error)}") from None
    moved: Gradients = {i: None if g is None else g.cpu() for i, g in found.items()}
    for one, other in zip(outputs_of(result), outputs_of(expected_result), strict=True):
        ctx.compare("output", one.detach().cpu(), other.detach())
    ctx.compare_gradients(on_cpu, moved, expected, " on the accelerator")
