"""Batches of no rows, of one, without a batch dimension, and with two."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp.verify._case import Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference, first_line


@check(capability=True)
def no_rows(ctx: CheckContext, sample: Sample) -> None:
    """An empty batch gives what the reference gives."""
    _compare_batch(ctx, sample, lambda t, d: t.narrow(d, 0, 0), " of no rows")


@check(capability=True)
def one_row(ctx: CheckContext, sample: Sample) -> None:
    """A batch of one sample gives what the reference gives."""
    _compare_batch(ctx, sample, lambda t, d: t.narrow(d, 0, 1), " of one row")


@check(capability=True)
def one_dimensional(ctx: CheckContext, sample: Sample) -> None:
    """One sample without a batch dimension gives what the reference gives."""
    where = " of one sample without a batch dimension"
    _compare_batch(ctx, sample, lambda t, d: t.select(d, 0), where)


@check(capability=True)
def three_dimensional(ctx: CheckContext, sample: Sample) -> None:
    """Two batch dimensions give what the reference gives."""
    where = " with two batch dimensions"
    _compare_batch(ctx, sample, lambda t, d: torch.stack([t, t.flip(d)], d), where)


def _compare_batch(
    ctx: CheckContext, sample: Sample, change: Callable[[Tensor, int], Tensor], where: str
) -> None:
    in_dims, reference = ctx.in_dims(sample), ctx.reference
    changed = tuple(t if d is None else change(t, d) for t, d in zip(sample, in_dims, strict=True))
    try:
        reference(*changed)
    except Exception as error:
        raise NotApplicable(f"the reference itself refuses it: {first_line(error)}") from None
    compare_with_reference(ctx, changed, where)
