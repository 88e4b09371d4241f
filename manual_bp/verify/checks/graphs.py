"""With a graph and without one."""

import torch

from manual_bp.verify._autograd import gradients, leaves
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._context import CheckContext
from manual_bp.verify.checks._digits import asking_no_more_than_half


@check(builds_on=("writes_nothing", "deterministic"))
def without_graph(ctx: CheckContext, sample: Sample) -> None:
    """The value is the same if no graph is recorded."""
    expected = ctx.call(*leaves(sample))
    ctx.compare_outputs(ctx.call(*leaves(sample, ())), expected, " when nothing needs a gradient")
    with torch.no_grad():
        ctx.compare_outputs(ctx.call(*leaves(sample)), expected, " under no_grad")


@check(builds_on=SLOPE)
def create_graph(ctx: CheckContext, sample: Sample) -> None:
    """The gradient is the same under create_graph=True, unless that is refused."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = gradients(ctx.call, leaves(sample), upstream)
    variable = [u.clone().requires_grad_() for u in upstream]
    try:
        _, found = gradients(ctx.call, leaves(sample), variable, create_graph=True)
    except Exception:
        return  # double_backward judges the refusal
    with asking_no_more_than_half(ctx, sample, upstream):
        ctx.compare_gradients(sample, found, expected, " under create_graph=True")
