"""Batches of no row, of one, of none at all, and of two dimensions."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp.verify._bench import Bench
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference, first_line


def no_rows(bench: Bench) -> None:
    """A batch of no samples, as the reference."""
    _compare_variant(bench, lambda t, d: t.narrow(d, 0, 0), " of no rows")


def one_row(bench: Bench) -> None:
    """A batch of one sample, as the reference."""
    _compare_variant(bench, lambda t, d: t.narrow(d, 0, 1), " of one row")


def one_dimensional(bench: Bench) -> None:
    """One sample without a batch dimension, as the reference."""
    _compare_variant(bench, lambda t, d: t.select(d, 0), " of one sample without a batch")


def three_dimensional(bench: Bench) -> None:
    """Two batch dimensions, as the reference."""
    _compare_variant(
        bench, lambda t, d: torch.stack([t, t.flip(d)], d), " with two batch dimensions"
    )


def _compare_variant(bench: Bench, change: Callable[[Tensor, int], Tensor], where: str) -> None:
    in_dims = bench.in_dims
    for sample in bench.with_rows():
        changed = tuple(
            t if d is None else change(t, d) for t, d in zip(sample, in_dims, strict=True)
        )
        try:
            bench.reference(*changed)
        except Exception as error:
            raise NotApplicable(f"the reference itself refuses it: {first_line(error)}") from None
        compare_with_reference(bench, changed, where)
