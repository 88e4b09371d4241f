"""Whether a mistake would show at the samples of a case."""

from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves
from manual_bp.verify._case import Sample
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import exact


def most_informative(ctx: CheckContext) -> Sample:
    """The sample with the most gradients that are finite and not zero."""
    return max(
        ctx.samples,
        key=lambda sample: sum(
            not _blindness(g, ctx.case.atol) for g in _trusted_gradients(ctx, sample).values()
        ),
    )


def blind_spot(ctx: CheckContext, *, of_call: bool = False) -> str:
    """Why a wrong gradient might not show at any judged sample; empty if it would.

    of_call: Whether to look at the gradients of the call, not of the reference.
    """
    found = [_trusted_gradients(ctx, sample, of_call=of_call) for sample in ctx.judged]
    every = [gradient for of_sample in found for gradient in of_sample.values()]
    if not every:
        whose = "" if ctx.case.reference is None else " of the reference"
        return f"no output{whose} depends on an argument that can have a gradient"
    blind = []
    for i in sorted({i for of_sample in found for i in of_sample}):
        judged = [of_sample[i] for of_sample in found if i in of_sample]
        reasons = {_blindness(gradient, ctx.case.atol): None for gradient in judged}
        if "" not in reasons:
            blind.append(f"the gradient of {ctx.label(i)} {' or '.join(reasons)}")
    if blind:
        return f"{', '.join(blind)} at every sample"
    if any(g.ndim for g in every) and all(g.numel() <= 1 for g in every):
        return "every gradient has one element only: a sum, a mean and a transpose look alike"
    return ""


def _trusted_gradients(
    ctx: CheckContext, sample: Sample, *, of_call: bool = False
) -> dict[int, Tensor]:
    """The gradients of the reference (or of the call), without those that are None."""
    upstream = ctx.upstream(ctx.call, sample)
    if of_call or ctx.case.reference is None:
        _, found = gradients(ctx.call, leaves(sample), upstream)
    else:
        _, found = exact(ctx.case.reference, sample, upstream)
    return {i: gradient for i, gradient in found.items() if gradient is not None}


def _blindness(gradient: Tensor, atol: float) -> str:
    """Why a wrong gradient could look like this one; empty if it could not."""
    if not gradient.numel():
        return "has no elements"
    finite = gradient.isfinite()
    if not finite.any():
        return "is not finite"
    if not (finite & (gradient != 0)).any():
        return "is zero"
    return "" if (finite & (gradient.abs() > atol)).any() else f"is within atol = {atol:g} of zero"
