"""The cross-entropy of softmax outputs, as a function of z: again δ = a − y."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp import _require
from manual_bp._autocast import autocast_to_float32
from manual_bp._function import save_for_forward_ad
from manual_bp.costs import _cost
from manual_bp.costs._cost import Cost, Reduction


def softmax_cross_entropy_gradient(z: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
    """δ^L = ∂C/∂z: for one sample a − y with a = softmax(z), weighted by the reduction.

    For rows y that sum to s, not 1, it is s a − y. Shape as z.
    """
    a = torch.softmax(z, -1)
    if y.is_floating_point():
        a = a * y.sum(-1, keepdim=True)
    else:
        y = _one_hot(y, z)
    return _cost.reduce_gradient(a - y, reduction)  # BP1: δ = a − y


def _one_hot(y: Tensor, z: Tensor) -> Tensor:
    # Not torch.nn.functional.one_hot, which reads the values and so waits for an accelerator.
    return torch.zeros_like(z).scatter(-1, y.long().unsqueeze(-1), 1)


class SoftmaxCrossEntropyCostFunction(Function):
    """C_x = −Σ_j y_j ln a_j with a = softmax(z), its gradients written by hand.

    Forward, y as probabilities, or as the index c of the one class with y_c = 1:

        C_x = −Σ_j y_j (z_j − ln Σ_k e^(z_k))

    Backward, from grad_cost = ∂(whatever is differentiated)/∂C:

        ∂C_x/∂z = a − y             BP1 whole, for rows y that sum to 1
        ∂C_x/∂y = −ln a             for probabilities

    and 1/n times that for the mean over n samples. Here every z_j moves every a_k, so the σ' of
    BP1 is a matrix, ∂a_k/∂z_j = a_k (1[j=k] − a_j); multiplied by ∇_a C = −y/a it leaves a − y.

    Shapes: z (..., classes); y the same, or (...) for indices; C (), or (...) under "none".
    Units: C_x in nats; "mean" and "sum" reduce over samples.
    Saves: z; and y, only if ∂C/∂z is needed.
    Errors: none; `softmax_cross_entropy_cost` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 3, softmax and log-likelihood.

    Examples:
        >>> z = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> SoftmaxCrossEntropyCostFunction.apply(z, torch.tensor([0]), "mean").backward()
        >>> z.grad  # δ = a − y
        tensor([[-0.5000,  0.5000]])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """Compute C from the losses −Σ_j y_j ln a_j."""
        log_a = torch.log_softmax(z, -1)
        if y.is_floating_point():
            return _cost.reduce_losses(-(y * log_a).sum(-1), reduction)
        return _cost.reduce_losses(-log_a.gather(-1, y.long().unsqueeze(-1)).squeeze(-1), reduction)

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
            delta = softmax_cross_entropy_gradient(z, y, ctx.reduction)
            grad_z = grad_cost.unsqueeze(-1) * delta
        if needs_y:
            log_a = torch.log_softmax(z, -1)
            grad_y = grad_cost.unsqueeze(-1) * _cost.reduce_gradient(-log_a, ctx.reduction)
        return grad_z, grad_y, None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor | None, dy: Tensor | None, _: None) -> Tensor:
        """From tangents dz, dy to dC = Σ_x (a − y)·dz − ln a·dy, reduced."""
        z, y = ctx.saved_tensors
        of_z = None if dz is None else softmax_cross_entropy_gradient(z, y, "none") * dz
        of_y = None if dy is None else -torch.log_softmax(z, -1) * dy
        return _cost.reduce_tangents([of_z, of_y], ctx.reduction)


def _checked(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _require.tensor("y", y)
    if y.is_floating_point():
        return _cost.checked_pair("z", z, y)
    (z,) = autocast_to_float32(z)
    _require.real("z", z)
    _require.components("z", z)
    _require.indices("y", y, "z", z)
    return z, y


_call = _cost.as_cost(SoftmaxCrossEntropyCostFunction, _checked)


def softmax_cross_entropy_cost(z: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
    """C_x = −Σ_j y_j ln a_j, a = softmax(z), differentiated by hand.

    Takes z, not a: do not put a softmax before it. Classes are in the last dimension for any number
    of dimensions, whereas `torch.nn.functional.cross_entropy` has them in the second.

    Args:
        z: Weighted inputs of the output layer, shape (..., classes); every index before the last
            is a sample.
        y: Targets: class indices, integers from 0 to classes − 1 of shape (...); or probability
            rows, shaped as z and of its dtype, which may require gradients as well. There
            is no `ignore_index`: every index counts.
        reduction: "mean" or "sum" over samples, or "none".

    Returns:
        The cost in nats, shape (); under "none" the loss of each sample, shape (...).

    Raises:
        TypeError: z or y is not a dense tensor, z is not of a real floating dtype, or y holds
            neither integers nor numbers of the dtype of z.
        ValueError: y has the wrong shape or another device than z, an index is out of range (on
            the CPU; elsewhere PyTorch's indexing raises), z has no dimension, or reduction
            is unknown.

    See `SoftmaxCrossEntropyCostFunction` for the gradients.

    Examples:
        >>> softmax_cross_entropy_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.6931)
    """
    return _call(softmax_cross_entropy_cost, z, y, reduction)


class SoftmaxCrossEntropyCost(Cost):
    """The cross-entropy of a = softmax(z) against targets y, for a network whose output is z.

    See `softmax_cross_entropy_cost` for shapes, units and errors.

    Examples:
        >>> z, y = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
        >>> SoftmaxCrossEntropyCost()(z, y), SoftmaxCrossEntropyCost().gradient(z, y)
        (tensor(0.6931), tensor([[-0.5000,  0.5000]]))
    """

    binds_losses = True

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """C, from weighted inputs z and targets y."""
        return softmax_cross_entropy_cost(z, y, self.reduction)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """δ^L = ∂C/∂z, shaped as z."""
        return softmax_cross_entropy_gradient(*_checked(z, y), self.reduction)

    def bind(self, z: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C, and a − y in the memory of delta: see `Cost.bind`."""
        minus_one = delta.new_full((), -1)

        def error_(y: Tensor) -> Tensor:
            cost: Tensor = self(z, y).detach()
            torch.softmax(z, -1, out=delta)
            if y.is_floating_point():
                delta.mul_(y.sum(-1, keepdim=True)).sub_(y)  # BP1: δ = a − y
            else:
                index = y.long().unsqueeze(-1)
                delta.scatter_add_(-1, index, minus_one.expand(index.shape))  # BP1: δ = a − y
            return cost

        return error_, _cost.sample_weight(z, self.reduction)
