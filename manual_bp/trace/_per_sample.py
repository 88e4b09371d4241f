"""Every sample's own gradient, and its norm, from the pairs (a, δ): BP3 and BP4 before the sum.

For one sample x of T rows (T = 1 where a sample is one row):

    ∂C/∂b  = Σ_t δ_xt                    BP3
    ∂C/∂w  = Σ_t δ_xt a_xtᵀ              BP4

and their norms, without making the gradient itself:

    ‖∂C/∂w‖ = ‖δ_x‖ ‖a_x‖                                     where T = 1
    ‖∂C/∂w‖² = Σ_tt' (δ_xt · δ_xt') (a_xt · a_xt')            Gram's form

The first is Goodfellow's (Efficient Per-Example Gradient Computations, 2015); the second follows
from ‖Σ_t δ_t a_tᵀ‖² = Σ_tt' ⟨δ_t a_tᵀ, δ_t' a_t'ᵀ⟩, and ⟨δ aᵀ, δ' a'ᵀ⟩ = (δ·δ')(a·a').

Here a is (N, T, in) and δ (N, T, out). Norms come as float64: their squares would leave the range
of float32 where errors vanish.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp._function import without_autocast

Norm = Callable[[Tensor, Tensor], Tensor]

# How many numbers a norm may hold at any one time, some samples after others: 32 MB in float32.
CHUNK = 2**23
# How much smaller than the sum of its terms' magnitudes the sum in Gram's form may be: a hundred
# times leaves float32 five digits of the norm.
CANCELLED = 100
# The norms that are trusted: the squares of much smaller or larger numbers are not float32's.
SMALL, LARGE = 1e-15, 1e15


def grad_w(a: Tensor, delta: Tensor) -> Tensor:
    """∂C/∂w of every sample, (N, out, in)."""
    with without_autocast(a):
        return delta.mT @ a.conj()  # BP4, sample by sample


def grad_b(delta: Tensor) -> Tensor:
    """∂C/∂b of every sample, (N, out)."""
    return delta.sum(1) if delta.shape[1] != 1 else delta[:, 0]  # BP3, sample by sample


def weighted_grad_w(a: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Σ_x weight_x ∂C/∂w of sample x, (out, in): one matrix product."""
    weighted = delta * weights[:, None, None]
    with without_autocast(a):
        return weighted.flatten(0, 1).mT @ a.flatten(0, 1).conj()  # BP4, each sample weighted


def weighted_grad_b(delta: Tensor, weights: Tensor) -> Tensor:
    """Σ_x weight_x ∂C/∂b of sample x, (out,)."""
    return (delta * weights[:, None, None]).sum((0, 1))  # BP3, each sample weighted


def norms(t: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The Euclidean norms over some dimensions."""
    found: Tensor = torch.linalg.vector_norm(t, dim=dims)
    return found


def norm_b(delta: Tensor) -> Tensor:
    """‖∂C/∂b‖ of every sample, (N,)."""
    return _in_range(lambda delta, _: norms(grad_b(delta), 1), delta, delta)


def norm_w(a: Tensor, delta: Tensor, delta_norm: Tensor | None = None) -> Tensor:
    """‖∂C/∂w‖ of every sample, (N,); of few gradients at once. delta_norm is ‖δ‖, where known."""
    if a.shape[1] == 1:
        return (norm_b(delta) if delta_norm is None else delta_norm) * norm_b(a)
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
    # Where rows cancel, what is left of the squares is mostly rounding.
    is_lost = squares < products.abs().sum((1, 2), dtype=torch.float64) / CANCELLED
    if is_lost.any():
        found[is_lost] = _direct_norm(a[is_lost], delta[is_lost])
    return found


def _direct_norm_at_once(a: Tensor, delta: Tensor) -> Tensor:
    return norms(grad_w(a, delta), (1, 2))


def _by_chunks(norm: Norm, a: Tensor, delta: Tensor, numbers: int) -> Tensor:
    """The norms of some samples after others; numbers is how many each sample takes meanwhile."""
    chunk = max(1, CHUNK // max(1, numbers))
    parts = zip(torch.split(a, chunk), torch.split(delta, chunk), strict=True)
    return torch.cat([norm(*part) for part in parts])


def _in_range(norm: Norm, a: Tensor, delta: Tensor) -> Tensor:
    """The norms as float64; computed in it, too, where squares leave the range of float32."""
    found = norm(a, delta).double()
    is_out = found.clamp(SMALL, LARGE) != found  # nan is out, too
    if a.shape[1] > 1:  # of the product of both, one alone may be out of range
        for t in (a, delta):
            is_out |= t.abs().amax((1, 2)) < SMALL
    if is_out.any():
        found[is_out] = norm(_double(a[is_out]), _double(delta[is_out]))
    return found


def _double(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float64))
