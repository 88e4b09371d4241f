"""The trace that a pass fills."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import (
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    assert_per_sample_follows,
    recorded,
)


def test_freezing_after_the_pass_changes_no_result() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net[2].requires_grad_(False)
    trace = recorded(net, torch.randn(5, 4))
    expected = trace.per_sample_norms()
    net[0].requires_grad_(False)
    net[2].requires_grad_(True)
    for whole in (trace, next(trace.split(5))):
        assert torch.equal(whole.per_sample_norms(), expected)
        assert list(whole.clipped_grads(1.0)) == ["0.weight", "0.bias"]
    assert trace["2"].grad_w is trace["2"].per_sample_grad_w() is None


def test_without_a_parameter_that_learns_results_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3).requires_grad_(False))
    trace = recorded(net, torch.randn(5, 4, requires_grad=True))
    assert trace["0"].delta.shape == (5, 3)
    with pytest.raises(ValueError, match="a layer of the trace must have a parameter that learns"):
        trace.per_sample_norms()


def test_the_output_is_that_of_the_pass_without_its_graph() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            z = self.fc(x)
            return {"z": z, "twice": (2 * z, "text")}

    model, x = Both(), torch.randn(5, 4)
    model.zero_grad()
    with record(model) as trace:
        output = model(x)
        with torch.no_grad():
            model(x[:1])
        output["z"].square().sum(-1).mean().backward()
    assert torch.equal(trace.output["z"], output["z"])
    assert torch.equal(trace.output["twice"][0], output["twice"][0])
    assert not trace.output["z"].requires_grad
    assert not trace.output["twice"][0].requires_grad


def test_a_trace_iterates_over_its_layers_and_contains_their_names() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trace = recorded(net, torch.randn(5, 4))
    assert list(trace) == list(trace.layers)
    assert "2" in trace
    assert "1" not in trace


def test_assign_grads_is_refused_after_backward() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    trace = recorded(layer, x)
    with pytest.raises(RuntimeError, match=r"assign_grads must not add what .grad has already"):
        trace.assign_grads()
    expected = [layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    with record(layer) as trace:
        torch.autograd.grad(layer(x).square().sum(-1).mean(), list(layer.parameters()))
    trace.assign_grads()
    assert_same([layer.weight.grad, layer.bias.grad], expected, rtol=1e-6)  # type: ignore[list-item,arg-type]


def test_tied_biases_have_one_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net.double()
    net[2].bias = net[0].bias
    trace = recorded(net, torch.randn(5, 4, dtype=torch.float64))
    assert_per_sample_follows(trace)
    assert "2.bias" not in trace.per_sample_grads()


def test_a_layer_that_ran_with_two_weights_is_missed() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    fast = {name: (2 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)
    with record(net, layers="2") as trace:
        other = torch.func.functional_call(net, {"0.weight": fast["0.weight"]}, (x,))
        (net(x).square() + other.square()).sum(-1).mean().backward()
    assert len(trace["2"].calls) == 2
    with record(net) as trace:
        other = torch.func.functional_call(net, {"0.weight": fast["0.weight"]}, (x,))
        (net(x).square() + other.square()).sum(-1).mean().backward()
    assert trace.missed == {"0": "it ran with several weights"}
    assert trace.elsewhere == ("0.weight", "0.bias")


def test_layers_are_in_the_order_of_the_pass() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(5, 4)
    with record(net) as trace:
        with torch.no_grad():
            net[1](x)
        net(x).square().sum(-1).mean().backward()
    assert [layer.name for layer in trace.layers] == ["0", "1"]
