"""The leaky ReLU: a = z, or s z with a small slope s below 0, with σ'(z) for BP1 and BP2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import _require
from manual_bp.layers._activation import Activation, entry_point


class LeakyReLUFunction(Function):
    """a = z where z > 0, else s z, with its gradient written by hand; s is negative_slope.

    Backward, from grad_a = ∂C/∂a, the gradient that reaches the activations:

        ∂C/∂z = grad_a * (1 where z > 0, else s)

    This is all of BP1 when grad_a = ∇_a C comes from the cost, and the second factor of BP2 when
    grad_a = wᵀδ comes from the linear layer above.

    At z = 0, where the slope jumps from s to 1, σ'(0) = s as in PyTorch.

    Shapes: z, a, grad_a and ∂C/∂z have the same, arbitrary shape.
    Units: elementwise; nothing is summed or averaged.
    Saves: z, as PyTorch does, so that a may be changed in place afterwards. In place, where z is
    overwritten, a: for s ≥ 0, a > 0 exactly where z > 0.
    Errors: none; `leaky_relu` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 and BP2; Maas, Hannun and Ng,
    Rectifier Nonlinearities Improve Neural Network Acoustic Models, for the slope below 0.

    Examples:
        >>> z = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> LeakyReLUFunction.apply(z, 0.1, False).sum().backward()
        >>> z.grad  # σ'(z)
        tensor([0.1000, 1.0000])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, negative_slope: float, inplace: bool) -> Tensor:
        """Compute a, in the memory of z if in place."""
        return F.leaky_relu(z, negative_slope, inplace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        """Save z, or a if it overwrote z: the sign of either determines σ'(z)."""
        z, ctx.negative_slope, inplace = inputs
        if inplace:
            ctx.mark_dirty(z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output if inplace else z)
        ctx.save_for_forward(output if inplace else z)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None) -> tuple[Tensor | None, None, None]:
        """From grad_a = ∂C/∂a to ∂C/∂z."""
        if grad_a is None:
            return None, None, None
        (z,) = ctx.saved_tensors
        # Not grad_a times a tensor of slopes, which would round s to a low dtype first.
        grad_z = torch.where(z > 0, grad_a, grad_a * ctx.negative_slope)  # BP1, BP2: ⊙ σ'(z)
        return grad_z, None, None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: None, __: None) -> Tensor:
        """From a tangent dz to da = σ'(z) dz."""
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, dz, dz * ctx.negative_slope)


def leaky_relu(z: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Compute a = z where z > 0, else s z: `torch.nn.functional.leaky_relu`, by hand.

    Args:
        z: Weighted inputs, of any shape.
        negative_slope: s, the slope where z < 0; at least 0, because otherwise the sign of a would
            not determine that of z, nor a σ'(z).
        inplace: Whether a overwrites z.

    Returns:
        a, the activations, with the shape of z; z itself if in place.

    Raises:
        TypeError: z is not a dense real floating-point tensor, or negative_slope is not a number.
        ValueError: negative_slope is below 0.

    See `LeakyReLUFunction` for the gradient.

    Examples:
        >>> leaky_relu(torch.tensor([-1.0, 0.0, 1.0]), 0.1)
        tensor([-0.1000,  0.0000,  1.0000])
    """
    return _leaky_relu("z", z, negative_slope, inplace)


def _check_options(negative_slope: float, _: bool) -> None:
    _require.at_least("negative_slope", negative_slope, 0)


_leaky_relu = entry_point(
    leaky_relu, LeakyReLUFunction, _require.real, _check_options, in_place=True
)


class LeakyReLU(Activation, nn.LeakyReLU, function=leaky_relu):
    """`torch.nn.LeakyReLU`, differentiated by hand: identical except for its backward.

    Args:
        negative_slope: s, the slope where z < 0; at least 0.
        inplace: Whether the output overwrites the input.

    Raises:
        TypeError: negative_slope is not a number.
        ValueError: negative_slope is below 0.

    Input and output have the same, arbitrary shape. See `leaky_relu` for the errors raised and
    `LeakyReLUFunction` for the gradient.

    Examples:
        >>> LeakyReLU(0.1)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1000,  0.0000,  1.0000])
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__(negative_slope, inplace)
        self.require_options()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.LeakyReLU gives it)
        """From weighted inputs z to activations a."""
        return _leaky_relu("input", input, self.negative_slope, self.inplace)

    def require_options(self) -> None:
        """Raise an error unless negative_slope is a number of at least 0."""
        _check_options(self.negative_slope, self.inplace)

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) = 1 where a > 0, else s."""
        return torch.full_like(a, self.negative_slope).masked_fill(a > 0, 1)

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) = 1 where z > 0, else s: a > 0 exactly where z > 0."""
        return self.sigma_prime(z)

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """σ and ⊙ σ'(z) in the memory of a."""
        self.require_options()
        slope = self.negative_slope

        def times_sigma_prime_(grad_a: Tensor) -> None:
            is_off = a <= 0
            torch.mul(grad_a, slope, out=a)
            torch.where(is_off, a, grad_a, out=grad_a)  # BP1, BP2: the factor ⊙ σ'(z)

        return partial(F.leaky_relu_, a, slope), times_sigma_prime_

    @property
    def slope_bounds(self) -> tuple[float, float]:
        """1 and s, the smaller first."""
        return min(1.0, self.negative_slope), max(1.0, self.negative_slope)
