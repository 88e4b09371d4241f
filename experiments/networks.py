"""Networks of our layers, made from options: their activation, their cost, and its targets."""

from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from manual_bp import (
    Cost,
    Linear,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
)
from manual_bp.layers._activation import ACTIVATIONS, Activation


def activations() -> dict[str, type[Activation]]:
    """The registered activations by name, such as leaky-relu; without those that need arguments."""
    named = {kind.function.__name__.replace("_", "-"): kind for kind in ACTIVATIONS}
    return {name: kind for name, kind in named.items() if _needs_no_arguments(kind)}


def _needs_no_arguments(kind: type[Activation]) -> bool:
    try:
        signature(kind).bind()
    except TypeError:
        return False
    return True


def build_net(sizes: Sequence[int], activation: str, cost: str) -> nn.Sequential:
    """Linear layers and activations in turn; the last is a sigmoid, or none for a cost of z."""
    activate = activations()[activation]
    modules: list[nn.Module] = []
    for in_features, out_features in pairwise(sizes):
        modules += [Linear(in_features, out_features), activate()]
    output = [Sigmoid()] if cost == "quadratic" else []
    return nn.Sequential(*modules[:-1], *output)


def build_cost(name: str, reduction: Literal["mean", "sum"] = "mean") -> Cost:
    """The cost of that name, as a mean or a sum over samples."""
    costs = {
        "quadratic": QuadraticCost,
        "sigmoid-cross-entropy": SigmoidCrossEntropyCost,
        "softmax-cross-entropy": SoftmaxCrossEntropyCost,
    }
    return costs[name](reduction)


def targets(labels: Tensor, classes: int, cost: Cost) -> Tensor:
    """Labels in the form that the cost takes: class indices for softmax, else rows of 0 and 1."""
    if isinstance(cost, SoftmaxCrossEntropyCost):
        return labels
    return F.one_hot(labels, classes).float()
