"""Many calls at once."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._bench import Bench, leaves, outputs_of, positions, tensors_of
from manual_bp.verify._case import Sample


def vmap(bench: Bench) -> None:
    """Under vmap as in a loop over the samples."""
    in_dims = bench.in_dims
    for sample in bench.with_rows():
        batched = torch.func.vmap(bench.case.call, in_dims)(*sample)
        rows = [bench.case.call(*row) for row in _rows(sample, in_dims)]
        looped = tuple(torch.stack(parts) for parts in zip(*map(tensors_of, rows), strict=True))
        bench.same_outputs(batched, looped, " under vmap")


def per_sample_gradients(bench: Bench) -> None:
    """The gradient of every sample by vmap(grad), as in a loop."""
    in_dims = bench.in_dims
    for sample in bench.with_rows():
        places = positions(sample)

        def total(*arguments: Any) -> Tensor:
            return torch.stack(
                [t.pow(2).sum().real for t in outputs_of(bench.case.call(*arguments))]
            ).sum()

        derivative = torch.func.grad(total, tuple(places))
        found = torch.func.vmap(derivative, in_dims)(*sample)
        looped = []
        for row in _rows(sample, in_dims):
            arguments = leaves(row)
            wanted = [arguments[i] for i in places]
            looped.append(torch.autograd.grad(total(*arguments), wanted, allow_unused=True))
        for i, one, others in zip(places, found, zip(*looped, strict=True), strict=True):
            expected = torch.stack([torch.zeros_like(one[0]) if g is None else g for g in others])
            bench.same(f"per-sample gradient of {bench.case.label(i)}", one, expected)


def _rows(sample: Sample, in_dims: tuple[int | None, ...]) -> list[Sample]:
    count = next(t.shape[d] for t, d in zip(sample, in_dims, strict=True) if d is not None)
    return [
        tuple(t if d is None else t.select(d, row) for t, d in zip(sample, in_dims, strict=True))
        for row in range(count)
    ]
