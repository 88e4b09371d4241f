"""Networks, batches, costs, and training by autograd and SGD, for the tests of the step."""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import (
    Adam,
    AdamW,
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
    """The same training by autograd and `torch.optim`, on a copy of the network."""

    def __init__(self, net: nn.Sequential, cost: Cost, lr: float, **options: Any) -> None:
        self.net, self.cost, self.lr = copy.deepcopy(net), cost, lr
        groups, decay = options.pop("groups", {}), options.pop("weight_decay", 0.0)
        self.max_norm, rule = options.pop("max_norm", None), options.pop("rule", None)
        kind: Any = torch.optim.SGD
        if rule is not None:
            kind = getattr(torch.optim, type(rule).__name__)
            options |= {"betas": rule.betas, "eps": rule.eps}
        each = []
        for name, p in self.net.named_parameters():
            own = {"lr_scale": 1.0, "weight_decay": decay}
            for pattern, changed in groups.items():
                own |= changed if fnmatchcase(name, pattern) else {}
            if p.requires_grad:
                each.append({"params": [p], "lr": lr * own["lr_scale"], **own})
        self.optimizer = kind(each, lr, foreach=False, **options)
        self.grad_norm: Tensor | None = None

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        # An in-place activation at the beginning would overwrite x.
        cost: Tensor = self.cost(self.net(x.clone()), y)
        cost.backward()
        if self.max_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
        self.optimizer.step()
        return cost.detach()


def both(
    net: nn.Sequential, cost: Cost, lr: float, **options: Any
) -> tuple[TrainingStep, Reference]:
    """Our step, and the same training by PyTorch on a copy of the network."""
    return TrainingStep(net, cost, lr, **options), Reference(net, cost, lr, **options)


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_follows(net: nn.Module, reference: nn.Module, **tolerances: float) -> None:
    """Assert that both have the same parameters."""
    tolerances = {"rtol": 1e-11, "atol": 1e-13} | tolerances
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)  # type: ignore[arg-type]


DESCENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.05},
]


GROUPS: dict[str, dict[str, float]] = {
    "*.bias": {"weight_decay": 0.0},
    "0.*": {"lr_scale": 0.2},
    "0.bias": {"lr_scale": 3},
}
RULES: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "adam": {"rule": Adam((0.8, 0.99), 1e-6), "weight_decay": 0.1},
    "adamw": {"rule": AdamW(), "weight_decay": 0.1, "groups": GROUPS},
    "groups": {"weight_decay": 0.1, "groups": GROUPS},
    "momentum groups": {"momentum": 0.5, "weight_decay": 0.1, "groups": GROUPS},
}


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


every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


every_descent = pytest.mark.parametrize(
    "descent", DESCENTS, ids=lambda d: "+".join(d) if d else "plain"
)


def follow(net: nn.Sequential, cost: Cost, steps: int, **descent: Any) -> None:
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
        torch.testing.assert_close(step.grad_norm, reference.grad_norm, **tolerances)
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
