"""The sigmoid layer: a = σ(z), with the factor σ'(z) of BP1 and BP2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import _require
from manual_bp.layers._activation import Activation, at_least_tiny, entry_point


def sigmoid_prime(a: Tensor) -> Tensor:
    """σ'(z), written in terms of a = σ(z): σ' = σ (1 − σ). Shape as a."""
    return a * (1 - a)


class SigmoidFunction(Function):
    """a = σ(z) = 1 / (1 + e^(−z)), element by element, with its gradient written by hand.

    Backward, from grad_a = ∂C/∂a, the gradient that reaches the activations:

        ∂C/∂z = grad_a * a * (1 - a)        ∂C/∂z_xj = ∂C/∂a_xj σ'(z_xj)

    This is all of BP1 when grad_a = ∇_a C comes from the cost, and the second factor of BP2 when
    grad_a = wᵀδ comes from the linear layer above. For complex tensors σ' is conjugated, as in
    PyTorch.

    Shapes: z, a, grad_a and ∂C/∂z have the same, arbitrary shape.
    Units: elementwise; nothing is summed or averaged.
    Saves: only a, since σ'(z) = a (1 − a).
    Errors: none; `sigmoid` checks the argument.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 and BP2; chapter 1 for σ'.

    Examples:
        >>> z = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> SigmoidFunction.apply(z).sum().backward()
        >>> z.grad  # σ'(z)
        tensor([0.2500, 0.1050])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """Compute a = σ(z)."""
        return torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save a, which is enough for σ'(z)."""
        del inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None) -> Tensor | None:
        """From grad_a = ∂C/∂a to ∂C/∂z."""
        if grad_a is None:
            return None
        (a,) = ctx.saved_tensors
        return grad_a * sigmoid_prime(a).conj()  # BP1, BP2: the factor ⊙ σ'(z)

    @staticmethod
    def jvp(ctx: Any, dz: Tensor) -> Tensor:
        """From a tangent dz to da = σ'(z) dz."""
        (a,) = ctx.saved_tensors
        return dz * sigmoid_prime(a)


def sigmoid(z: Tensor) -> Tensor:
    """Compute a = σ(z): `torch.sigmoid`, differentiated by hand.

    Args:
        z: Weighted inputs, of any shape; integers become floats, as in `torch.sigmoid`.

    Returns:
        a, the activations, with the shape of z, each between 0 and 1.

    Raises:
        TypeError: z is not a dense tensor.

    See `SigmoidFunction` for the gradient.

    Examples:
        >>> sigmoid(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2689, 0.5000, 0.7311])
    """
    return _sigmoid("z", z)


_sigmoid = entry_point(sigmoid, SigmoidFunction, _require.tensor)


class Sigmoid(Activation, nn.Sigmoid, function=sigmoid):
    """`torch.nn.Sigmoid`, differentiated by hand: identical except for its backward.

    Input and output have the same, arbitrary shape. See `sigmoid` for the errors raised and
    `SigmoidFunction` for the gradient.

    Examples:
        >>> Sigmoid()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2689, 0.5000, 0.7311])
    """

    slope_bounds = (0.0, 0.25)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Sigmoid gives it)
        """From weighted inputs z to activations a."""
        return _sigmoid("input", input)

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) = a (1 − a)."""
        return sigmoid_prime(a)

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) = e^(−|z|) / (1 + e^(−|z|))², which does not cancel as 1 − a does; never 0."""
        e = torch.exp(-z.abs())
        return at_least_tiny(e / (1 + e).square())

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """σ and ⊙ σ'(z) in the memory of a."""
        zero = a.new_zeros(())

        def times_sigma_prime_(grad_a: Tensor) -> None:
            # The interpolation x + a (0 − x) is x (1 − a), without rounding x a first.
            grad_a.mul_(a).lerp_(zero, a)  # BP1, BP2: the factor ⊙ σ'(z)

        return partial(torch.sigmoid_, a), times_sigma_prime_
