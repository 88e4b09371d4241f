"""Which activation follows a z."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

import manual_bp
from manual_bp import (
    LeakyReLU,
    QuadraticCost,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    backprop,
)
from manual_bp._function import hand_over
from manual_bp.layers._activation import ACTIVATIONS, Activation
from tests.helpers import assert_same
from tests.record.recording import (
    Doing,
    assert_gradients_are_those_of_autograd,
    net_of,
    of,
    recorded,
)


class Functional(nn.Module):
    """Activations as functions and methods, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.fourth, self.fifth, self.sixth = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.second(x).sigmoid()
        x = F.relu(self.third(x), inplace=True)
        x = F.leaky_relu(self.fourth(x), negative_slope=0.3)
        x = manual_bp.softplus(self.fifth(x), 3.0)
        return torch.sigmoid_(self.sixth(x))


def test_activations_called_as_functions_are_recognised(device: torch.device) -> None:
    model = Functional().to(device, torch.float64)
    modules = [Tanh(), Sigmoid(), ReLU(), LeakyReLU(0.3), Softplus(3.0), Sigmoid()]
    pairs = zip(model.children(), modules, strict=True)
    net = nn.Sequential(*[module for pair in pairs for module in pair])
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    y = torch.rand(6, 2, dtype=torch.float64, device=device)
    trace = recorded(model, x, lambda output: QuadraticCost()(output, y))
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert [layer.name for layer in trace.layers] == names
    for one, other in zip(trace.layers, backprop(net, x, y, QuadraticCost()).layers, strict=True):
        assert_same(of(one), of(other))
        assert list(map(repr, one.activations)) == list(map(repr, other.activations))


def test_after_an_unknown_activation_a_is_z(device: torch.device) -> None:
    net = net_of(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2), device=device)
    trace = recorded(net, torch.randn(3, 5, dtype=torch.float64, device=device))
    assert trace["0"].activations == ()
    assert torch.equal(trace["0"].a, trace["0"].z)
    assert_gradients_are_those_of_autograd(trace)


def test_diagnostics_allow_that_an_unknown_activation_is_off() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].get_parameter("bias").fill_(-1000)
    found = recorded(net, torch.randn(9, 4)).diagnostics()["0"]
    assert found.zeros == 1
    assert found.zeros_off == found.zeros_from_above == found.zeros_rounded == 0
    assert found.verdict.endswith("from above, or an unknown activation is off")


def test_z_that_goes_into_two_activations_has_none(device: torch.device) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            return torch.sigmoid(z) * torch.tanh(z)

    model = Gate().to(device, torch.float64)
    trace = recorded(model, torch.randn(6, 4, dtype=torch.float64, device=device))
    assert trace["fc"].activations == ()
    assert trace["fc"].a is trace["fc"].z
    assert_gradients_are_those_of_autograd(trace)


@pytest.mark.parametrize(
    "does",
    [
        lambda z: z * torch.sigmoid(z),
        lambda z: torch.relu(z) + z,
        lambda z: torch.where(z > 0, z, torch.tanh(z)),
    ],
)
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 4)], ids=str)
def test_z_that_is_used_without_its_activation_too_has_none(does: Any, shape: Any) -> None:
    trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(shape))
    assert trace["fc"].activations == ()
    assert trace["fc"].a is trace["fc"].z


def test_after_an_option_that_ours_does_not_have_a_is_z() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.fc(x), -0.5)

    trace = recorded(Odd(), torch.randn(6, 4))
    assert trace["fc"].activations == ()


def test_after_options_that_are_not_numbers_a_is_z() -> None:
    beta = torch.tensor(2.0)
    model = Doing(nn.Linear(4, 3), lambda z: F.softplus(z, beta))  # type: ignore[arg-type]
    assert recorded(model, torch.randn(5, 4))["fc"].activations == ()
    model = Doing(nn.Linear(4, 3), lambda z: F.relu(z, []))  # type: ignore[arg-type]
    assert recorded(model, torch.randn(5, 4))["fc"].activations == ()


def elu(z: Tensor, alpha: float = 1.0) -> Tensor:
    return hand_over(elu, z, alpha) if has_torch_function_unary(z) else F.elu(z, alpha)


@pytest.fixture
def elu_module() -> Iterator[type[Activation]]:
    """An activation that is defined after record was imported, and forgotten after the test."""

    class ELU(Activation, nn.ELU, function=elu):
        pass

    yield ELU
    ACTIVATIONS.remove(ELU)


@pytest.mark.parametrize(
    "does",
    [
        nn.ELU(0.5),
        nn.ELU(0.5, inplace=True),
        lambda z: F.elu(z, 0.5),
        lambda z: F.elu_(z, alpha=0.5),
        lambda z: elu(z, 0.5),
    ],
    ids=["module", "module in place", "function", "function in place", "ours"],
)
def test_an_activation_defined_later_is_recognised(
    does: Callable[[Tensor], Tensor], elu_module: type[Activation]
) -> None:
    trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4))
    (found,) = trace["fc"].activations
    assert type(found) is elu_module
    assert found.alpha == 0.5
    assert_same([trace["fc"].a], [F.elu(trace["fc"].z, 0.5)])


@pytest.mark.usefixtures("elu_module")
def test_the_sum_of_an_activation_defined_later_shows_its_reduction() -> None:
    with pytest.raises(ValueError, match="got 'mean', and a cost that is the sum"):
        recorded(nn.Linear(4, 3), torch.randn(5, 4), lambda z: F.elu(z).sum())


def test_an_activation_forgotten_again_is_not_recognised() -> None:
    assert recorded(Doing(nn.Linear(4, 3), F.elu), torch.randn(5, 4))["fc"].activations == ()
