"""How a cost was reduced: to the mean or the sum over its samples, if its last step shows it."""

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from types import FunctionType
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from manual_bp._torch import reduced_dims, shape_before
from manual_bp.costs.quadratic import quadratic_cost
from manual_bp.costs.sigmoid_cross_entropy import sigmoid_cross_entropy_cost
from manual_bp.costs.softmax_cross_entropy import softmax_cross_entropy_cost
from manual_bp.layers._activation import ACTIVATIONS
from manual_bp.record._calls import PendingCall

Reduction = Literal["mean", "sum"]

# PyTorch's functions that take a reduction, and ours: all of them are loss functions.
LOSSES = {
    function
    for function in vars(F).values()
    if isinstance(function, FunctionType) and "reduction" in signature(function).parameters
} | {quadratic_cost, sigmoid_cross_entropy_cost, softmax_cross_entropy_cost}

# What may be between the z of a last layer and a cost that is nothing but a sum over its samples,
# besides activations.
_ELEMENTWISE = ("Pow", "Abs", "Sub", "Sum", "View", "UnsafeView", "LogSoftmax")


class Losses:
    """The losses that were computed in a block, where the reduction must be this one."""

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._reductions: dict[Any, str] = {}  # from the node of each loss

    def see(self, func: Any, args: Any, kwargs: Any, loss: Tensor) -> None:
        """Note the result of a loss function."""
        given = dict(zip(func.__code__.co_varnames, args, strict=False)) | kwargs
        reduction = given.get("reduction", "mean")
        if given.get("size_average") is not None or given.get("reduce") is not None:
            return  # these older options set the reduction instead
        if given.get("weight") is not None and reduction != "mean":
            return  # weights may turn a sum into a mean
        if loss.grad_fn is not None:
            self._reductions[loss.grad_fn] = "mean" if reduction == "batchmean" else reduction

    def release(self) -> None:
        """Release all losses."""
        self._reductions = {}

    def require_reduction(self, roots: Sequence[Tensor], calls: Sequence[PendingCall]) -> None:
        """Refuse a cost that shows that it is reduced in another way.

        Raises:
            ValueError: It is reduced in another way.
        """
        if len(roots) != 1 or any(len(call.shape) < 2 or call.shape[0] == 1 for call in calls):
            return  # of one sample, the mean is the sum
        found = _reduction_of(roots[0].grad_fn, {call.node for call in calls}, self._reductions)
        if found is not None and found != self._reduction:
            raise ValueError(
                f"reduction must be that of the cost; got {self._reduction!r}, and a cost that is "
                f"the {found} over samples: record(model, reduction={found!r})"
            )


def _reduction_of(node: Any, products: set[Any], losses: Mapping[Any, str]) -> str | None:
    """How a cost was reduced over its samples, if its last step shows it; else None.

    That step is a loss function, or the mean() or sum() of losses of samples. These come from a
    loss function, or were computed from the output of a layer without scaling.

    Args:
        node: The node of the cost.
        products: The nodes of the outputs of linear layers.
        losses: The nodes of the results of loss functions, each with its reduction.
    """
    while node not in losses and _is_of_one_number(node):
        node = node.next_functions[0][0]
    if losses.get(node) in ("mean", "sum"):
        return losses[node]
    name = {"MeanBackward0": "mean", "SumBackward0": "sum"}.get(node.name())
    if name is None:
        return None
    below = node.next_functions[0][0]
    elementwise = (*_ELEMENTWISE, *(name for kind in ACTIVATIONS for name in kind.node_names))
    while below not in products and losses.get(below) != "none":
        if below is None or not below.name().startswith(elementwise) or _is_over_samples(below):
            return None
        below = below.next_functions[0][0]
    return name


def _is_over_samples(node: Any) -> bool:
    """Whether a sum, or a softmax, is over the first dimension."""
    dims = reduced_dims(node)
    sizes = shape_before(node)
    count = len(sizes) if sizes is not None else 2
    # A negative one is kept as if it were unsigned.
    signed = [d - 2**64 if d >= 2**63 else d for d in ([dims] if isinstance(dims, int) else dims)]
    return any(d % count == 0 for d in signed)


def _is_of_one_number(node: Any) -> bool:
    """Whether it casts a number, or is the mean or sum of a single number."""
    sizes = shape_before(node)
    is_reduced = sizes is not None and math.prod(sizes) == 1
    return bool(node.next_functions) and (is_reduced or node.name() == "ToCopyBackward0")
