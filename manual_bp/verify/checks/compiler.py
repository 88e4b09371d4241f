"""Compiled and exported."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from manual_bp.verify._bench import Bench, Call, gradients, leaves
from manual_bp.verify._case import Sample
from manual_bp.verify.checks._shared import pairs_of_one_shape, tied


def compiled(bench: Bench) -> None:
    """Compiled in one graph: values and gradients as in eager code, of tied arguments as well."""
    pairs = pairs_of_one_shape(bench)
    _compare_compiled(bench, bench.case.call, [bench.most_telling()], dynamic=False)
    for sample, i, j in pairs:
        _compare_compiled(bench, tied(bench.case.call, i, j), [sample], dynamic=False)


def compile_dynamic(bench: Bench) -> None:
    """Compiled with dynamic shapes: right for another number of rows too."""
    in_dims = bench.in_dims
    bench.with_rows()
    sample = bench.most_telling()
    fewer = tuple(
        t if d is None else t.narrow(d, 0, t.shape[d] - 1)
        for t, d in zip(sample, in_dims, strict=True)
    )
    _compare_compiled(bench, bench.case.call, [sample, fewer], dynamic=True)


def export(bench: Bench) -> None:
    """Exported by torch.export: the same values."""
    sample = bench.most_telling()

    class Exported(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return bench.case.call(*arguments)

    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(Exported(), sample)
    bench.same_outputs(program.module()(*sample), bench.case.call(*sample), " of the export")


def _compare_compiled(
    bench: Bench, call: Call, samples: Sequence[Sample], *, dynamic: bool
) -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings(action="ignore"):
        whole = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for sample in samples:
            upstream = bench.upstream(call, sample)
            result, found = gradients(whole, leaves(sample), upstream)
            expected_result, expected = gradients(call, leaves(sample), upstream)
            bench.same_outputs(result, expected_result, " when compiled")
            bench.same_gradients(sample, found, expected, " when compiled")
