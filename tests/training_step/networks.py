"""Networks, batches and the way that autograd and SGD would go, for the tests of the step."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp import (
    Cost,
    Linear,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
)
from tests.activations import TABLE

ACTIVATIONS: list[nn.Module] = [
    *(activation.make() for activation in TABLE),
    nn.Sigmoid(),
    nn.ReLU(inplace=True),
]
COSTS: list[Cost] = [
    QuadraticCost(),
    QuadraticCost("sum"),
    SigmoidCrossEntropyCost(),
    SoftmaxCrossEntropyCost(),
    SoftmaxCrossEntropyCost("sum"),
]


def network(
    activation: nn.Module | None = None,
    sizes: Sequence[int] = (7, 5, 6, 3),
    *,
    bias: bool = True,
    **options: Any,
) -> nn.Sequential:
    """Linear and activation by turns; float64 unless told."""
    options = {"dtype": torch.float64} | options
    modules: list[nn.Module] = []
    for size in pairwise(sizes):
        modules += [Linear(*size, bias=bias, **options), copy.deepcopy(activation or Sigmoid())]
    return nn.Sequential(*modules)


def batch(net: nn.Sequential, cost: Cost, *samples: int, indices: bool = False) -> Any:
    """Inputs and targets, of the dtype and on the device of a network's parameters."""
    weights = [p for p in net.parameters() if p.ndim == 2]
    first, last = weights[0], weights[-1]
    x = torch.randn(*samples, first.shape[1], dtype=first.dtype, device=first.device)
    if indices:
        return x, torch.randint(len(last), samples, device=first.device)
    y = torch.rand(*samples, len(last), dtype=first.dtype, device=first.device)
    return x, y.softmax(-1) if isinstance(cost, SoftmaxCrossEntropyCost) else y


class Reference:
    """The same training by autograd and `torch.optim.SGD`, on a copy of the network."""

    def __init__(self, net: nn.Sequential, cost: Cost, lr: float, **options: float) -> None:
        self.net, self.cost = copy.deepcopy(net), cost
        learned = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, lr, foreach=False, **options)  # type: ignore[arg-type]

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        # An in-place activation that comes first would write over x.
        cost: Tensor = self.cost(self.net(x.clone()), y)
        cost.backward()
        self.optimizer.step()
        return cost.detach()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_follows(net: nn.Module, reference: nn.Module, **tolerances: float) -> None:
    """The parameters of one are those of the other."""
    tolerances = {"rtol": 1e-11, "atol": 1e-13} | tolerances
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)  # type: ignore[arg-type]
