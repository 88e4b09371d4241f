"""Every sample's own gradient, and its norm, from the pairs (a, δ): BP3 and BP4 before the sum.

For one sample x of T rows (T = 1 where a sample is one row):

    ∂C/∂b  = Σ_t δ_xt                    BP3
    ∂C/∂w  = Σ_t δ_xt a_xtᵀ              BP4

and their norms, without computing the gradient itself:

    ‖∂C/∂w‖ = ‖δ_x‖ ‖a_x‖                                     where T = 1
    ‖∂C/∂w‖² = Σ_tt' (δ_xt · δ_xt') (a_xt · a_xt')            Gram's form

The first is due to Goodfellow (Efficient Per-Example Gradient Computations, 2015); the second
follows from ‖Σ_t δ_t a_tᵀ‖² = Σ_tt' ⟨δ_t a_tᵀ, δ_t' a_t'ᵀ⟩, and ⟨δ aᵀ, δ' a'ᵀ⟩ = (δ·δ')(a·a').

Here a is (N, T, in) and δ (N, T, out). Norms are float64. A norm is the root of a sum of squares,
which leave the range of a dtype long before the norm does: beyond 1e±19 in float32, 1e±154 in
float64. If they do, the norm is computed from numbers divided by the largest of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from manual_bp._autocast import without_autocast

Norm = Callable[..., Tensor]

# The most numbers that the computation of norms may hold at once: 32 MB in float32.
CHUNK = 2**23
# How many times smaller than the sum of its terms' magnitudes the sum in Gram's form may be. A
# hundred times leaves float32 five digits of the norm.
CANCELLED = 100


def grad_w(a: Tensor, delta: Tensor) -> Tensor:
    """∂C/∂w of every sample, (N, out, in)."""
    with without_autocast(a):
        return delta.mT @ a.conj()  # BP4, sample by sample


def grad_b(delta: Tensor) -> Tensor:
    """∂C/∂b of every sample, (N, out)."""
    return delta.sum(1) if delta.shape[1] != 1 else delta[:, 0]  # BP3, sample by sample


def weighted_grad_w(a: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Σ_x weight_x ∂C/∂w of sample x, (out, in): one matrix product."""
    weights = weights[:, None, None]
    largest = _largest(delta, 2)
    if ((largest > 0) & (largest * weights < _least(delta.dtype))).any():
        # weight · δ is too small for the dtype, though its product with a large a may not be. So
        # each row of a is divided by its size, and that of δ multiplied by it.
        size = _divisor(_largest(a, 2))
        a, weights = (a / size).to(a.dtype), weights * size
    with without_autocast(a):
        # BP4, each sample weighted
        return _weighted(delta, weights).flatten(0, 1).mT @ a.flatten(0, 1).conj()


def weighted_grad_b(delta: Tensor, weights: Tensor) -> Tensor:
    """Σ_x weight_x ∂C/∂b of sample x, (out,)."""
    return _weighted(delta, weights[:, None, None]).sum((0, 1))  # BP3, each sample weighted


def _weighted(delta: Tensor, weights: Tensor) -> Tensor:
    if (weights < _least(delta.dtype)).any():  # they might be rounded to 0 in delta's dtype
        return (delta * weights).to(delta.dtype)
    return delta * weights.to(delta.dtype.to_real())


def norm_of(t: Tensor) -> float:
    """The Euclidean norm of all numbers of a tensor, in double precision."""
    t = t.double().reshape(1, 1, -1)
    found = _norm_of_all(t)
    is_in_range = _least(t.dtype) < found.item() < 1 / _least(t.dtype)
    return (found if is_in_range or not t.numel() else _scaled(_norm_of_all, t)).item()


def _norm_of_all(t: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(t)
    return found.reshape(1)


def norm_b(delta: Tensor) -> Tensor:
    """‖∂C/∂b‖ of every sample, (N,)."""
    return _in_range(lambda delta: torch.linalg.vector_norm(grad_b(delta), dim=1), delta)


def norms_of_one_row(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norms of tensors (N, 1, k), each (N,), with a single check of the range of all.

    On an accelerator, each check waits until everything before it has run.
    """
    found = [torch.linalg.vector_norm(t, dim=(1, 2)).double() for t in tensors]
    if _all_in_range(found, max([_least(t.dtype) for t in tensors])):
        return found
    return [norm_b(t) for t in tensors]


def norm_w(a: Tensor, delta: Tensor) -> Tensor:
    """‖∂C/∂w‖ of every sample, (N,), a chunk of samples at a time."""
    if a.shape[1] == 1:
        return norm_b(delta) * norm_b(a)
    is_gram = gram_is_cheaper(a.shape[1], a.shape[2], delta.shape[2])
    return _in_range(_gram_norm if is_gram else _direct_norm, a, delta)


def gram_is_cheaper(rows: int, in_features: int, out_features: int) -> bool:
    """Whether Gram's form takes fewer multiplications than the gradient itself."""
    return rows * (in_features + out_features) <= in_features * out_features


def _gram_norm(a: Tensor, delta: Tensor) -> Tensor:
    return _by_chunks(_gram_norm_at_once, a, delta, 2 * a.shape[1] ** 2)


def _direct_norm(a: Tensor, delta: Tensor) -> Tensor:
    return _by_chunks(_direct_norm_at_once, a, delta, a.shape[2] * delta.shape[2])


def _gram_norm_at_once(a: Tensor, delta: Tensor) -> Tensor:
    with without_autocast(a):
        products = ((delta @ delta.mH) * (a @ a.mH).conj()).real
    squares = products.sum((1, 2), dtype=torch.float64)
    found = squares.sqrt().to(products.dtype)
    # If rows cancel, most of what is left is rounding error.
    is_lost = squares < products.abs().sum((1, 2), dtype=torch.float64) / CANCELLED
    if is_lost.any():
        found[is_lost] = _direct_norm(a[is_lost], delta[is_lost])
    return found


def _direct_norm_at_once(a: Tensor, delta: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(grad_w(a, delta), dim=(1, 2))
    return found


def _by_chunks(norm: Norm, a: Tensor, delta: Tensor, numbers: int) -> Tensor:
    """The norms, a chunk of samples at a time; numbers is how many each sample takes meanwhile."""
    chunk = max(1, CHUNK // max(1, numbers))
    parts = zip(torch.split(a, chunk), torch.split(delta, chunk), strict=True)
    return torch.cat([norm(*part) for part in parts])


def _in_range(norm: Norm, *factors: Tensor) -> Tensor:
    """The norms as float64, from scaled numbers where squares leave the range of the dtype.

    norm: A function of the factors, δ alone or a and δ, that is proportional to each of them.
    """
    if not all(t.numel() for t in factors):  # the norm of nothing
        return factors[0].new_zeros(len(factors[0]), dtype=torch.float64)
    found = norm(*factors).double()
    least = _least(factors[0].dtype)
    is_out = found.clamp(least, 1 / least) != found  # nan is out, too
    if len(factors) > 1 and not _all_in_range([_row_norms(t) for t in factors], least):
        # Their product may be in range when one of them is not. Rows that add nothing don't count.
        a, delta = (_largest(t, 2)[..., 0] for t in factors)
        counts = a * delta > torch.finfo(factors[0].dtype).eps * found[:, None]
        is_out |= (counts & (torch.minimum(a, delta) < least)).any(1)
    if is_out.any():
        found[is_out] = _scaled(norm, *(t[is_out] for t in factors))
    return found


def _row_norms(t: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(t, dim=2)
    return found


def _all_in_range(norms: Sequence[Tensor], least: float) -> bool:
    """Whether the squares of all of them are in the range of the dtype."""
    found = torch.stack([*norms])
    return torch.equal(found.clamp(least, 1 / least), found)


def _scaled(norm: Norm, *factors: Tensor) -> Tensor:
    """The norms, with each row of a, and the δ of each sample, divided by its largest number."""
    *maybe_a, delta = (_double(t) for t in factors)
    if maybe_a:
        size = _divisor(_largest(maybe_a[0], 2))
        maybe_a, delta = [maybe_a[0] / size], delta * size
    size = _divisor(_largest(delta, (1, 2)))
    return norm(*maybe_a, delta / size) * size.flatten()


def _largest(t: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The largest magnitudes over dims, which are kept, as float64; 0 if there are no numbers."""
    magnitudes = t.abs()  # vector_norm(t, inf) takes 70 times as long on a CPU
    reduce = magnitudes.amax if t.numel() else magnitudes.sum
    return reduce(dims, keepdim=True).double()


def _divisor(size: Tensor) -> Tensor:
    """The size, or the nearest number to it that is neither 0 nor infinite, to divide by."""
    limits = torch.finfo(size.dtype)
    return size.clamp(limits.tiny, limits.max)


@cache
def _least(dtype: torch.dtype) -> float:
    """The smallest norm whose square is accurate; the largest is its reciprocal."""
    limits = torch.finfo(dtype)
    return math.sqrt(limits.tiny / limits.eps)


def _double(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float64))
