"""record: the Trace of a model that is trained through autograd."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import manual_bp
from manual_bp import (
    Cost,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Sigmoid,
    Tanh,
    backprop,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    FIELDS,
    assert_gradients_are_those_of_autograd,
    net_of,
    of,
    recorded,
)


class TestTheSameAsBackprop:
    @pytest.mark.parametrize("ours", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (0, 5), (3, 2, 5)], ids=str)
    def test_every_field_is_that_of_backprop(
        self, ours: bool, reduction: Any, shape: tuple[int, ...], device: torch.device
    ) -> None:
        net = net_of(
            nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 6, bias=False), nn.Tanh(),
            nn.Linear(6, 3), nn.LeakyReLU(0.2), nn.Linear(3, 3), nn.Softplus(2.0), nn.Linear(3, 2),
            device=device,
        )  # fmt: skip
        if ours:
            manual_bp.convert(net)
        cost = QuadraticCost(reduction)
        x = torch.randn(shape, dtype=torch.float64, device=device)
        y = torch.rand((*shape[:-1], 2), dtype=torch.float64, device=device)
        net.zero_grad()
        with record(net, reduction) as trace:
            cost(net(x), y).backward()
        expected = backprop(net, x, y, cost)
        assert [layer.name for layer in trace.layers] == ["0", "2", "4", "6", "8"]
        torch.testing.assert_close(trace.cost, expected.cost, equal_nan=True)
        assert_same([trace.output], [expected.output])
        for ours_, theirs in zip(trace.layers, expected.layers, strict=True):
            assert ours_.w is theirs.w
            assert ours_.b is theirs.b
            assert ours_.scale == theirs.scale
            assert list(map(repr, ours_.activations)) == list(map(repr, theirs.activations))
            for name in FIELDS:
                one, other = getattr(ours_, name), getattr(theirs, name)
                assert (one is None) == (other is None)
                if one is not None:
                    assert not one.requires_grad
                    assert_same([one], [other])
        if shape[0]:
            assert_gradients_are_those_of_autograd(trace)

    @pytest.mark.parametrize(
        ("modules", "expected_activations"),
        [
            ([LinearSigmoid(5, 4), LinearSigmoid(4, 2)], [[Sigmoid], [Sigmoid]]),
            # backprop counts both activations as the layer's, so δ is taken before both.
            ([LinearSigmoid(5, 4), nn.Tanh(), Linear(4, 2)], [[Sigmoid, Tanh], []]),
        ],
        ids=["alone", "with what follows"],
    )
    def test_fused_layers_give_the_trace_of_backprop(
        self, modules: Any, expected_activations: Any, device: torch.device
    ) -> None:
        net = net_of(*copy.deepcopy(modules), device=device)
        x = torch.randn(3, 5, dtype=torch.float64, device=device)
        y = torch.rand(3, 2, dtype=torch.float64, device=device)
        with record(net) as trace:
            QuadraticCost()(net(x), y).backward()
        expected = backprop(net, x, y, QuadraticCost())
        for one, other in zip(trace.layers, expected.layers, strict=True):
            assert_same(of(one), of(other))
            assert list(map(type, one.activations)) == list(map(type, other.activations))
        found = [[type(activation) for activation in layer.activations] for layer in trace.layers]
        assert found == expected_activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradients_are_those_of_autograd(
    dtype: torch.dtype, device: torch.device
) -> None:
    net: Any = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), Linear(6, 4)).to(device)
    x = torch.randn(5, 8, device=device)
    net.zero_grad()
    with record(net) as trace:
        with torch.autocast(device.type, dtype):
            output = net(x)
        output.float().square().sum(-1).mean().backward()
    assert trace["0"].delta.dtype is trace["0"].z.dtype is dtype
    assert trace["0"].a_prev.dtype is torch.float32
    assert_gradients_are_those_of_autograd(trace, rtol=0)
    mean = trace.per_sample_grads()["0.weight"].mean(0)
    assert mean.dtype is torch.float32
    assert_same([mean], [net[0].weight.grad], rtol=3 * torch.finfo(dtype).eps, atol=1e-4)


def test_gradient_scaler_scales_the_trace(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).to(device)
    x = torch.randn(5, 4, device=device)
    expected = recorded(net, x)
    net.zero_grad()
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    with record(net) as trace:
        scaler.scale(net(x).square().sum(-1).mean()).backward()
    assert_same([trace["0"].delta], [1024 * expected["0"].delta], rtol=1e-6)


def test_inputs_may_have_any_number_of_dimensions(device: torch.device) -> None:
    net = net_of(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), device=device)
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64, device=device)
    trace = recorded(net, x, lambda z: z.square().sum((1, 2, 3)).mean())
    assert trace["0"].delta.shape == (5, 2, 3, 3)
    assert trace.samples == trace["0"].scale == 5
    assert_gradients_are_those_of_autograd(trace)
    alone = recorded(net, x[0, 0, 0], lambda z: z.square().sum())
    assert alone["0"].delta.shape == (3,)
    assert alone.samples == alone["0"].scale == 1
    assert_gradients_are_those_of_autograd(alone)


def test_parameters_of_functional_call_have_the_names_of_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    parameters = {name: (2 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
    x = torch.randn(5, 4)
    with record(net) as trace:
        output = torch.func.functional_call(net, parameters, (x,))
        output.square().sum(-1).mean().backward()
    found = trace.per_sample_grads()
    assert list(found) == list(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert_same([found[name].mean(0)], [parameter.grad], rtol=1e-5, atol=1e-7)


def test_converted_models_give_the_same_trace(device: torch.device) -> None:
    net = net_of(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Sigmoid(), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    expected = recorded(net, x)
    for fuse in (False, True):
        converted = copy.deepcopy(net)
        manual_bp.convert(converted, fuse=fuse)
        for one, other in zip(recorded(converted, x).layers, expected.layers, strict=True):
            assert_same(of(one), of(other))


def test_complex_layers_have_the_gradients_of_autograd() -> None:
    options: Any = {"dtype": torch.complex128}
    net = nn.Sequential(nn.Linear(4, 3, **options), nn.Tanh(), Linear(3, 2, **options))
    x = torch.randn(5, 4, dtype=torch.complex128)
    trace = recorded(net, x, lambda z: z.abs().square().sum(-1).mean())
    assert_gradients_are_those_of_autograd(trace)


def test_a_cost_is_not_a_layer() -> None:
    """A Cost is a module too, but not a part of the model."""
    net = nn.Sequential(nn.Linear(4, 2))
    cost: Cost = QuadraticCost()
    with record(net) as trace:
        cost(net(torch.randn(3, 4)), torch.rand(3, 2)).backward()
    assert [layer.name for layer in trace.layers] == ["0"]


def test_a_function_as_the_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got function"):
        record(lambda x: x)  # type: ignore[arg-type]


def test_an_output_in_place_of_the_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'; got Tensor"):
        record(nn.Linear(3, 2), torch.randn(4, 3))  # type: ignore[arg-type]


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'; got 'none'"):
        record(nn.Linear(3, 2), "none")  # type: ignore[arg-type]
