"""What the tests of all clients share: a model, its converted twin, and what must be equal."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp import ConversionReport, convert
from tests.activations import TABLE
from tests.helpers import assert_same

NEEDS = "needs the extra clients: pip install -e '.[clients]'"

# Our Linear's backward runs the same matrix products as PyTorch's, and those of ReLU and LeakyReLU
# multiply at most once, so their results must be bitwise equal. The formulas of other activations
# round differently from PyTorch's fused kernels: such models are compared in float64, to the usual
# tolerance.
EXACT: Any = {"rtol": 0, "atol": 0}


def every_activation(features: int, classes: int) -> nn.Sequential:
    """A net of all the layers that we have."""
    torch.manual_seed(1)
    activations = [activation.reference_module() for activation in TABLE]
    hidden = [module for act in activations for module in (nn.Linear(features, features), act)]
    net = nn.Sequential(*hidden, nn.Linear(features, classes))
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, gain=2)  # so that samples still differ at the end
    return net


def twins(model: Any, **options: bool) -> tuple[Any, Any, ConversionReport]:
    """The converted model, a copy from before the conversion, and the report."""
    theirs = copy.deepcopy(model)
    report = convert(model, **options)
    return model, theirs, report


def changes(report: ConversionReport) -> Counter[str]:
    """How many layers got each of our classes."""
    return Counter(change.after.__name__ for change in report.changed)


def identities(model: nn.Module) -> dict[str, tuple[int, type[Any]]]:
    """The identity and the class of each module and parameter."""
    named: list[tuple[str, Any]] = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ]
    return {name: (id(thing), type(thing)) for name, thing in named}


def train(parameters: Iterable[Tensor], losses: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """One step per loss; returns the losses."""
    # Not with Adam, whose steps hardly change if all gradients are too large by a factor.
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    torch.manual_seed(5)  # for dropout
    seen = []
    for compute in losses:
        optimizer.zero_grad()
        loss = compute()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return seen


def assert_learns(losses: list[Tensor]) -> None:
    """Equal losses prove something only if training changes them."""
    quarter = len(losses) // 4
    assert torch.stack(losses[-quarter:]).mean() < torch.stack(losses[:quarter]).mean()


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    assert_same(list(ours.parameters()), list(theirs.parameters()), **tolerance)
