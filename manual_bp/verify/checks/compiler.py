"""The compiled and the exported code."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from manual_bp.verify._autograd import gradients, leaves
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._random import reseed
from manual_bp.verify.checks._shared import pairs_of_one_shape, tied


@check(capability=True, slow=True, best_sample=True, builds_on=("writes_nothing", "deterministic"))
def compile_(ctx: CheckContext, sample: Sample) -> None:
    """One compiled graph gives the values and gradients of eager mode, also for tied arguments."""
    _compare_compiled(ctx, ctx.call, [sample], dynamic=False)
    for other in ctx.each(ctx.samples):
        for i, j in pairs_of_one_shape(other):
            _compare_compiled(ctx, tied(ctx.call, i, j), [other], dynamic=False)


@check(
    capability=True,
    slow=True,
    best_sample=True,
    builds_on=("writes_nothing", "deterministic", "compile"),
)
def compile_dynamic(ctx: CheckContext, sample: Sample) -> None:
    """Compiled with dynamic shapes, the same holds for another number of rows."""
    fewer = tuple(
        t if d is None else t.narrow(d, 0, t.shape[d] - 1)
        for t, d in zip(sample, ctx.in_dims(sample), strict=True)
    )
    _compare_compiled(ctx, ctx.call, [sample, fewer], dynamic=True)


@check(capability=True, slow=True, best_sample=True, builds_on=("writes_nothing", "deterministic"))
def export(ctx: CheckContext, sample: Sample) -> None:
    """The exported program gives the same values."""

    class Exported(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return ctx.call(*arguments)

    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(Exported(), sample)
    reseed(ctx.case.seed)
    ctx.compare_outputs(program.module()(*sample), ctx.call(*sample), " of the export")


def _compare_compiled(
    ctx: CheckContext, call: Call, samples: Sequence[Sample], *, dynamic: bool
) -> None:
    torch.compiler.reset()
    with warnings.catch_warnings(action="ignore"):
        whole = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for sample in samples:
            upstream = ctx.upstream(call, sample)
            reseed(ctx.case.seed)
            result, found = gradients(whole, leaves(sample), upstream)
            expected_result, expected = gradients(call, leaves(sample), upstream)
            ctx.compare_outputs(result, expected_result, " when compiled")
            ctx.compare_gradients(sample, found, expected, " when compiled")
