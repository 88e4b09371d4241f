"""The gradient of one parameter over all the layers that use it, from its pairs (a, δ)."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from manual_bp.trace import _per_sample
from manual_bp.trace._call import Pair


class Gradient(NamedTuple):
    """A parameter's gradient, as the pairs (a, δ) of all the layers that use it."""

    parameter: Tensor
    name: str
    is_weight: bool
    pair: Pair
    scale: int

    def per_sample(self) -> Tensor:
        """Every sample's own, (N, *its shape)."""
        a, delta = self.pair
        delta = delta * self.scale  # before the product, which is far larger
        grads = _per_sample.grad_w(a, delta) if self.is_weight else _per_sample.grad_b(delta)
        return grads.to(self.parameter.dtype)

    def norms(self, known: dict[int, Tensor]) -> Tensor:
        """Without the scale; known: the norms of tensors with one row a sample, by their id."""
        a, delta = self.pair
        if a.shape[1] == 1:
            return known[id(delta)] * known[id(a)] if self.is_weight else known[id(delta)]
        return _per_sample.norm_w(a, delta) if self.is_weight else _per_sample.norm_b(delta)

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over samples, each with its weight; weights (N,)."""
        a, delta = self.pair
        if self.is_weight:
            grad = _per_sample.weighted_grad_w(a, delta, weights)
        else:
            grad = _per_sample.weighted_grad_b(delta, weights)
        return grad.to(self.parameter.dtype)


def norms_of(gradients: Sequence[Gradient]) -> Tensor:
    """The norm of each sample's gradient over all of these parameters, (N,), float64."""
    rows = {id(t): t for gradient in gradients for t in gradient.pair if t.shape[1] == 1}
    norms = _per_sample.norms_of_one_row(list(rows.values())) if rows else []
    known = dict(zip(rows, norms, strict=True))
    return reduce(torch.hypot, [g.norms(known) for g in gradients]) * gradients[0].scale
