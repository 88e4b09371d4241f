"""The norm of a gradient, from δ and a where that takes fewer operations, and clipping by it."""

import math
from typing import Any

import torch
from torch import Tensor

# PyTorch's clip_grad_norm_ adds it to the norm.
EPS = 1e-6


def norm_by_gram(delta: Tensor, a_prev: Tensor) -> float | None:
    """‖Σ_x δ_x a_xᵀ‖, whose square is Σ_xx′ (δ_x·δ_x′)(a_x·a_x′).

    This takes two matrices (N, N) instead of the gradient (out, in). The result is None where these
    take more operations, or where it would not be accurate: The terms of one sample, x = x′, are
    the squared norms of its own gradient. If the gradients of the samples cancel each other, their
    other terms cancel these, and what remains is rounding. The limit is a quarter of these terms.
    (Gradients of samples that have nothing in common add up to all of them.)
    """
    (samples, out), columns = delta.shape, a_prev.shape[1]
    if samples * (out + columns) >= out * columns or delta.itemsize < 4:
        return None
    products = torch.mm(delta, delta.mT).mul_(torch.mm(a_prev, a_prev.mT))
    total, own = products.sum().item(), products.diagonal().sum().item()
    limits = torch.finfo(delta.dtype)
    # Not if the terms themselves are out of range either.
    is_accurate = math.isfinite(total) and own > limits.tiny / limits.eps and total > own / 4
    return math.sqrt(total) if is_accurate else None


def norm_of(t: Tensor, *, of_each: bool = False) -> Tensor:
    """The norm of a tensor, shape (), as `clip_grad_norm_` computes it.

    of_each: Whether it is that of each network, in the first dimension.
    """
    dims = tuple(range(1, t.ndim)) if of_each else None
    norm: Tensor = torch.linalg.vector_norm(t, dim=dims, dtype=norm_dtype(t.dtype))
    return norm


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm: float32 for tensors of 16 bits."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def factor(norms: list[Any], max_norm: Any, norm: Tensor, *, reads_values: bool) -> Any:
    """What `clip_grad_norm_` multiplies a gradient by, from the norms of its parts; None for 1.

    This is max_norm / (norm + 1e-6), at most 1, and nan for a norm that is nan.

    Args:
        norms: Tensors or numbers; tensors, if values may not be read. In an ensemble, each holds
            a number for each network, and max_norm may.
        max_norm: What the norm is to be at most, except for rounding.
        norm: Receives the norm.
        reads_values: Whether the values of tensors may be read.
    """
    if reads_values:
        number = math.hypot(*(float(each) for each in norms))
        norm.copy_(torch.tensor(number, dtype=torch.float64))  # fill_ refuses what becomes inf
        found = max_norm / (number + EPS)
        return None if found >= 1 else found
    norm.copy_(torch.linalg.vector_norm(torch.stack(norms), dim=0) if norms else norm.new_zeros(()))
    return torch.clamp(max_norm / (norm + EPS), max=1.0)
