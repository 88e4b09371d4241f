"""The ReLU layer: a = max(0, z), with the factor σ'(z) of BP1 and BP2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import _require
from manual_bp.layers._activation import Activation, entry_point


class ReLUFunction(Function):
    """a = max(0, z), element by element, with its gradient written by hand.

    Backward, from grad_a = ∂C/∂a, the gradient that reaches the activations:

        ∂C/∂z = grad_a where a > 0, else 0

    This is all of BP1 when grad_a = ∇_a C comes from the cost, and the second factor of BP2 when
    grad_a = wᵀδ comes from the linear layer above: σ'(z) is 1 or 0. It selects instead of
    multiplying, so that an infinite grad_a gives 0 where σ' is 0, as in PyTorch.

    At z = 0, where the slope jumps from 0 to 1, σ'(0) = 0 as in PyTorch.

    Shapes: z, a, grad_a and ∂C/∂z have the same, arbitrary shape.
    Units: elementwise; nothing is summed or averaged.
    Saves: only a, since a > 0 exactly where z > 0. So a may overwrite z.
    Errors: none; `relu` checks the argument.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 and BP2; chapter 3 for the
    rectified linear unit.

    Examples:
        >>> z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> ReLUFunction.apply(z, False).sum().backward()
        >>> z.grad  # σ'(z)
        tensor([0., 0., 1.])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, inplace: bool) -> Tensor:
        """Compute a = max(0, z), in the memory of z if in place."""
        return torch.relu_(z) if inplace else torch.relu(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        """Save a, which is enough for σ'(z)."""
        z, inplace = inputs
        if inplace:
            ctx.mark_dirty(z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None) -> tuple[Tensor | None, None]:
        """From grad_a = ∂C/∂a to ∂C/∂z."""
        if grad_a is None:
            return None, None
        (a,) = ctx.saved_tensors
        return torch.where(a <= 0, 0, grad_a), None  # BP1, BP2: the factor ⊙ σ'(z)

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: None) -> Tensor:
        """From a tangent dz to da = σ'(z) dz."""
        (a,) = ctx.saved_tensors
        return torch.where(a <= 0, 0, dz)


def relu(z: Tensor, inplace: bool = False) -> Tensor:
    """Compute a = max(0, z): `torch.nn.functional.relu`, differentiated by hand.

    Args:
        z: Weighted inputs, of any shape; integers keep their dtype.
        inplace: Whether a overwrites z.

    Returns:
        a, the activations, with the shape of z; z itself if in place.

    Raises:
        TypeError: z is not a dense tensor, or its dtype is complex or bool.

    See `ReLUFunction` for the gradient.

    Examples:
        >>> relu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 0., 1.])
    """
    return _relu("z", z, inplace)


_relu = entry_point(relu, ReLUFunction, _require.ordered, in_place=True)


class ReLU(Activation, nn.ReLU, function=relu):
    """`torch.nn.ReLU`, differentiated by hand: identical except for its backward.

    Args:
        inplace: Whether the output overwrites the input.

    Input and output have the same, arbitrary shape. See `relu` for the errors raised and
    `ReLUFunction` for the gradient.

    Examples:
        >>> ReLU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 0., 1.])
    """

    slope_bounds = (0.0, 1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.ReLU gives it)
        """From weighted inputs z to activations a."""
        return _relu("input", input, self.inplace)

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) = 0 where a is 0, else 1."""
        return torch.ones_like(a).masked_fill(a <= 0, 0)

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) = 1 where z > 0, else 0: a > 0 exactly where z > 0."""
        return self.sigma_prime(z)

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """σ and ⊙ σ'(z) in the memory of a."""

        def times_sigma_prime_(grad_a: Tensor) -> None:
            grad_a.masked_fill_(a <= 0, 0)  # BP1, BP2: the factor ⊙ σ'(z)

        return partial(torch.relu_, a), times_sigma_prime_
