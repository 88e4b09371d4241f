"""The cross-entropy of sigmoid outputs, as a function of z, where σ' cancels: δ = a − y."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp._function import save_for_forward_ad
from manual_bp.costs import _cost
from manual_bp.costs._cost import Cost, Reduction


def sigmoid_cross_entropy_gradient(z: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
    """δ^L = ∂C/∂z: for one sample a − y with a = σ(z), weighted by the reduction. Shape as z."""
    a = torch.sigmoid(z)
    return _cost.reduce_gradient(a - y, reduction)  # BP1: δ = a − y


class SigmoidCrossEntropyCostFunction(Function):
    """C_x = −Σ_j [y_j ln a_j + (1 − y_j) ln(1 − a_j)] with a = σ(z), its gradients by hand.

    Forward, in the joint form, which takes no logarithm of a rounded a:

        C_x = Σ_j y_j ln(1 + e^(−z_j)) + (1 − y_j) ln(1 + e^(z_j))

    Backward, from grad_cost = ∂(whatever is differentiated)/∂C:

        ∂C_x/∂z = a − y             BP1 whole: ∇_a C = (a − y) / (a (1 − a)), σ'(z) = a (1 − a)
        ∂C_x/∂y = −z                since ln a − ln(1 − a) = z

    and 1/n times that for the mean over n samples.

    Shapes: z and y (..., components); C (), or (...) under "none".
    Units: C_x sums over components, in nats; "mean" and "sum" reduce over samples.
    Saves: z; and y, only if ∂C/∂z is needed.
    Errors: none; `sigmoid_cross_entropy_cost` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 3, the cross-entropy cost.

    Examples:
        >>> z = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> SigmoidCrossEntropyCostFunction.apply(z, torch.tensor([[1.0, 0.0]]), "mean").backward()
        >>> z.grad  # δ = a − y
        tensor([[-0.5000,  0.5000]])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """Compute C from the losses in their joint form."""
        losses = -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
        return _cost.reduce_losses(losses.sum(-1), reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Reduction], output: Any) -> None:
        """Save only what the requested gradients need."""
        del output
        z, y, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        needs_z, _, _ = ctx.needs_input_grad
        saves_both = save_for_forward_ad(ctx, z, y)
        ctx.save_for_backward(z, y if needs_z or saves_both else None)

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """From ∂/∂C to ∂/∂z and ∂/∂y."""
        if grad_cost is None:
            return None, None, None
        z, y = ctx.saved_tensors
        needs_z, needs_y, _ = ctx.needs_input_grad
        grad_z = grad_y = None
        if needs_z:
            delta = sigmoid_cross_entropy_gradient(z, y, ctx.reduction)
            grad_z = grad_cost.unsqueeze(-1) * delta
        if needs_y:
            grad_y = grad_cost.unsqueeze(-1) * _cost.reduce_gradient(-z, ctx.reduction)
        return grad_z, grad_y, None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor | None, dy: Tensor | None, _: None) -> Tensor:
        """From tangents dz, dy to dC = Σ_x (a − y)·dz − z·dy, reduced."""
        z, y = ctx.saved_tensors
        of_z = None if dz is None else (torch.sigmoid(z) - y) * dz
        of_y = None if dy is None else -z * dy
        return _cost.reduce_tangents([of_z, of_y], ctx.reduction)


_checked = partial(_cost.checked_pair, "z")
_call = _cost.as_cost(SigmoidCrossEntropyCostFunction, _checked)


def sigmoid_cross_entropy_cost(z: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
    """C_x = −Σ_j [y_j ln a_j + (1 − y_j) ln(1 − a_j)], a = σ(z), differentiated by hand.

    Takes z, not a: do not put a sigmoid before it. Every term of C, and the gradient, is finite for
    every finite z. Components are summed; `binary_cross_entropy_with_logits` averages them.

    Args:
        z: Weighted inputs of the output layer, shape (..., components); every index before the
            last is a sample.
        y: Targets, each from 0 to 1, shaped as z. They may require gradients as well.
        reduction: "mean" or "sum" over samples, or "none".

    Returns:
        The cost in nats, shape (); under "none" the loss of each sample, shape (...).

    Raises:
        TypeError: z or y is not a dense tensor of a real floating dtype, or their dtypes differ.
        ValueError: y has another shape or device than z, z has no dimension, or reduction is
            unknown.

    See `SigmoidCrossEntropyCostFunction` for the gradients.

    Examples:
        >>> sigmoid_cross_entropy_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(1.3863)
    """
    return _call(sigmoid_cross_entropy_cost, z, y, reduction)


class SigmoidCrossEntropyCost(Cost):
    """The cross-entropy of a = σ(z) against targets y, for a network whose output is z.

    See `sigmoid_cross_entropy_cost` for shapes, units and errors.

    Examples:
        >>> z, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> SigmoidCrossEntropyCost()(z, y), SigmoidCrossEntropyCost().gradient(z, y)
        (tensor(1.3863), tensor([[-0.5000,  0.5000]]))
    """

    binds_losses = True

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C, from weighted inputs z and targets y."""
        return sigmoid_cross_entropy_cost(z, y, self.reduction)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """δ^L = ∂C/∂z, shaped as z."""
        return sigmoid_cross_entropy_gradient(*_checked(z, y), self.reduction)

    def bind(self, z: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C, and a − y in the memory of delta: see `Cost.bind`."""

        def error_(y: Tensor) -> Tensor:
            cost: Tensor = self(z, y).detach()
            torch.sigmoid(z, out=delta).sub_(y)  # BP1: δ = a − y
            return cost

        return error_, _cost.sample_weight(z, self.reduction)
