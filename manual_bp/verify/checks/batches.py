"""Transforms over the sample dimension."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import leaves, outputs_of, positions, tensors_of
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._check import SLOPE, VALUE, CheckContext, check

Dims = tuple[int | None, ...]


@check(capability=True, builds_on=VALUE)
def vmap(ctx: CheckContext, sample: Sample) -> None:
    """`vmap` gives the same as a loop, for any batch dimension, any argument alone, and nested."""
    in_dims = ctx.in_dims(sample)
    for arguments, dims, where in ((sample, in_dims, ""), *_last(sample, in_dims)):
        batched = torch.func.vmap(ctx.call, dims)(*arguments)
        ctx.compare_outputs(batched, _looped(ctx.call, arguments, dims), f" under vmap{where}")
    for arguments, dims, where in _alone(ctx, sample, in_dims):
        try:
            batched = torch.func.vmap(ctx.call, dims)(*arguments)
        except Exception:
            continue  # a rule need not cover every set of batched arguments
        ctx.compare_outputs(batched, _looped(ctx.call, arguments, dims), f" under vmap{where}")
    _compare_nested(ctx, sample, in_dims)


@check(capability=True, builds_on=(*SLOPE, "vmap"))
def per_sample_gradients(ctx: CheckContext, sample: Sample) -> None:
    """`vmap(grad)` gives the same gradient of every sample as a loop, for any batch dimension."""
    in_dims, places = ctx.in_dims(sample), positions(sample)

    def total(*arguments: Any) -> Tensor:
        outputs = outputs_of(ctx.call(*arguments))
        return torch.stack([t.pow(2).sum().real for t in outputs]).sum()

    derivative = torch.func.grad(total, tuple(places))
    looped = []
    for row in _rows(sample, in_dims):
        arguments = leaves(row)
        wanted = [arguments[i] for i in places]
        looped.append(torch.autograd.grad(total(*arguments), wanted, allow_unused=True))
    for batch, dims, where in ((sample, in_dims, ""), *_last(sample, in_dims)):
        found = torch.func.vmap(derivative, dims)(*batch)
        for i, one, others in zip(places, found, zip(*looped, strict=True), strict=True):
            expected = torch.stack([torch.zeros_like(one[0]) if g is None else g for g in others])
            ctx.compare(f"per-sample gradient of {ctx.label(i)}{where}", one, expected)


def _last(sample: Sample, in_dims: Dims) -> Iterator[tuple[Sample, Dims, str]]:
    """The sample with its batch as the last dimension of each argument."""
    if any(d is not None and t.ndim > 1 for t, d in zip(sample, in_dims, strict=True)):
        moved = [t if d is None else t.movedim(d, -1) for t, d in zip(sample, in_dims, strict=True)]
        dims = [None if d is None else t.ndim - 1 for t, d in zip(sample, in_dims, strict=True)]
        yield tuple(moved), tuple(dims), " with the batch last"


def _alone(ctx: CheckContext, sample: Sample, in_dims: Dims) -> Iterator[tuple[Sample, Dims, str]]:
    """Batches of one argument only, even if it is one that has none in the sample."""
    row = _rows(sample, in_dims)[0]
    places = [i for i, t in enumerate(sample) if is_differentiable(t)]
    if len(places) < 2:
        return
    for i in places:
        d = in_dims[i]
        batch = sample[i]
        if d is None:
            other = ctx.in_domain((*sample[:i], ctx.random_like(batch), *sample[i + 1 :]))
            batch = torch.stack([batch, other[i]])
        dims = tuple((d or 0) if j == i else None for j in range(len(sample)))
        yield (*row[:i], batch, *row[i + 1 :]), dims, f" over {ctx.label(i)} alone"


def _compare_nested(ctx: CheckContext, sample: Sample, in_dims: Dims) -> None:
    """Compare two nested vmaps with a loop over one."""
    outer = tuple(None if d is None else 0 for d in in_dims)
    pairs = list(zip(sample, in_dims, strict=True))
    flipped = ctx.in_domain(tuple(t if d is None else t.flip(d) for t, d in pairs))
    both = tuple(
        t if d is None else torch.stack([t, other])
        for (t, d), other in zip(pairs, flipped, strict=True)
    )
    inner = torch.func.vmap(ctx.call, in_dims)
    try:
        nested = torch.func.vmap(inner, outer)(*both)
    except Exception:
        return  # a rule need not be nestable
    ctx.compare_outputs(nested, _looped(inner, both, outer), " under two nested vmaps")


def _looped(call: Call, sample: Sample, in_dims: Dims) -> tuple[Tensor, ...]:
    rows = [tensors_of(call(*row)) for row in _rows(sample, in_dims)]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _rows(sample: Sample, in_dims: Dims) -> list[Sample]:
    count = next(t.shape[d] for t, d in zip(sample, in_dims, strict=True) if d is not None)
    return [
        tuple(t if d is None else t.select(d, row) for t, d in zip(sample, in_dims, strict=True))
        for row in range(count)
    ]
