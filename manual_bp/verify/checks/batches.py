"""Transforms over the sample dimension."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import leaves, outputs_of, positions, tensors_of
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, VALUE, CheckContext, check


@check(capability=True, builds_on=VALUE)
def vmap(ctx: CheckContext, sample: Sample) -> None:
    """`vmap` gives the same as a loop over the samples."""
    in_dims = ctx.in_dims(sample)
    batched = torch.func.vmap(ctx.call, in_dims)(*sample)
    rows = [ctx.call(*row) for row in _rows(sample, in_dims)]
    looped = tuple(torch.stack(parts) for parts in zip(*map(tensors_of, rows), strict=True))
    ctx.compare_outputs(batched, looped, " under vmap")


@check(capability=True, builds_on=(*SLOPE, "vmap"))
def per_sample_gradients(ctx: CheckContext, sample: Sample) -> None:
    """`vmap(grad)` gives the same gradient of every sample as a loop."""
    in_dims, places = ctx.in_dims(sample), positions(sample)

    def total(*arguments: Any) -> Tensor:
        outputs = outputs_of(ctx.call(*arguments))
        return torch.stack([t.pow(2).sum().real for t in outputs]).sum()

    derivative = torch.func.grad(total, tuple(places))
    found = torch.func.vmap(derivative, in_dims)(*sample)
    looped = []
    for row in _rows(sample, in_dims):
        arguments = leaves(row)
        wanted = [arguments[i] for i in places]
        looped.append(torch.autograd.grad(total(*arguments), wanted, allow_unused=True))
    for i, one, others in zip(places, found, zip(*looped, strict=True), strict=True):
        expected = torch.stack([torch.zeros_like(one[0]) if g is None else g for g in others])
        ctx.compare(f"per-sample gradient of {ctx.label(i)}", one, expected)


def _rows(sample: Sample, in_dims: tuple[int | None, ...]) -> list[Sample]:
    count = next(t.shape[d] for t, d in zip(sample, in_dims, strict=True) if d is not None)
    return [
        tuple(t if d is None else t.select(d, row) for t, d in zip(sample, in_dims, strict=True))
        for row in range(count)
    ]
