"""The tanh layer: a = tanh(z), with the factor σ'(z) of BP1 and BP2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import _require
from manual_bp.layers._activation import Activation, at_least_tiny, entry_point


def tanh_prime(a: Tensor) -> Tensor:
    """σ'(z), written in terms of a = tanh(z): σ' = 1 − σ². Shape as a.

    As (1 − σ)(1 + σ), because 1 − σ² loses digits where a neuron is saturated.
    """
    return (1 - a) * (1 + a)


class TanhFunction(Function):
    """a = tanh(z), element by element, with its gradient written by hand.

    Backward, from grad_a = ∂C/∂a, the gradient that reaches the activations:

        ∂C/∂z = grad_a * (1 - a) * (1 + a)        ∂C/∂z_xj = ∂C/∂a_xj (1 − a_xj²)

    This is all of BP1 when grad_a = ∇_a C comes from the cost, and the second factor of BP2 when
    grad_a = wᵀδ comes from the linear layer above. For complex tensors σ' is conjugated, as in
    PyTorch.

    Shapes: z, a, grad_a and ∂C/∂z have the same, arbitrary shape.
    Units: elementwise; nothing is summed or averaged.
    Saves: only a, since σ'(z) = 1 − a².
    Errors: none; `tanh` checks the argument.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 and BP2; chapter 3 for tanh.

    Examples:
        >>> z = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> TanhFunction.apply(z).sum().backward()
        >>> z.grad  # σ'(z)
        tensor([1.0000, 0.0707])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """Compute a = tanh(z)."""
        return torch.tanh(z)

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
        return grad_a * tanh_prime(a).conj()  # BP1, BP2: the factor ⊙ σ'(z)

    @staticmethod
    def jvp(ctx: Any, dz: Tensor) -> Tensor:
        """From a tangent dz to da = σ'(z) dz."""
        (a,) = ctx.saved_tensors
        return dz * tanh_prime(a)


def tanh(z: Tensor) -> Tensor:
    """Compute a, the hyperbolic tangent of z: `torch.tanh`, differentiated by hand.

    Args:
        z: Weighted inputs, of any shape; integers become floats, as in `torch.tanh`.

    Returns:
        a, the activations, with the shape of z, each between -1 and 1.

    Raises:
        TypeError: z is not a dense tensor.

    See `TanhFunction` for the gradient.

    Examples:
        >>> tanh(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.7616,  0.0000,  0.7616])
    """
    return _tanh("z", z)


_tanh = entry_point(tanh, TanhFunction, _require.tensor)


class Tanh(Activation, nn.Tanh, function=tanh):
    """`torch.nn.Tanh`, differentiated by hand: identical except for its backward.

    Input and output have the same, arbitrary shape. See `tanh` for the errors raised and
    `TanhFunction` for the gradient.

    Examples:
        >>> Tanh()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.7616,  0.0000,  0.7616])
    """

    slope_bounds = (0.0, 1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Tanh gives it)
        """From weighted inputs z to activations a."""
        return _tanh("input", input)

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) = (1 − a)(1 + a)."""
        return tanh_prime(a)

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) = 4 e^(−2|z|) / (1 + e^(−2|z|))², which does not cancel as 1 − a does; never 0."""
        e = torch.exp(-2 * z.abs())
        return at_least_tiny(4 * e / (1 + e).square())

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """σ and ⊙ σ'(z) in the memory of a."""
        zero = a.new_zeros(())

        def times_sigma_prime_(grad_a: Tensor) -> None:
            # The interpolation x + a (0 − x) is x (1 − a), without rounding x a first.
            grad_a.lerp_(zero, a).lerp_(zero, a.neg_())  # BP1, BP2: the factor ⊙ σ'(z)

        return partial(torch.tanh_, a), times_sigma_prime_
