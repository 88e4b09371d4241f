"""Batches of no rows, of one, without a batch dimension, and with two."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import leaves, tensors_of
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable, first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify.checks._shared import compare_with_reference

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
    passed: list[str] = []
    failed: dict[str, Mismatch] = {}
    for what, arguments in _sized(ctx, sample):
        try:
            compare_with_reference(ctx, arguments, f" with {what}")
            passed.append(what)
        except Mismatch as mismatch:
            failed[what] = mismatch
            if not ctx.may_go_on():
                break
    if failed:
        sizes_passed = f", right with {', '.join(passed)}" if passed else ""
        first = next(iter(failed.values()))
        raise first.with_evidence(f"wrong with {', '.join(failed)}{sizes_passed}")


def _sized(ctx: CheckContext, sample: Sample) -> Iterator[tuple[str, Sample]]:
    """The sample in each size for which there are time and memory, and what it is called."""
    ends = time.monotonic() + _SECONDS
    for dims in (ctx.case.in_dims, *ctx.case.varying):
        if dims is None:
            continue
        elements = {k: _elements(ctx, _resized(sample, dims, k)) for k in (17, 34)}
        seconds: dict[int, float] = {}
        for size in _SIZES:
            arguments = _resized(sample, dims, size)
            is_rows = dims is ctx.case.in_dims
            what = f"{size} rows" if is_rows else f"size {size} along dimensions {dims}"
            given = sum(t.numel() for t in tensors_of(arguments))
            power = max(_growth(seconds), _growth(elements))
            if max(given, _foreseen(elements, size, power)) > _ELEMENTS:
                ctx.notes.append(f"{what} left out: more than {_ELEMENTS} elements")
            elif time.monotonic() + _foreseen(seconds, size, power) > ends:
                ctx.notes.append(f"{what} left out: it would take more than {_SECONDS} s")
            else:
                started = time.monotonic()
                yield what, arguments
                seconds[size] = time.monotonic() - started


def _elements(ctx: CheckContext, arguments: Sample) -> int:
    """How many elements the outputs have; 0 if the reference refuses the arguments."""
    try:
        return sum(t.numel() for t in tensors_of(ctx.reference(*leaves(arguments, ()))))
    except Exception:
        return 0


def _growth(measured: Mapping[int, float]) -> float:
    """With which power of the size a cost grows, but at least with the first."""
    known = {size: cost for size, cost in measured.items() if cost}
    if len(known) < 2:
        return 1.0
    (least, first), (most, last) = min(known.items()), max(known.items())
    return max(1.0, math.log(last / first) / math.log(most / least))


def _foreseen(measured: Mapping[int, float], size: int, power: float) -> float:
    """What a size will cost, from the largest one that was measured; 0 if none was."""
    most, last = max(measured.items(), default=(1, 0.0))
    return float(last * (size / most) ** power)


def _resized(sample: Sample, dims: Sequence[int | None], size: int) -> Sample:
    """The sample with another size along some dimensions."""
    resized = tuple(_tiled(t, d, size) for t, d in zip(sample, dims, strict=True))
    if any(t is None and d is not None for t, d in zip(resized, dims, strict=True)):
        raise NotApplicable("the sample has no rows")
    return resized


def _tiled(value: Any, dim: int | None, size: int) -> Any:
    """An argument repeated along a dimension, and cut to a size; None if there are no rows."""
    if dim is None or not isinstance(value, Tensor):
        return value
    count = value.shape[dim] if -value.ndim <= dim < value.ndim else 0
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
