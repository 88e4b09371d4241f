"""Every number of the diagnostics against a slow and obvious computation; and the verdicts."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import (
    Diagnostics,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Trace,
    backprop,
    convert,
    record,
)
from manual_bp.trace._measure import _reader
from manual_bp.trace._verdict import verdict_on
from tests.helpers import assert_same


def trace_of(net: nn.Sequential, x: Tensor, seed: int = 0) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(net(x).shape, generator=generator, dtype=x.dtype).to(x.device)
    with record(net) as trace:
        QuadraticCost()(net(x), y).backward()
    return trace


def norm(t: Tensor) -> float:
    return math.sqrt(math.fsum(value * value for value in t.flatten().tolist()))


def close(found: float | None, expected: float, rel: float = 1e-6) -> bool:
    return found == pytest.approx(expected, rel=rel, abs=1e-300)


def test_numbers_equal_a_slow_computation(device: torch.device) -> None:
    net: Any = nn.Sequential(
        nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.ReLU(),
        nn.Linear(3, 3), nn.Softplus(), nn.Linear(3, 2), nn.LeakyReLU(),
    ).to(device, torch.float64)  # fmt: skip
    x = torch.randn(8, 5, dtype=torch.float64, device=device)
    trace = trace_of(net, x)
    found = trace.diagnostics(learning_rate=0.3)
    assert [layer.name for layer in found.layers] == ["0", "2", "4", "6", "8"]
    sigma_primes = [
        lambda z: 1 / (2 + math.exp(z) + math.exp(-z)),
        lambda z: 1 / math.cosh(z) ** 2,
        lambda z: float(z > 0),
        lambda z: 1 / (1 + math.exp(-z)),
        lambda z: 1.0 if z > 0 else 0.01,
    ]
    for i, (layer, numbers) in enumerate(zip(trace.layers, found.layers, strict=True)):
        values = [sigma_primes[i](z) for z in layer.z.flatten().tolist()]
        assert close(numbers.delta_norm, norm(layer.delta))
        assert close(numbers.mean_sigma_prime, math.fsum(values) / len(values))
        assert layer.grad_w is not None
        assert close(numbers.grad_norm, norm(layer.grad_w))
        assert close(numbers.update, 0.3 * norm(layer.grad_w) / norm(layer.w.detach()))
        assert close(
            numbers.zeros, sum(d == 0 for d in layer.delta.flatten().tolist()) / len(values)
        )
        assert numbers.nonfinite == {}
        if i < 4:
            above = trace.layers[i + 1]
            columns = above.w.mT.tolist()
            grad_a = [
                [math.fsum(d * w for d, w in zip(row, column, strict=True)) for column in columns]
                for row in above.delta.tolist()
            ]
            grad_a_norm = norm(torch.tensor(grad_a, dtype=torch.float64))
            assert close(numbers.by_w, grad_a_norm / norm(above.delta))
            assert close(numbers.by_sigma_prime, norm(layer.delta) / grad_a_norm)
            assert close(numbers.ratio, norm(layer.delta) / norm(above.delta))
            assert numbers.by_w is not None
            assert numbers.by_sigma_prime is not None
            assert close(numbers.ratio, numbers.by_w * numbers.by_sigma_prime)
        else:
            assert numbers.ratio is numbers.by_w is numbers.by_sigma_prime is None
    assert trace.diagnostics()["2"].update is None


def test_backprop_record_and_fused_layers_give_the_same_diagnostics() -> None:
    net: Any = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Sigmoid()).double()
    x, y = torch.randn(6, 5).double(), torch.rand(6, 2).double()
    expected = backprop(net, x, y, QuadraticCost()).diagnostics(0.1)
    for fuse in (False, True):
        convert(net, fuse=fuse)
        with record(net) as trace:
            QuadraticCost()(net(x), y).backward()
        for one, other in zip(trace.diagnostics(0.1).layers, expected.layers, strict=True):
            for name, value in vars(other).items():
                found = getattr(one, name)
                assert found == (pytest.approx(value) if isinstance(value, float) else value)


ROWS = 3 * [[1.0, 2, 3], [0, 1, 1], [0, 0, 1]]


class TestSaturation:
    def test_saturated_is_the_fraction_over_neurons_and_samples(self) -> None:
        net: Any = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 1)).double()
        with torch.no_grad():
            net[0].weight.fill_(1)
            net[0].bias.zero_()
        # σ' < 0.05 / 4 from |z| = 4.357 on.
        z = torch.tensor([[0.0], [4.35], [-4.35], [4.36], [-4.37], [30.0], [-900.0], [9.0]])
        found = trace_of(net, z.double()).diagnostics()["0"]
        assert found.saturated == 5 / 8
        assert found.verdict == "learns"
        mostly = torch.tensor([[0.0], *[[-5.0]] * 9])
        found = trace_of(net, mostly.double()).diagnostics()["0"]
        assert found.saturated == 0.9
        assert found.verdict == "learns slowly: 90% of its neurons are saturated"

    def test_passed_is_the_fraction_of_the_error_relative_to_the_largest_sigma_prime(self) -> None:
        net: Any = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh())
        trace = trace_of(net.double(), torch.randn(8, 5).double())
        for layer, largest in zip(trace.layers, (0.25, 1.0), strict=True):
            a = layer.a
            sigma_prime = a * (1 - a) if largest < 1 else 1 - a**2
            grad_a = layer.delta / sigma_prime  # ∂C/∂a: of the first layer, wᵀδ of the second
            found = trace.diagnostics()[layer.name].passed
            assert close(found, norm(layer.delta) / norm(grad_a) / largest)
        # Neurons with σ' = 0 do not count here: they are off.
        off: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
        with torch.no_grad():
            off[0].weight.copy_(torch.eye(2))
        found = trace_of(off, torch.tensor([[1.0, -1], [2, -3]]).double()).diagnostics()["0"].passed
        assert close(found, 1.0)

    @pytest.mark.parametrize("right", [True, False])
    def test_the_last_layer_may_saturate_where_it_is_right(self, right: bool) -> None:
        """All samples but one are saturated, and these are right, or have the whole error."""
        net: Any = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
        with torch.no_grad():
            net[0].weight.fill_(1)
            net[0].bias.zero_()
        x = torch.tensor([[0.5], *[[9.0], [-9.0]] * 5]).double()
        y = (x > 0).double() if right else (x < 0).double()
        y[0] = 1 if right else x[0].sigmoid()
        found = backprop(net, x, y, QuadraticCost()).diagnostics()["0"]
        assert found.saturated == 10 / 11
        if right:
            assert found.verdict == "learns"
        else:
            assert found.verdict.startswith("learns slowly: 91% of its neurons are saturated")

    def test_a_leaky_relu_never_saturates(self) -> None:
        net: Any = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.001), nn.Linear(8, 2))
        assert trace_of(net, torch.randn(9, 4)).diagnostics()["0"].saturated == 0

    def test_a_relu_is_off_only_if_it_is_0_for_every_sample(self) -> None:
        net: Any = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [-1, -1, -1], [0, 1, 0], [0, -1, -2]]))
        found = trace_of(net, torch.tensor(ROWS)).diagnostics()["0"]
        assert found.saturated == 0
        assert found.off == 0.5
        assert found.zeros == found.zeros_off == (9 + 9 + 3 + 6) / 36
        assert found.verdict == "learns in part: 50% of its neurons are off for every sample"
        # A few samples are not enough to conclude that.
        assert trace_of(net, torch.tensor(ROWS[:3])).diagnostics()["0"].verdict == "learns"

    def test_sigma_prime_of_several_activations_is_their_product(self) -> None:
        net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sigmoid(), nn.Linear(4, 2)).double()
        trace = trace_of(net, 3 * torch.randn(9, 3).double())
        z = trace["0"].z
        sigma_prime = (1 - z.tanh() ** 2) * z.tanh().sigmoid() * (1 - z.tanh().sigmoid())
        found = trace.diagnostics()["0"]
        assert close(found.mean_sigma_prime, sigma_prime.mean().item())
        assert found.saturated == (sigma_prime < 0.05 * 0.25).double().mean().item()
        # A LeakyReLU after a tanh does not keep it from saturating.
        leaky = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.LeakyReLU(0.5), nn.Linear(4, 2)
        ).double()
        found = trace_of(leaky, 30 * torch.randn(9, 3).double()).diagnostics()["0"]
        assert found.saturated is not None
        assert found.saturated > 0.5

    def test_rounding_in_the_first_of_several_activations_is_detected(self) -> None:
        """In the last layer, the error from above is unknown, but σ' of the tanh was rounded."""
        net: Any = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.LeakyReLU())
        with torch.no_grad():
            net[0].weight.fill_(1)
            net[0].bias.zero_()
        found = trace_of(net, torch.tensor([[0.5], [90.0]])).diagnostics()["0"]
        assert found.zeros == found.zeros_rounded == 0.5

    def test_saturation_of_several_is_relative_to_the_largest_product(self) -> None:
        """The largest possible σ' is that of both together, not that of the last activation."""
        net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Tanh(), nn.Linear(4, 2)).double()
        trace = trace_of(net, 4 * torch.randn(50, 3).double())
        z = trace["0"].z
        sigma_prime = z.sigmoid() * (1 - z.sigmoid()) * (1 - z.sigmoid().tanh() ** 2)
        expected = (sigma_prime < 0.05 * 0.25).double().mean().item()
        assert trace.diagnostics()["0"].saturated == expected
        assert 0 < expected < (sigma_prime < 0.05).double().mean().item()


class TestZeros:
    """How much of δ is exactly 0, and why."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh], ids=lambda kind: kind.__name__)
    def test_zeros_from_rounding_are_counted_as_rounded(
        self, activation: Any, dtype: torch.dtype
    ) -> None:
        net: Any = nn.Sequential(nn.Linear(1, 1), activation(), nn.Linear(1, 1), nn.Sigmoid()).to(
            dtype
        )
        with torch.no_grad():
            net[0].weight.fill_(1)
            net[0].bias.zero_()
        x = torch.tensor([[0.0], [1.0], [50.0], [90.0]], dtype=dtype)
        trace = trace_of(net, x)
        assert (trace["0"].delta == 0).flatten().tolist() == [False, False, True, True]
        found = trace.diagnostics()["0"]
        assert found.zeros == found.zeros_rounded == 0.5
        assert found.zeros_from_above == found.zeros_off == 0
        # In the last layer, ∂C/∂a is unknown, but σ' is known.
        last = nn.Sequential(nn.Linear(1, 1), activation()).to(dtype)
        last.load_state_dict({name: net[0].state_dict()[name[2:]] for name in last.state_dict()})
        found = trace_of(last, x).diagnostics()["0"]
        assert found.zeros == found.zeros_rounded == 0.5

    def test_a_neuron_with_a_huge_z_is_rounded_and_not_off(self) -> None:
        net: Any = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 1))
        with torch.no_grad():
            net[0].weight.fill_(1000)
        found = trace_of(net, torch.tensor([[1.0], [-1.0]])).diagnostics()["0"]
        assert found.zeros_off == 0
        assert found.zeros_rounded == found.zeros == 1
        assert found.verdict == "does not learn: σ' of its neurons is rounded to 0"

    def test_zeros_without_an_error_are_from_above(self) -> None:
        net: Any = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
        with torch.no_grad():
            net[2].weight[:, 1] = 0
        found = trace_of(net, torch.randn(5, 3)).diagnostics()["0"]
        assert found.zeros == found.zeros_from_above == 0.25
        assert found.zeros_rounded == found.zeros_off == 0
        with torch.no_grad():
            net[2].weight.zero_()
        found = trace_of(net, torch.randn(5, 3)).diagnostics()["0"]
        assert found.verdict == "does not learn: no error comes from above"
        assert found.by_w == 0
        assert found.by_sigma_prime is None

    def test_zeros_where_an_error_came_are_off(self) -> None:
        net: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].bias.fill_(-100)
        found = trace_of(net, torch.randn(5, 3)).diagnostics()["0"]
        assert found.zeros == found.zeros_off == 1
        assert found.verdict == "does not learn: all its neurons are off"

    def test_neurons_that_are_off_where_no_error_came_count_as_from_above(self) -> None:
        """As below a head whose weights start at 0, or below a layer whose neurons are all off."""
        net: Any = nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        )
        with torch.no_grad():
            net[2].bias.fill_(-100)
        found = trace_of(net, torch.randn(9, 3)).diagnostics()
        assert found["0"].verdict == "does not learn: no error comes from above"
        assert found["2"].verdict == "does not learn: all its neurons are off"

    def test_a_softplus_with_a_low_threshold_rounds_nothing(self) -> None:
        layer: Any = nn.Sequential(nn.Linear(2, 3), nn.Softplus(threshold=2.0))
        found = trace_of(layer, torch.randn(5, 2)).diagnostics()["0"]
        z = F.linear(torch.randn(0, 2), layer[0].weight)
        assert z.numel() == found.zeros == found.zeros_rounded == 0


class TestWhereBP2DoesNotHold:
    """by_w and by_sigma_prime are unknown if a also goes elsewhere, or through something else."""

    @staticmethod
    def first_of(model: nn.Module) -> Any:
        with record(model) as trace:
            model(torch.randn(6, 4)).square().sum(-1).mean().backward()
        return trace.diagnostics().layers[0]

    def test_dropout_between_layers_leaves_the_factors_unknown(self) -> None:
        for inplace in (False, True):
            # (In place after a ReLU, autograd itself would raise an error.)
            activation = nn.Identity() if inplace else nn.ReLU()
            net: Any = nn.Sequential(
                nn.Linear(4, 8), activation, nn.Dropout(0.5, inplace=inplace), nn.Linear(8, 2)
            )
            found = self.first_of(net)
            assert found.by_w is found.by_sigma_prime is None
            assert found.ratio is not None

    def test_an_unknown_activation_leaves_all_about_sigma_prime_unknown(self) -> None:
        found = self.first_of(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)))
        assert (
            found.by_w is found.by_sigma_prime is found.mean_sigma_prime is found.saturated is None
        )
        assert found.off is None

    def test_a_residual_connection_leaves_the_factors_unknown(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                a = torch.sigmoid(self.first(x))
                return a + self.second(a)  # type: ignore[no-any-return]

        found = self.first_of(Block())
        assert found.by_w is found.by_sigma_prime is None

    def test_one_percent_from_elsewhere_leaves_the_factors_unknown(self) -> None:
        class Leaking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor, factor: float = 0.01) -> Tensor:
                a = torch.sigmoid(self.first(x))
                return self.second(a) + factor * a  # type: ignore[no-any-return]

        model = Leaking().double()
        nn.init.eye_(model.second.weight)
        for factor, holds in ((0.01, False), (0.0, True)):
            with record(model) as trace:
                output = model(torch.randn(6, 4).double(), factor)
                output.square().sum(-1).mean().backward()
            assert (trace.diagnostics()["first"].by_w is not None) == holds

    def test_a_layer_that_reads_a_transposed_view_of_a_is_no_reader(self) -> None:
        class Turned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.sigmoid(self.first(x)).mT)  # type: ignore[no-any-return]

        model = Turned()
        with record(model) as trace:
            model(torch.randn(4, 4)).square().sum(-1).mean().backward()
        assert _reader(trace["first"], [trace["second"]]) is None

    def test_a_second_use_of_z_leaves_the_factors_unknown(self) -> None:
        class Swish(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                z = self.first(x)
                return self.second(torch.sigmoid(z)) + z  # type: ignore[no-any-return]

        assert self.first_of(Swish()).by_w is None

    def test_the_reader_need_not_be_the_next_layer_that_ran(self) -> None:
        class Detour(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.aside, self.last = (
                    nn.Linear(4, 4),
                    nn.Linear(4, 4),
                    nn.Linear(4, 4),
                )

            def forward(self, x: Tensor) -> Tensor:
                a = torch.sigmoid(self.first(x))
                b = self.aside(x)
                return self.last(a) + 100 * b  # type: ignore[no-any-return]

        model = Detour()
        with record(model) as trace:
            model(torch.randn(6, 4)).square().sum(-1).mean().backward()
        found = trace.diagnostics()["first"]
        expected = norm(trace["first"].delta) / norm(trace["last"].delta)
        assert close(found.ratio, expected)
        assert found.by_w is not None

    def test_bp2_holds_where_sigma_prime_is_mostly_rounding(self) -> None:
        """At z = 14, a (1 − a) in float32 is wrong by some percent, but BP2 still holds."""
        net: Any = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].bias.fill_(14)
        trace = trace_of(net, torch.randn(6, 3))
        found = trace.diagnostics()["0"]
        assert found.by_w is not None
        grad_a = trace["2"].delta @ net[2].weight
        error = (trace["0"].delta - grad_a * nn.functional.sigmoid(-trace["0"].z.double())).norm()
        assert error > 0.001 * trace["0"].delta.norm()

    def test_by_sigma_prime_is_1_without_an_activation(self) -> None:
        found = self.first_of(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
        assert found.by_sigma_prime == pytest.approx(1)

    def test_a_layer_that_ran_twice_has_no_factors_but_a_mean_sigma_prime(self) -> None:
        layer = nn.Linear(4, 4)
        found = self.first_of(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2)))
        assert found.by_w is None
        assert found.mean_sigma_prime is not None


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_of_tiny_and_huge_errors_are_exact(scale: float) -> None:
    layer = nn.Linear(4, 3)
    with record(layer, "sum") as trace:
        (layer(torch.randn(5, 4)) * scale).sum().backward()
    found = trace.diagnostics(1.0)[""]
    assert close(found.delta_norm, scale * 15**0.5)
    assert close(found.grad_norm, trace[""].grad_w.double().norm().item())  # type: ignore[union-attr]


@given(
    widths=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    samples=st.integers(0, 3),
    rows=st.lists(st.integers(0, 2), max_size=1),
    exponent=st.integers(-300, 300),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    zeroed=st.integers(0, 4),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_numbers_of_any_size_and_of_empty_tensors(
    widths: list[int], samples: int, rows: list[int], exponent: int, dtype: Any, zeroed: int
) -> None:
    """Layers without inputs or neurons, no samples, weights of 0, errors of 1e-300 or 1e300."""
    net = nn.Sequential(*[nn.Linear(*pair) for pair in pairwise(widths)]).to(dtype)
    for name, parameter in net.named_parameters():
        if name == f"{zeroed}.weight":
            nn.init.zeros_(parameter)
    x = torch.randn(samples, *rows, widths[0]).to(dtype)
    scale = 10.0 ** (exponent if dtype is torch.float64 else exponent / 10)
    with record(net, "sum") as trace:
        net(x).backward(torch.full((samples, *rows, widths[-1]), scale, dtype=dtype))
    found = trace.diagnostics(learning_rate=0.1)
    assert str(found)
    for layer, numbers in zip(trace.layers, found, strict=True):
        exact = math.hypot(*layer.delta.flatten().tolist())
        assert close(numbers.delta_norm / scale, exact / scale)
        assert (numbers.delta_norm == 0) == (not layer.delta.any())
        if numbers.update is not None:
            assert layer.grad_w is not None
            steps = math.hypot(*(0.1 * layer.grad_w.double() / scale).flatten().tolist())
            assert close(numbers.update / scale, steps / norm(layer.w))
        weights = [layer.w, layer.b] if len(layer.w) else []
        if not layer.delta.shape[:-1].numel():
            assert numbers.verdict == "saw no samples"
        elif not any(p.numel() for p in weights if p is not None):
            assert numbers.verdict == "has no weights"
        else:
            assert numbers.verdict != "has no weights"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_a_layer_without_inputs_learns_its_bias_if_it_has_one() -> None:
    for bias in (True, False):
        net = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2, bias=bias))
        first, last = trace_of(net, torch.randn(9, 3)).diagnostics(0.1)
        assert first.verdict == "has no weights"
        assert last.verdict == ("learns" if bias else "has no weights")


def test_a_deep_net_in_float64_has_exact_norms_and_a_cause() -> None:
    """Errors of 1e-226 are not taken for 0, although their squares underflow."""
    net: Any = nn.Sequential()
    for _ in range(260):
        net.extend([nn.Linear(10, 10), nn.Sigmoid()])
    trace = trace_of(net.double(), torch.randn(4, 10).double())
    found = trace.diagnostics()
    exact = [math.hypot(*layer.delta.flatten().tolist()) for layer in trace.layers]
    assert 0 < exact[0] < 1e-200
    for layer, delta_norm in zip(found, exact, strict=True):
        assert layer.delta_norm == pytest.approx(delta_norm)
    for layer, (this, above) in zip(found, pairwise(exact), strict=False):
        assert layer.ratio == pytest.approx(this / above)
        assert layer.by_w is not None
        assert layer.by_sigma_prime is not None
        assert layer.by_w * layer.by_sigma_prime == pytest.approx(layer.ratio)
    times = f"{exact[-1] / exact[0]:.3g} times smaller"
    assert found["0"].verdict == (
        f"learns slowly: its error is {times} than the last layer's, mostly because of σ'"
    )


def test_the_cause_is_found_where_the_product_of_factors_underflows() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    trace = trace_of(net, torch.rand(9, 4))
    first, last = trace.diagnostics().layers
    for by_w, by_sigma_prime, cause in ((1e-200, 1e-210, "σ'"), (1e-210, 1e-200, "wᵀ")):
        faded = replace(first, delta_norm=1e-30, by_w=by_w, by_sigma_prime=by_sigma_prime)
        verdict = verdict_on(trace["0"], [faded, faded, last])
        assert verdict.endswith(f"mostly because of {cause}")


def test_a_last_layer_without_an_error_does_not_spoil_the_others() -> None:
    """The last layer to run need not be above the others: one of two heads may fit already."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.first(x), self.second(x)])

    model = TwoHeads()
    with record(model) as trace:
        (model(torch.randn(9, 4)) * torch.tensor([1.0, 0.0])[:, None, None]).sum().backward()
    found = trace.diagnostics()
    assert found["first"].verdict == "learns"
    assert found["second"].verdict.startswith("does not learn: ")


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_dead_inputs_do_not_depend_on_scale(scale: float) -> None:
    x = torch.rand(9, 4).double() + 0.5
    x[:, 1] = 1e-3
    layer = nn.Linear(4, 3, bias=False).double()
    with record(layer, "sum") as trace:
        layer(x * scale).backward(torch.randn(9, 3).double() / scale)
    assert trace.diagnostics()[""].dead_inputs == 0.25


def test_nonfinite_numbers_are_counted_and_break_the_layer() -> None:
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.inf
        net[0].weight[1, 0] = torch.nan
    trace = trace_of(net, torch.ones(5, 3))
    layer = trace["0"]
    tensors = {"w": layer.w, "z": layer.z, "a": layer.a, "δ": layer.delta}
    expected = {
        name: sum(not math.isfinite(value) for value in t.flatten().tolist())
        for name, t in tensors.items()
    }
    found = trace.diagnostics()
    assert found["0"].nonfinite == {name: count for name, count in expected.items() if count}
    assert found["0"].nonfinite["w"] == 2
    assert found["0"].verdict.startswith("is broken: not finite: 2 in w, 10 in z, ")
    assert found["2"].verdict.startswith("is broken: not finite: 10 in z, ")
    assert "not finite" in str(found)


def test_inputs_near_0_in_every_sample_are_dead() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    x = torch.rand(9, 4) + 0.5
    x[:, 1] = 0
    x[:, 2] = 0.001
    x[3, 3] = 0
    found = trace_of(net, x).diagnostics()["0"]
    assert found.dead_inputs == 0.5
    assert found.verdict == "learns in part: 50% of its inputs are near 0"
    assert trace_of(net, torch.zeros(6, 4)).diagnostics()["0"].dead_inputs == 1
    assert trace_of(net, x[:6]).diagnostics()["0"].verdict == "learns"


def test_a_frozen_layer_is_frozen_and_a_huge_update_leaps() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    net[2].weight.requires_grad_(False)
    found = trace_of(net, torch.randn(6, 4)).diagnostics(1e6)
    assert found["2"].verdict == "learns"  # its bias does
    net[2].requires_grad_(False)
    found = trace_of(net, torch.randn(6, 4)).diagnostics(1e6)
    assert found["2"].verdict == "is frozen"
    assert found["2"].grad_norm is found["2"].update is None
    assert found["0"].update is not None
    assert (
        found["0"].verdict
        == f"leaps: one update is {found['0'].update:.3g} times as large as its weights"
    )


def deep(std: float | None, gain: float = 1.0, layers: int = 6) -> nn.Sequential:
    """A deep sigmoid net; if std is None, with Xavier's weights and biases that centre z."""
    torch.manual_seed(0)
    sizes = [20] * layers + [5]
    modules: list[nn.Module] = []
    for in_features, out_features in pairwise(sizes):
        layer = Linear(in_features, out_features)
        with torch.no_grad():
            if std is None:
                nn.init.xavier_normal_(layer.weight, gain)
                layer.bias.copy_(-layer.weight.sum(1) / 2)
            else:
                nn.init.normal_(layer.weight, std=std)
                layer.bias.zero_()
        modules += [layer, nn.Sigmoid()]
    return nn.Sequential(*modules)


class TestVerdicts:
    """Badly initialised, saturated and healthy nets get different verdicts."""

    @staticmethod
    def of(net: nn.Sequential) -> Diagnostics:
        x = torch.rand(32, 20, generator=torch.Generator().manual_seed(1))
        return trace_of(net, x).diagnostics(0.1)

    def test_small_weights_make_the_error_fade_because_of_w(self) -> None:
        found = self.of(deep(0.01))
        assert found["0"].verdict.startswith("learns slowly: its error is ")
        assert found["0"].verdict.endswith("smaller than the last layer's, mostly because of wᵀ")
        assert found["10"].verdict == "learns"

    def test_larger_weights_make_it_fade_because_of_sigma_prime(self) -> None:
        found = self.of(deep(0.15))
        assert found["0"].verdict.endswith("smaller than the last layer's, mostly because of σ'")

    def test_huge_weights_saturate_every_hidden_layer(self) -> None:
        for layer in self.of(deep(30.0)).layers[:-1]:
            assert layer.saturated is not None
            assert layer.saturated >= 0.9
            percent = f"{layer.saturated:.0%}"
            assert layer.verdict.startswith(
                f"learns slowly: {percent} of its neurons are saturated"
            )

    def test_every_layer_of_a_healthy_net_learns(self) -> None:
        assert {layer.verdict for layer in self.of(deep(None, 4.0)).layers} == {"learns"}

    def test_an_exploding_net_is_unstable_because_of_w(self) -> None:
        net = deep(None, 4.0)
        convert(net)
        tanh = nn.Sequential(*[nn.Identity() if isinstance(m, nn.Sigmoid) else m for m in net])
        found = self.of(tanh)["0"]
        assert found.verdict.startswith("is unstable: its error is ")
        assert found.verdict.endswith("larger than the last layer's, mostly because of wᵀ")

    def test_an_unknown_cause_is_not_named(self) -> None:
        net: Any = nn.Sequential(*[m if isinstance(m, Linear) else nn.GELU() for m in deep(0.01)])
        assert self.of(net)["0"].verdict.endswith("times smaller than the last layer's")

    def test_verdicts_are_printed_below_the_table(self) -> None:
        found = self.of(deep(8.0))
        lines = str(found).splitlines()
        assert lines[0].split()[:3] == ["layer", "‖δ‖", "to"]
        assert "update" in lines[0]
        assert "not finite" not in lines[0]  # it is 0 in every layer
        assert [line.split()[0] for line in lines[2:8]] == [layer.name for layer in found.layers]
        assert lines[-1].split(maxsplit=1) == [found.layers[-1].name, found.layers[-1].verdict]
        assert max(map(len, lines)) < 140

    def test_names_that_look_like_numbers_are_printed_unchanged(self) -> None:
        names = ["1e5", "1_000", "0017", "nan"]
        net = nn.Sequential()
        for name in names:
            net.add_module(name, nn.Linear(3, 3))
        lines = str(trace_of(net, torch.randn(9, 3)).diagnostics()).splitlines()
        assert [line.split()[0] for line in lines[2:6]] == names
        assert [line.split()[0] for line in lines[-4:]] == names

    def test_parameters_elsewhere_are_named_below_the_table(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        printed = str(trace_of(net, torch.randn(9, 4)).diagnostics())
        assert printed.endswith(
            "not in this table: 2 parameters with gradients from elsewhere (1.weight, 1.bias)"
        )

    def test_diagnostics_iterate_over_their_layers(self) -> None:
        found = self.of(deep(8.0))
        assert list(found) == list(found.layers)

    def test_an_unknown_layer_raises_a_key_error(self) -> None:
        with pytest.raises(KeyError, match="no layer '1'; there are"):
            self.of(deep(8.0))["1"]


class TestThresholds:
    """The numbers from which on each verdict is given."""

    @staticmethod
    def of(samples: int = 9, above: Any = None, **numbers: Any) -> str:
        net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
        trace = trace_of(net, torch.rand(samples, 4) + 1)
        first, last = trace.diagnostics(0.1).layers
        healthy = replace(first, delta_norm=1.0, update=0.1, by_w=0.9, by_sigma_prime=0.9)
        last = replace(last, delta_norm=1.0)
        return verdict_on(trace["0"], [replace(healthy, **numbers), last])

    @pytest.mark.parametrize(
        ("enough", "not_enough", "begins"),
        [
            (
                {"nonfinite": {"w": 1, "δ": 2}},
                {"nonfinite": {}},
                "is broken: not finite: 1 in w",
            ),
            ({"grad_norm": 0.0}, {"grad_norm": 1e-30}, "does not learn: its inputs are 0"),
            ({"zeros": 1, "zeros_off": 1}, {"zeros": 0.99}, "does not learn: all its neurons are"),
            ({"saturated": 0.9}, {"saturated": 0.89}, "learns slowly: 90% of its neurons"),
            ({"off": 0.5}, {"off": 0.49}, "learns in part: 50% of its neurons"),
            ({"delta_norm": 9e-4}, {"delta_norm": 1.1e-3}, "learns slowly: its error is 1.11e+03"),
            ({"delta_norm": 1100.0}, {"delta_norm": 900.0}, "is unstable: its error is 1.1e+03"),
            ({"update": 10.1}, {"update": 9.9}, "leaps: one update is 10.1 times"),
            ({"dead_inputs": 0.5}, {"dead_inputs": 0.49}, "learns in part: 50% of its inputs"),
        ],
    )
    def test_each_verdict_begins_at_its_threshold(
        self, enough: Any, not_enough: Any, begins: str
    ) -> None:
        assert self.of(**enough).startswith(begins)
        assert self.of(**not_enough) == "learns"

    def test_the_last_layer_is_saturated_only_if_little_error_passes(self) -> None:
        trace = trace_of(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), torch.rand(9, 4))
        (last,) = trace.diagnostics()
        for saturated, passed, is_stopped in [(0.9, 0.009, 1), (0.9, 0.011, 0), (0.89, 0.009, 0)]:
            numbers = replace(last, saturated=saturated, passed=passed)
            verdict = verdict_on(trace["0"], [numbers])
            assert verdict.startswith("learns slowly: 90%" if is_stopped else "learns")
            assert ("saturated" in verdict) == is_stopped

    def test_few_samples_are_not_enough_for_off_and_dead(self) -> None:
        for numbers in ({"off": 1.0}, {"dead_inputs": 1.0}):
            assert self.of(7, **numbers) == "learns"
            assert self.of(8, **numbers).startswith("learns in part: 100%")
        assert self.of(0) == "saw no samples"

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
    def test_a_learning_rate_must_be_above_0(self, rate: float) -> None:
        trace = trace_of(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
        with pytest.raises(ValueError, match=f"learning_rate must be above 0; got {rate}"):
            trace.diagnostics(rate)


def test_bfloat16_gives_nearly_the_same_numbers(device: torch.device) -> None:
    net: Any = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Sigmoid()).to(
        device
    )
    x = torch.randn(5, 8, device=device)
    expected = trace_of(net, x).diagnostics()
    with record(net) as trace:
        with torch.autocast(device.type, torch.bfloat16):
            a = net(x)
        y = torch.rand(a.shape, generator=torch.Generator().manual_seed(0)).to(device)
        QuadraticCost()(a.float(), y).backward()
    for one, other in zip(trace.diagnostics().layers, expected.layers, strict=True):
        for name in (
            "delta_norm",
            "ratio",
            "by_w",
            "by_sigma_prime",
            "mean_sigma_prime",
            "grad_norm",
        ):
            found, value = getattr(one, name), getattr(other, name)
            assert found == (None if value is None else pytest.approx(value, rel=0.02))


def test_complex_numbers_are_refused() -> None:
    layer = nn.Linear(3, 2, dtype=torch.complex64)
    with record(layer) as trace:
        layer(torch.randn(4, 3, dtype=torch.complex64)).abs().mean().backward()
    with pytest.raises(TypeError, match="the output of layer '' must have a real floating"):
        trace.diagnostics()


def test_diagnostics_change_no_tensor() -> None:
    net: Any = nn.Sequential(LinearSigmoid(4, 3), nn.Linear(3, 2), nn.ReLU(inplace=True))
    trace = trace_of(net, torch.randn(5, 4))
    before = [t.clone() for layer in trace.layers for t in (layer.z, layer.a, layer.delta)]
    trace.diagnostics()
    after = [t for layer in trace.layers for t in (layer.z, layer.a, layer.delta)]
    assert_same(after, before, rtol=0, atol=0)
