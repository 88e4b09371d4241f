"""The quadratic cost: C_x = ½‖y − a‖², with its ∇_a C for BP1."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, strided
from torch.autograd import Function
from torch.compiler import is_exporting
from torch.overrides import has_torch_function_variadic

from manual_bp import _require
from manual_bp._function import as_callable, hand_over
from manual_bp.costs._cost import (
    REDUCTIONS,
    Cost,
    Reduction,
    checked_pair,
    reduce_gradient,
    reduce_losses,
    sample_weight,
)

# How many squares a dot product may add up; beyond, PyTorch's sum is more exact.
MOST_SQUARES = 2**16


def quadratic_gradient(a: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
    """∇_a C: for one sample ∇_a C_x = a − y, then weighted by the reduction. Shape as a."""
    return reduce_gradient(a - y, reduction)  # BP1: ∇_a C_x = a − y


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
    Errors: none of its own; `quadratic_cost` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, the cost in BP1.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        """Compute C from the losses ½‖y − a‖²."""
        return reduce_losses((a - y).square().sum(-1) / 2, reduction)

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
        terms = []
        if da is not None:
            terms.append((a - y) * da)
        if dy is not None:
            terms.append((y - a) * dy)
        return reduce_losses(reduce(torch.add, terms).sum(-1), ctx.reduction)


_quadratic_cost = as_callable(QuadraticCostFunction)


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
        TypeError: a or y is no dense tensor, not of a real floating dtype, or they differ in dtype.
        ValueError: y has another shape or device than a, a has no dimension, or reduction is
            unknown.

    See `QuadraticCostFunction` for the gradients.
    """
    if has_torch_function_variadic(a, y):
        return hand_over(quadratic_cost, a, y, reduction)
    a, y = checked_pair("a", a, y)
    _require.one_of("reduction", reduction, REDUCTIONS)
    return _quadratic_cost(a, y, reduction)


class QuadraticCost(Cost):
    """The quadratic cost C = (1/n) Σ_x ½‖y − a‖² of a network's output activations.

    See `quadratic_cost` for shapes, units and errors.
    """

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        """C, from output activations a and targets y."""
        return quadratic_cost(a, y, self.reduction)

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        """∇_a C, shaped as a."""
        return quadratic_gradient(*checked_pair("a", a, y), self.reduction)

    def bind(self, a: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C, and a − y in the memory of delta: see `Cost.bind`."""
        weight = sample_weight(a, self.reduction)
        half = delta.new_full((), weight / 2)
        components = delta.view(-1)
        rows = delta.view(math.prod(a.shape[:-1]), 1, a.shape[-1])
        shape, dtype, device = a.shape, a.dtype, a.device
        # Not of 16 bits, for which a sum of squares is soon too large; nor of very many, which it
        # would add up one by one; nor the mean of none, which is no number.
        are_few = is_exporting() or 0 < a.numel() <= MOST_SQUARES
        is_plain = a.dtype.itemsize >= 4 and are_few

        def error_(y: Tensor) -> Tensor:
            # What checked_pair asks, in a tenth of the time.
            if not (
                isinstance(y, Tensor)
                and not y.is_nested
                and y.shape == shape
                and y.dtype is dtype
                and y.device == device
                and y.layout is strided
            ):
                checked_pair("the output", a, y)
            torch.sub(a, y, out=delta)  # BP1: ∇_a C_x = a − y
            if is_plain:
                return components.dot(components).mul_(half)
            return reduce_losses(torch.bmm(rows, rows.mT) / 2, self.reduction)

        return error_, weight
