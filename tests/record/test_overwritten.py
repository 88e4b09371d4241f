"""z, a and inputs that are overwritten before their δ arrives, or after."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import (
    Linear,
    LinearSigmoid,
    Sigmoid,
    Tanh,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    Doing,
    assert_gradients_are_those_of_autograd,
    assert_per_sample_follows,
    of,
    recorded,
)


def test_z_is_nan_if_it_and_its_input_were_overwritten() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            z = torch.sigmoid_(self.fc(h))
            h += 1
            return z

    trace = recorded(Adapted(), torch.randn(9, 3))
    assert trace["fc"].calls[0].changed == {"a_prev"}
    assert trace["fc"].z.isnan().all()  # both it and its input were overwritten
    assert trace.diagnostics()["fc"].dead_inputs is None
    assert_gradients_are_those_of_autograd(trace, rtol=1e-5)
    assert list(trace.per_sample_grads()) == ["inner.weight", "inner.bias"]
    with pytest.raises(RuntimeError, match="a_prev and delta must still be those of the pass"):
        trace["fc"].pair  # noqa: B018


def test_z_and_a_overwritten_in_place_are_recorded_with_their_old_values(
    device: torch.device,
) -> None:
    """By a ReLU in place, and then by += in place."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.out(F.relu_(self.fc(x)).add(0))
            h += 1
            return h  # type: ignore[no-any-return]

    model = Residual().to(device, torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    trace = recorded(model, x)
    z = F.linear(x, model.fc.weight, model.fc.bias)
    assert_same([trace["fc"].z, trace["fc"].a], [z, z.relu()])
    z = F.linear(z.relu(), model.out.weight, model.out.bias)
    assert_same([trace["out"].z, trace["out"].a], [z, z])
    assert_gradients_are_those_of_autograd(trace)


def test_an_activation_overwritten_in_place_is_recorded_with_its_old_values(
    device: torch.device,
) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = F.leaky_relu(self.fc(x))
            a *= 2
            return a

    model = Shifted().to(device, torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    trace = recorded(model, x)
    assert_same([trace["fc"].a], [F.leaky_relu(trace["fc"].z)])


def scale_a_part(z: Tensor) -> Tensor:
    z[..., :2].mul_(3)
    return z


class TestZChangedInPlace:
    """F.linear returns a view if it has a bias and the input has not two dimensions."""

    @pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", [nn.Linear, Linear])
    @pytest.mark.parametrize(
        "does",
        [F.relu_, torch.sigmoid_, lambda z: z.add_(1), scale_a_part, lambda z: F.relu(z.mul_(-1))],
    )
    def test_z_is_recorded_with_its_old_values_in_any_shape(
        self, does: Any, kind: Any, bias: bool, shape: tuple[int, ...], device: torch.device
    ) -> None:
        options: Any = {"dtype": torch.float64, "device": device}
        model = Doing(kind(4, 4, bias, **options), does)
        x = torch.randn(shape, **options)
        trace = recorded(model, x, lambda z: z.square().flatten(1).sum(1).mean())
        z = model.fc(x)
        assert_same([trace["fc"].z], [z])
        assert trace["fc"].delta.shape == z.shape
        assert trace.missed == {}
        assert_gradients_are_those_of_autograd(trace)
        assert_per_sample_follows(trace)

    def test_a_layer_that_runs_twice_has_both_calls(self) -> None:
        layer = nn.Linear(4, 4, dtype=torch.float64)
        model = Doing(layer, lambda z: F.relu_(layer(F.relu_(z))))
        x = torch.randn(5, 3, 4, dtype=torch.float64)
        trace = recorded(model, x, lambda z: z.square().sum((1, 2)).mean())
        assert len(trace["fc"].calls) == 2
        assert_gradients_are_those_of_autograd(trace)
        assert_per_sample_follows(trace)

    def test_z_changed_before_its_activation_has_none(self) -> None:
        for does in (lambda z: F.relu(z.add_(10)), lambda z: F.relu_(z.add_(10))):
            trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4) - 5)
            assert trace["fc"].activations == ()
            assert trace["fc"].a is trace["fc"].z
            assert trace.diagnostics()["fc"].off is None

    def test_an_activation_under_no_grad_does_not_count(self) -> None:
        def does(z: Tensor) -> Tensor:
            with torch.no_grad():
                torch.sigmoid(z).mean()
            return torch.tanh(z)

        trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4))
        assert list(map(type, trace["fc"].activations)) == [Tanh]

    def test_under_autocast_z_is_computed_again_in_its_dtype(self, device: torch.device) -> None:
        model = Doing(nn.Linear(4, 3), F.relu_).to(device)
        x = torch.randn(5, 4, device=device)
        with torch.autocast(device.type, torch.bfloat16), record(model) as trace:
            model(x).float().square().sum(-1).mean().backward()
        w, b = (p.detach().bfloat16() for p in model.fc.parameters())
        assert torch.equal(trace["fc"].z, F.linear(x.bfloat16(), w, b))

    def test_results_do_not_depend_on_autocast(self, device: torch.device) -> None:
        model = Doing(nn.Linear(8, 9), F.relu_).to(device)
        x = torch.randn(5, 2, 8, device=device)  # two rows a sample, so that Gram's form is used
        with record(model) as trace:
            output = model(x)
            with torch.autocast(device.type, torch.bfloat16):
                output.square().sum((1, 2)).mean().backward()

        def results() -> list[Tensor]:
            layer = trace.split(5).__next__()["fc"]
            assert layer.grad_w is not None
            return [
                layer.grad_w,
                layer.z,
                trace.per_sample_norms(),
                *trace.per_sample_grads().values(),
                *trace.clipped_grads(0.1).values(),
            ]

        expected, printed = results(), str(trace.diagnostics())
        with torch.autocast(device.type, torch.bfloat16):
            assert_same(results(), expected, rtol=0, atol=0)
            assert str(trace.diagnostics()) == printed
        assert_same([trace["fc"].z], [model.fc(x)], rtol=1e-6)

    def test_a_fused_layer_whose_a_goes_two_ways_keeps_its_sigmoid(self) -> None:
        layer = LinearSigmoid(4, 3)
        trace = recorded(Doing(layer, lambda a: torch.tanh(a) * torch.relu(a)), torch.randn(5, 4))
        z = trace["fc"].z
        assert list(map(type, trace["fc"].activations)) == [Sigmoid]
        expected = F.linear(trace["fc"].a_prev, layer.weight, layer.bias)
        assert_same([z, trace["fc"].a], [expected, z.sigmoid()], rtol=1e-6)

    def test_z_is_nan_if_the_weights_have_changed_too(self) -> None:
        model = Doing(nn.Linear(4, 3), F.relu_)
        with record(model) as trace:
            cost = model(torch.randn(5, 4)).square().sum(-1).mean()
            with torch.no_grad():
                model.fc.weight.mul_(2)  # type: ignore[operator]
            cost.backward()
        assert trace["fc"].z.isnan().all()
        assert_gradients_are_those_of_autograd(trace, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["in place", "fused"])
    def test_an_optimiser_that_steps_within_backward_changes_nothing(self, kind: str) -> None:
        first = LinearSigmoid(4, 3) if kind == "fused" else nn.Linear(4, 3)
        net = nn.Sequential(first, nn.ReLU(inplace=kind != "fused"), nn.Linear(3, 2)).double()
        x = torch.randn(5, 4, dtype=torch.float64)
        expected = recorded(net, x)

        @torch.no_grad()
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad

        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        before = [p.clone() for p in net.parameters()]
        net.zero_grad()
        with record(net) as trace:
            net(x).square().sum(-1).mean().backward()
        for one, other in zip(trace.layers, expected.layers, strict=True):
            assert_same(of(one), of(other))
        assert not any(map(torch.equal, before, net.parameters()))
        with pytest.raises(RuntimeError, match="ask before the optimiser's step"):
            trace.diagnostics()


def test_z_is_nan_if_the_bias_has_changed_too() -> None:
    model = Doing(nn.Linear(4, 3), F.relu_)
    model.fc.get_parameter("weight").requires_grad_(False)
    with record(model) as trace:
        cost = model(torch.randn(5, 4)).square().sum(-1).mean()
        with torch.no_grad():
            model.fc.get_parameter("bias").add_(1)
        cost.backward()
    assert not trace["fc"].calls[0].z_is_known
    assert trace["fc"].z.isnan().all()


def test_diagnostics_do_not_call_an_unknown_z_broken() -> None:
    frozen = nn.Linear(4, 3).requires_grad_(False)
    net = nn.Sequential(frozen, nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(9, 4).requires_grad_()
    inner = x * 1
    with record(net) as trace:
        cost = net(inner).square().sum(-1).mean()
        inner.data.zero_()
        inner.add_(0)
        cost.backward()
    found = trace.diagnostics()["0"]
    assert found.nonfinite == {}
    assert found.mean_sigma_prime is None
    assert found.verdict == "is frozen"


def test_parts_of_a_trace_notice_earlier_changes() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trace = recorded(net, torch.randn(6, 4))
    torch.optim.SGD(net.parameters(), 0.1).step()
    trace["2"].delta.mul_(100)
    part = next(trace.split(3))
    with pytest.raises(RuntimeError, match="a_prev and delta must still be those of the pass"):
        part.per_sample_norms()
    with pytest.raises(RuntimeError, match=r"must still be those of the pass"):
        part.diagnostics()


@pytest.mark.parametrize("name", ["z", "a", "delta"])
def test_diagnostics_refuse_overwritten_tensors(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    trace = recorded(net, torch.randn(6, 4))
    getattr(trace["0"], name).zero_()
    with pytest.raises(RuntimeError, match=f"got {name} changed in place"):
        trace.diagnostics()
