"""Every layer and every cost, with PyTorch's own, as functions and as modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manual_bp
from tests.activations import TABLE

IN, OUT = 3, 4
ROWS = 5


def pair(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.sigmoid(F.linear(a, w, b))


def half_mse(a: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(a, y, reduction="sum") / (2 * a.shape[:-1].numel())


def binary(z: Tensor, y: Tensor) -> Tensor:
    total = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return total / z.shape[:-1].numel()


def categorical(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return pair(input, self.weight, self.bias)


class Lambda(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.call(*arguments)


@dataclass(frozen=True)
class Subject:
    """Ours and theirs, with the same arguments, as functions and as what makes modules.

    inputs: The arguments of the modules; those of the functions are these and the weights.
    """

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    make: Callable[..., nn.Module]
    make_theirs: Callable[..., nn.Module]
    inputs: Callable[..., tuple[Tensor, ...]]
    has_weights: bool = False

    def arguments(self, **options: Any) -> tuple[Tensor, ...]:
        """What the functions take: the inputs, and weights if there are any."""
        inputs = self.inputs(**options)
        if not self.has_weights:
            return inputs
        options = {"dtype": inputs[0].dtype, "device": inputs[0].device}
        return (*inputs, torch.randn(OUT, IN, **options), torch.randn(OUT, **options))

    def modules(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """Two modules with equal parameters, ours and theirs."""
        ours, theirs = self.make(), self.make_theirs()
        theirs.load_state_dict(ours.state_dict())
        options = {"dtype": torch.float64} | options
        return ours.to(**options), theirs.to(**options)


def rows(*leading: int, dtype: Any = torch.float64, device: Any = "cpu") -> tuple[Tensor, ...]:
    return (torch.randn(*(leading or (ROWS,)), IN, dtype=dtype, device=device),)


def outputs_and_targets(*leading: int, **options: Any) -> tuple[Tensor, ...]:
    (output,) = rows(*leading, **options)
    return output, torch.rand_like(output)


def outputs_and_labels(*leading: int, **options: Any) -> tuple[Tensor, ...]:
    (output,) = rows(*leading, **options)
    return output, torch.randint(IN, output.shape[:-1], device=output.device)


def cost(name: str, theirs: Any, make: Any, inputs: Any) -> Subject:
    return Subject(name, getattr(manual_bp, name), theirs, make, lambda: Lambda(theirs), inputs)


LINEAR = Subject(
    "linear",
    manual_bp.linear,
    F.linear,
    lambda: manual_bp.Linear(IN, OUT),
    lambda: nn.Linear(IN, OUT),
    rows,
    has_weights=True,
)
LINEAR_SIGMOID = Subject(
    "linear_sigmoid",
    manual_bp.linear_sigmoid,
    pair,
    lambda: manual_bp.LinearSigmoid(IN, OUT),
    lambda: Pair(IN, OUT),
    rows,
    has_weights=True,
)
ACTIVATIONS = [
    Subject(a.name, a.call, a.reference, a.module, a.reference_module, rows) for a in TABLE
]
COSTS = [
    cost("quadratic_cost", half_mse, manual_bp.QuadraticCost, outputs_and_targets),
    cost(
        "sigmoid_cross_entropy_cost",
        binary,
        manual_bp.SigmoidCrossEntropyCost,
        outputs_and_targets,
    ),
    cost(
        "softmax_cross_entropy_cost",
        categorical,
        manual_bp.SoftmaxCrossEntropyCost,
        outputs_and_labels,
    ),
]
LAYERS = [LINEAR, *ACTIVATIONS, LINEAR_SIGMOID]
SUBJECTS = [*LAYERS, *COSTS]

every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
every_layer = pytest.mark.parametrize("subject", LAYERS, ids=lambda subject: subject.name)
every_layer_with_weights = pytest.mark.parametrize(
    "subject", [LINEAR, LINEAR_SIGMOID], ids=lambda subject: subject.name
)
