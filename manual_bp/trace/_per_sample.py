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

# How many numbers a norm may hold at any one time, some samples after others: 32 MB in float32.
CHUNK = 2**23
# How much smaller than the sum of its terms' magnitudes the sum in Gram's form may be: a hundred
# times leaves float32 five digits of the norm.
CANCELLED = 100


def grad_w(a: Tensor, delta: Tensor) -> Tensor:
    """∂C/∂w of every sample, (N, out, in)."""
    return delta.mT @ a.conj()  # BP4, sample by sample


def grad_b(delta: Tensor) -> Tensor:
    """∂C/∂b of every sample, (N, out)."""
    return delta.sum(1)  # BP3, sample by sample


def weighted_grad_w(a: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Σ_x weight_x ∂C/∂w of sample x, (out, in): one matrix product."""
    weighted = delta * weights[:, None, None]
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
    delta, scales = _to_order_one(delta)
    return norms(grad_b(delta), 1) * scales


def norm_w(a: Tensor, delta: Tensor) -> Tensor:
    """‖∂C/∂w‖ of every sample, (N,); the gradients of all samples are never there at once."""
    delta, scales = _to_order_one(delta)
    rows = a.shape[1]
    if rows == 1:
        return norms(delta[:, 0], 1) * scales * norms(a[:, 0], 1)
    norm = _gram_norm if gram_is_cheaper(rows, a.shape[2], delta.shape[2]) else _direct_norm
    return norm(a, delta).double() * scales


def gram_is_cheaper(rows: int, in_features: int, out_features: int) -> bool:
    """Whether Gram's form takes fewer multiplications than the gradient itself."""
    return rows * (in_features + out_features) <= in_features * out_features


def _gram_norm(a: Tensor, delta: Tensor) -> Tensor:
    return _by_chunks(_gram_norm_at_once, a, delta, 2 * a.shape[1] ** 2)


def _direct_norm(a: Tensor, delta: Tensor) -> Tensor:
    return _by_chunks(_direct_norm_at_once, a, delta, a.shape[2] * delta.shape[2])


def _gram_norm_at_once(a: Tensor, delta: Tensor) -> Tensor:
    products = ((delta @ delta.mH) * (a @ a.mH).conj()).real
    squares = products.sum((1, 2), dtype=torch.float64)
    found = squares.clamp(min=0).sqrt().to(products.dtype)
    # Where rows cancel, what is left of the squares is mostly rounding.
    is_lost = squares < products.abs().sum((1, 2), dtype=torch.float64) / CANCELLED
    if is_lost.any():
        found[is_lost] = _direct_norm(a[is_lost], delta[is_lost])
    return found


def _direct_norm_at_once(a: Tensor, delta: Tensor) -> Tensor:
    return norms(grad_w(a, delta), (1, 2))


def _by_chunks(
    norm: Callable[[Tensor, Tensor], Tensor], a: Tensor, delta: Tensor, numbers: int
) -> Tensor:
    """The norms of some samples after others; numbers is how many each sample takes meanwhile."""
    chunk = max(1, CHUNK // max(1, numbers))
    parts = zip(torch.split(a, chunk), torch.split(delta, chunk), strict=True)
    return torch.cat([norm(*part) for part in parts])


def _to_order_one(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's δ over its largest magnitude, and those: squares neither vanish nor overflow.

    Where that magnitude is 0 or not finite, the sample's δ is left as it is.
    """
    if not delta.numel():
        return delta, torch.ones(len(delta), dtype=torch.float64, device=delta.device)
    largest = delta.abs().amax((1, 2))
    scales = torch.where((largest > 0) & (largest < torch.inf), largest, 1)
    return delta / scales[:, None, None], scales.double()
