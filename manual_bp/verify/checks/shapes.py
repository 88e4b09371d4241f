"""Batches of no rows, of one, without a batch dimension, and with two."""

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, CheckContext, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference, first_line

# Around the sizes of blocks, which are powers of two, so that a wrong remainder shows.
_SIZES = (17, 127, 129, 1025)
_SECONDS = 10
_ELEMENTS = 2**24


@check(capability=True, builds_on=SLOPE)
def no_rows(ctx: CheckContext, sample: Sample) -> None:
    """An empty batch gives what the reference gives."""
    _compare_batch(ctx, sample, lambda t, d: t.narrow(d, 0, 0), " of no rows")


@check(capability=True, builds_on=SLOPE)
def one_row(ctx: CheckContext, sample: Sample) -> None:
    """A batch of one sample gives what the reference gives."""
    _compare_batch(ctx, sample, lambda t, d: t.narrow(d, 0, 1), " of one row")


@check(capability=True, builds_on=SLOPE)
def one_dimensional(ctx: CheckContext, sample: Sample) -> None:
    """One sample without a batch dimension gives what the reference gives."""
    where = " of one sample without a batch dimension"
    _compare_batch(ctx, sample, lambda t, d: t.select(d, 0), where)


@check(capability=True, builds_on=SLOPE)
def three_dimensional(ctx: CheckContext, sample: Sample) -> None:
    """Two batch dimensions give what the reference gives."""
    where = " with two batch dimensions"
    _compare_batch(ctx, sample, lambda t, d: torch.stack([t, t.flip(d)], d), where)


@check(capability=True, builds_on=SLOPE)
def sizes(ctx: CheckContext, sample: Sample) -> None:
    """17, 127, 129 and 1025 rows give what the reference gives, as do such sizes in `varying`."""
    if ctx.case.in_dims is None and not ctx.case.varying:
        raise NotApplicable("neither in_dims nor varying was given")
    groups = [dims for dims in (ctx.case.in_dims, *ctx.case.varying) if dims is not None]
    passed: list[str] = []
    failed: dict[str, Mismatch] = {}
    started = time.monotonic()
    for dims, size in product(groups, _SIZES):
        if time.monotonic() - started > _SECONDS:
            ctx.notes.append(f"sizes from {size} on were left out: {_SECONDS} s are over")
            break
        changed = tuple(_tiled(t, d, size) for t, d in zip(sample, dims, strict=True))
        if any(t is None and d is not None for t, d in zip(changed, dims, strict=True)):
            raise NotApplicable("the sample has no rows")
        if sum(t.numel() for t in changed if isinstance(t, Tensor)) > _ELEMENTS:
            ctx.notes.append(f"size {size} was left out: more than {_ELEMENTS} elements")
            continue
        is_rows = dims is ctx.case.in_dims
        what = f"{size} rows" if is_rows else f"size {size} along dimensions {dims}"
        try:
            compare_with_reference(ctx, changed, f" with {what}")
            passed.append(what)
        except Mismatch as mismatch:
            failed[what] = mismatch
            if not ctx.may_go_on():
                break
    if failed:
        sizes_passed = f", right with {', '.join(passed)}" if passed else ""
        first = next(iter(failed.values()))
        raise first.with_evidence(f"wrong with {', '.join(failed)}{sizes_passed}")


def _tiled(value: Any, dim: int | None, size: int) -> Any:
    """An argument repeated along a dimension, and cut to a size; None if there are no rows."""
    if dim is None or not isinstance(value, Tensor):
        return value
    count = value.shape[dim]
    rows = torch.arange(size, device=value.device) % max(count, 1)
    return value.index_select(dim, rows) if count else None


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
