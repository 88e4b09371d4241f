"""The quadratic cost: C_x = ½‖y − a‖², with its ∇_a C for BP1."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, strided
from torch.autograd import Function
from torch.compiler import is_exporting

from manual_bp.costs import _cost
from manual_bp.costs._cost import Cost, Reduction

# Up to how many squares a dot product is used; for more, PyTorch's sum is more exact.
MOST_SQUARES = 2**16


def quadratic_gradient(a: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
    """∇_a C: for one sample ∇_a C_x = a − y, then weighted by the reduction. Shape as a."""
    return _cost.reduce_gradient(a - y, reduction)  # BP1: ∇_a C_x = a − y


class QuadraticCostFunction(Function):
    """C = (1/n) Σ_x ½‖y − a‖², with its gradients written by hand.

    Forward:

        C_x = ½ Σ_j (a_xj − y_xj)²

    Backward, from grad_cost = ∂(whatever is differentiated)/∂C, which is 1 in `C.backward()`:

        ∇_a C_x = a − y             ∂C_x/∂a_xj = a_xj − y_xj       BP1, its factor ∇_a C
        ∇_y C_x = y − a

    and 1/n times that for the mean over n samples.

    Shapes: a and y (..., components); C (), or (...) under "none".
    Units: C_x sums over components; "mean" and "sum" reduce over samples.
    Saves: a and y.
    Errors: none; `quadratic_cost` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, the cost in BP1.

    Examples:
        >>> a = torch.tensor([[1.0, 0.5]], requires_grad=True)
        >>> QuadraticCostFunction.apply(a, torch.tensor([[1.0, 0.0]]), "mean").backward()
        >>> a.grad  # ∇_a C = a − y
        tensor([[0.0000, 0.5000]])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """Compute C from the losses ½‖y − a‖²."""
        return _cost.reduce_losses((a - y).square().sum(-1) / 2, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Reduction], output: Any) -> None:
        """Save a and y."""
        del output
        a, y, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, y)
        ctx.save_for_forward(a, y)

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """From ∂/∂C to ∂/∂a and ∂/∂y."""
        if grad_cost is None:
            return None, None, None
        a, y = ctx.saved_tensors
        needs_a, needs_y, _ = ctx.needs_input_grad
        grad_a = grad_cost.unsqueeze(-1) * quadratic_gradient(a, y, ctx.reduction)
        return grad_a if needs_a else None, -grad_a if needs_y else None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, dy: Tensor | None, _: None) -> Tensor:
        """From tangents da, dy to dC = Σ_x (a − y)·da + (y − a)·dy, reduced."""
        a, y = ctx.saved_tensors
        of_a = None if da is None else (a - y) * da
        of_y = None if dy is None else (y - a) * dy
        return _cost.reduce_tangents([of_a, of_y], ctx.reduction)


_checked = partial(_cost.checked_pair, "a")
_call = _cost.as_cost(QuadraticCostFunction, _checked)


def quadratic_cost(a: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
    """C = (1/n) Σ_x ½‖y − a‖², differentiated by hand.

    Not `torch.nn.functional.mse_loss`, which averages over components too and has no ½.

    Args:
        a: Output activations, shape (..., components); every index before the last is a sample.
        y: Targets, shaped as a. They may require gradients as well.
        reduction: "mean" or "sum" over samples, or "none".

    Returns:
        The cost, shape (); under "none" the loss of each sample, shape (...).

    Raises:
        TypeError: a or y is not a dense tensor of a real floating dtype, or their dtypes differ.
        ValueError: y has another shape or device than a, a has no dimension, or reduction is
            unknown.

    See `QuadraticCostFunction` for the gradients.

    Examples:
        >>> quadratic_cost(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.1250)
    """
    return _call(quadratic_cost, a, y, reduction)


class QuadraticCost(Cost):
    """The quadratic cost C = (1/n) Σ_x ½‖y − a‖² of a network's output activations.

    See `quadratic_cost` for shapes, units and errors.

    Examples:
        >>> a, y = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> QuadraticCost()(a, y), QuadraticCost().gradient(a, y)
        (tensor(0.1250), tensor([[0.0000, 0.5000]]))
    """

    binds_losses = True

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        """C, from output activations a and targets y."""
        return quadratic_cost(a, y, self.reduction)

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        """∇_a C, shaped as a."""
        return quadratic_gradient(*_checked(a, y), self.reduction)

    def bind(self, a: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C, and a − y in the memory of delta: see `Cost.bind`."""
        weight = _cost.sample_weight(a, self.reduction)
        half = delta.new_full((), weight / 2)
        components = delta.view(-1)
        rows = delta.view(math.prod(a.shape[:-1]), 1, a.shape[-1])
        shape, dtype, device = a.shape, a.dtype, a.device
        # A dot product is faster. But in 16 bits a sum of squares soon overflows, very many squares
        # are added one by one, and the mean of none must be nan.
        are_few = is_exporting() or 0 < a.numel() <= MOST_SQUARES
        is_reduced = self.reduction != "none"
        uses_dot = a.dtype.itemsize >= 4 and are_few and is_reduced

        def error_(y: Tensor) -> Tensor:
            # The same checks as in checked_pair, in a tenth of the time.
            if not (
                isinstance(y, Tensor)
                and not y.is_nested
                and y.shape == shape
                and y.dtype is dtype
                and y.device == device
                and y.layout is strided
            ):
                _cost.checked_pair("the output", a, y)
            torch.sub(a, y, out=delta)  # BP1: ∇_a C_x = a − y
            if uses_dot:
                return components.dot(components).mul_(half)
            losses = torch.bmm(rows, rows.mT).view(shape[:-1]) / 2
            return _cost.reduce_losses(losses, self.reduction)

        return error_, weight
