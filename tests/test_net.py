"""What the explicit algorithm reads from a network: layers with buffers as weights."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from manual_bp import Linear, LinearSigmoid, QuadraticCost, TrainingStep, backprop
from tests.helpers import assert_same

NAMES = ("weight", "bias")


def with_buffer(net: nn.Sequential, name: str, persistent: bool = True) -> nn.Sequential:
    """The same network with its middle layer's weight, or bias, as a buffer."""
    net = copy.deepcopy(net)
    layer = net[1]
    value = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, value, persistent=persistent)
    return net


def nets(layer: Any, name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A network with a buffer, and one with a frozen parameter instead."""
    frozen = nn.Sequential(
        nn.Linear(4, 3), layer(3, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Sigmoid()
    ).double()
    net = with_buffer(frozen, name)
    frozen[1].get_parameter(name).requires_grad_(False)
    return net, frozen


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [nn.Linear, Linear, LinearSigmoid])
class TestBuffers:
    def test_backprop(self, layer: Any, name: str, batch: Any) -> None:
        net, frozen = nets(layer, name)
        x, y = batch
        trace, expected = (backprop(one, x, y, QuadraticCost()) for one in (net, frozen))
        for this, that in zip(trace, expected, strict=True):
            assert_same([this.z, this.a, this.delta], [that.z, that.a, that.delta])
            assert (this.grad_w is None) == (that.grad_w is None)
            assert (this.grad_b is None) == (that.grad_b is None)
        trace.assign_grads()
        expected.assign_grads()
        of_frozen = {key: p.grad for key, p in frozen.named_parameters() if p.grad is not None}
        of_net = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        assert of_net.keys() == of_frozen.keys() == {key for key, _ in net.named_parameters()}
        assert_same([of_net[key] for key in of_frozen], list(of_frozen.values()))
        assert getattr(net[1], name).grad is None

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_training_step(self, layer: Any, name: str, batch: Any, momentum: float) -> None:
        net, frozen = nets(layer, name)
        before = getattr(net[1], name).clone()
        for one in (net, frozen):
            step = TrainingStep(one, QuadraticCost(), 0.5, momentum=momentum)
            for _ in range(3):
                step(*batch)
            plan = step._plan
            step(*batch)
            assert step._plan is plan  # not built again at every step
        assert torch.equal(getattr(net[1], name), before)
        for key, value in net.state_dict().items():
            assert_same([value], [frozen.state_dict()[key]])

    def test_a_replaced_buffer_is_noticed(self, layer: Any, name: str, batch: Any) -> None:
        net, _ = nets(layer, name)
        step = TrainingStep(net, QuadraticCost(), 0.5)
        step(*batch)
        setattr(net[1], name, torch.zeros_like(getattr(net[1], name)))
        cost = QuadraticCost()(net(batch[0]), batch[1])
        assert_same([step(*batch)], [cost])

    def test_a_buffer_that_requires_a_gradient_is_refused(
        self, layer: Any, name: str, batch: Any
    ) -> None:
        net, _ = nets(layer, name)
        getattr(net[1], name).requires_grad_()
        message = rf"net\['1'\]\.{name} must be a parameter if it is to learn; got a buffer"
        with pytest.raises(TypeError, match=message):
            backprop(net, batch[0], batch[1], QuadraticCost())
        with pytest.raises(TypeError, match=message):
            TrainingStep(net, QuadraticCost(), 0.5)


def test_a_bias_that_becomes_a_buffer_is_noticed(batch: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Sigmoid()).double()
    step = TrainingStep(net, QuadraticCost(), 0.5)
    step(*batch)
    del net[0].bias
    net[0].register_buffer("bias", torch.ones(2, dtype=torch.float64))
    cost = QuadraticCost()(net(batch[0]), batch[1])
    assert_same([step(*batch)], [cost])
