"""Networks, batches, costs, and training by autograd and SGD, for the tests of the step."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import (
    Cost,
    Linear,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    TrainingStep,
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
    """Alternating linear layers and activations; float64 by default."""
    options = {"dtype": torch.float64} | options
    modules: list[nn.Module] = []
    for size in pairwise(sizes):
        modules += [Linear(*size, bias=bias, **options), copy.deepcopy(activation or Sigmoid())]
    return nn.Sequential(*modules)


def batch(net: nn.Sequential, cost: Cost, *samples: int, indices: bool = False) -> Any:
    """Inputs and targets, with the dtype and device of the network's parameters."""
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
        # An in-place activation at the beginning would overwrite x.
        cost: Tensor = self.cost(self.net(x.clone()), y)
        cost.backward()
        self.optimizer.step()
        return cost.detach()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_follows(net: nn.Module, reference: nn.Module, **tolerances: float) -> None:
    """Assert that both have the same parameters."""
    tolerances = {"rtol": 1e-11, "atol": 1e-13} | tolerances
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)  # type: ignore[arg-type]


DESCENTS: list[dict[str, float]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.05},
]


class Autograd(Cost):
    """A user's cost without a bind; its gradient calls autograd."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        losses = (output - y).abs().pow(3).sum(-1)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    @torch.enable_grad()
    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        return torch.autograd.grad(self(output, y), output)[0]


class Counting(QuadraticCost):
    """A user's cost that sets an attribute of its own at each call."""

    calls = 0

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(a, y)


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)


every_cost = pytest.mark.parametrize("cost", COSTS, ids=repr)


every_descent = pytest.mark.parametrize(
    "descent", DESCENTS, ids=lambda d: "+".join(d) if d else "plain"
)


def follow(net: nn.Sequential, cost: Cost, steps: int, **descent: float) -> None:
    """Compare with autograd and SGD, with batches of several sizes and two learning rates."""
    # Rounding errors grow from step to step, but a wrong gradient would be off by far more.
    tolerances: Any = {"rtol": 1e-11, "atol": 1e-13}
    if steps > 10:
        tolerances = {"rtol": 1e-8, "atol": 1e-10}
    step, reference = (
        TrainingStep(net, cost, 0.05, **descent),
        Reference(net, cost, 0.05, **descent),
    )
    takes_indices = isinstance(cost, SoftmaxCrossEntropyCost)
    for number in range(steps):
        if number == steps // 2:
            step.lr = 0.02
            reference.set_lr(0.02)
        samples = (8, 8, 3, 11, 1)[number % 5]
        x, y = batch(net, cost, samples, indices=takes_indices and number % 2 == 1)
        torch.testing.assert_close(step(x, y), reference(x, y), **tolerances)
    assert_follows(net, reference.net, **tolerances)


class Doubled(QuadraticCost):
    """A subclass of ours that overrides forward and gradient, but not bind."""

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        return 2 * super().forward(a, y)

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        return 2 * super().gradient(a, y)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    velocities, others = found.pop("velocities"), dict(expected)
    assert velocities.keys() == others["velocities"].keys()
    for name, velocity in others.pop("velocities").items():
        assert torch.equal(velocities[name], velocity)
    assert found == others
