"""The softplus layer: a = ln(1 + e^z), with the factor σ'(z) of BP1 and BP2."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import _require
from manual_bp.layers._activation import Activation, at_least_tiny, entry_point

# Above a threshold of at least 20, ln(1 + e^t) differs from t by at most 2e-9, so a determines on
# which side of the threshold z was. For a lower threshold, some a come from both sides.
TELLING_THRESHOLD = 20.0


def softplus_prime_from_z(z: Tensor, beta: float, threshold: float) -> Tensor:
    """σ'(z) = 1 / (1 + e^(−β z)), and 1 where a = z. Shape as z."""
    t = beta * z.to(torch.promote_types(z.dtype, torch.float32))  # PyTorch compares in this dtype
    return torch.where(t > threshold, 1, torch.sigmoid(t)).to(z.dtype)


class SoftplusFunction(Function):
    """a = ln(1 + e^(β z)) / β, and a = z where β z > threshold; its gradient is written by hand.

    Backward, from grad_a = ∂C/∂a, the gradient that reaches the activations:

        ∂C/∂z = grad_a / (1 + exp(-β z))        and grad_a where β z > threshold

    since σ'(z) = e^(βz) / (1 + e^(βz)) = 1 / (1 + e^(−βz)), the sigmoid of β z.
    This is all of BP1 when grad_a = ∇_a C comes from the cost, and the second factor of BP2 when
    grad_a = wᵀδ comes from the linear layer above.

    Shapes: z, a, grad_a and ∂C/∂z have the same, arbitrary shape.
    Units: elementwise; nothing is summed or averaged.
    Saves: z, as PyTorch does, so that a may be changed in place afterwards.
    Errors: none; `softplus` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 and BP2; Dugas et al.,
    Incorporating Second-Order Functional Knowledge for Better Option Pricing, for softplus.

    Examples:
        >>> z = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> SoftplusFunction.apply(z, 1.0, 20.0).sum().backward()
        >>> z.grad  # σ'(z), the sigmoid of z
        tensor([0.5000, 0.8808])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, beta: float, threshold: float) -> Tensor:
        """Compute a = ln(1 + e^(β z)) / β."""
        return F.softplus(z, beta, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Any) -> None:
        """Save z."""
        del output
        z, ctx.beta, ctx.threshold = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None) -> tuple[Tensor | None, None, None]:
        """From grad_a = ∂C/∂a to ∂C/∂z."""
        if grad_a is None:
            return None, None, None
        (z,) = ctx.saved_tensors
        prime = softplus_prime_from_z(z, ctx.beta, ctx.threshold)
        return grad_a * prime, None, None  # BP1, BP2: the factor ⊙ σ'(z)

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: None, __: None) -> Tensor:
        """From a tangent dz to da = σ'(z) dz."""
        (z,) = ctx.saved_tensors
        return dz * softplus_prime_from_z(z, ctx.beta, ctx.threshold)


def softplus(z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Compute a = ln(1 + e^(β z)) / β: `torch.nn.functional.softplus`, differentiated by hand.

    Args:
        z: Weighted inputs, of any shape.
        beta: β, how sharply a bends at z = 0; not 0.
        threshold: Where β z is above it, a = z.

    Returns:
        a, the activations, with the shape of z.

    Raises:
        TypeError: z is not a dense tensor with a real floating-point dtype.
        ValueError: beta is 0.

    See `SoftplusFunction` for the gradient.

    Examples:
        >>> softplus(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.3133, 0.6931, 1.3133])
    """
    return _softplus("z", z, beta, threshold)


def _check_options(beta: float, _: float) -> None:
    _require.not_zero("beta", beta)


_softplus = entry_point(softplus, SoftplusFunction, _require.real, _check_options)


class Softplus(Activation, nn.Softplus, function=softplus):
    """`torch.nn.Softplus`, differentiated by hand: identical except for its backward.

    Args:
        beta: β, how sharply a bends at z = 0; not 0.
        threshold: Where β z is above it, a = z.

    Raises:
        ValueError: beta is 0.

    Input and output have the same, arbitrary shape. See `softplus` for the errors raised and
    `SoftplusFunction` for the gradient.

    Examples:
        >>> Softplus()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.3133, 0.6931, 1.3133])
    """

    slope_bounds = (0.0, 1.0)

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__(beta, threshold)
        self.require_options()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Softplus gives it)
        """From weighted inputs z to activations a."""
        return _softplus("input", input, self.beta, self.threshold)

    def require_options(self) -> None:
        """Raise a ValueError if beta is 0."""
        _check_options(self.beta, self.threshold)

    def require_slope_from_a(self) -> None:
        """Raise a ValueError if the threshold is below 20: a may then come from either side."""
        _require.at_least("threshold", self.threshold, TELLING_THRESHOLD)

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) = 1 − e^(−β a), and 1 where a = z, for a threshold of at least 20."""
        self.require_slope_from_a()
        t = self.beta * a
        return torch.where(t > self.threshold, 1, -torch.expm1(-t))

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) = 1 / (1 + e^(−β z)), and 1 where a = z; for any threshold, and never 0."""
        return at_least_tiny(softplus_prime_from_z(z, self.beta, self.threshold))

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """σ and ⊙ σ'(z) in the memory of a."""
        self.require_options()
        self.require_slope_from_a()
        beta, threshold = self.beta, self.threshold
        softplus_into: Any = F.softplus  # its annotation lacks out=

        def sigma_() -> None:
            softplus_into(a, beta, threshold, out=a)

        def times_sigma_prime_(grad_a: Tensor) -> None:
            is_line = a.mul_(beta) > threshold
            prime = a.neg_().expm1_().neg_().masked_fill_(is_line, 1)
            grad_a.mul_(prime)  # BP1, BP2: the factor ⊙ σ'(z)

        return sigma_, times_sigma_prime_
