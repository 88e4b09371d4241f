"""record: the Trace of a model that is trained through autograd."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import manual_bp
from manual_bp import (
    Cost,
    LayerTrace,
    LeakyReLU,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    ReLU,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    Trace,
    backprop,
    record,
)
from tests.helpers import assert_same

FIELDS = ("a_prev", "z", "a", "delta", "grad_w", "grad_b")


def of(layer: LayerTrace) -> list[Tensor]:
    """All that a layer's trace holds, where nothing is frozen."""
    return [getattr(layer, name) for name in FIELDS]


def recorded(
    model: nn.Module,
    x: Tensor,
    cost_of: Callable[[Any], Tensor] = lambda output: output.square().sum(-1).mean(),
    **options: Any,
) -> Trace:
    """The trace of one pass; `.grad` is that of this pass alone."""
    model.zero_grad()
    with record(model, **options) as trace:
        cost_of(model(x)).backward()
    return trace


def assert_gradients_are_those_of_autograd(trace: Trace, rtol: float = 1e-10) -> None:
    """BP3 and BP4 from the pairs, beside what backward() left in `.grad`."""
    found: dict[Tensor, Tensor] = {}
    for layer in trace.layers:
        for parameter, grad in ((layer.w, layer.grad_w), (layer.b, layer.grad_b)):
            if parameter is not None and grad is not None:
                found[parameter] = found[parameter] + grad if parameter in found else grad
    assert found
    for parameter, grad in found.items():
        assert parameter.grad is not None
        assert grad.dtype is parameter.dtype
        assert_same([grad], [parameter.grad], rtol=rtol)


def net_of(*modules: nn.Module, device: torch.device) -> nn.Sequential:
    return nn.Sequential(*modules).to(device, torch.float64)


class TestTheSameAsBackprop:
    @pytest.mark.parametrize("ours", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (0, 5), (3, 2, 5)], ids=str)
    def test_in_all_that_it_holds(
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
            # Explicit backprop counts both activations to the layer, and so δ is before both.
            ([LinearSigmoid(5, 4), nn.Tanh(), Linear(4, 2)], [[Sigmoid, Tanh], []]),
        ],
        ids=["alone", "with what follows"],
    )
    def test_of_fused_layers(
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


def test_activations_that_are_functions(device: torch.device) -> None:
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


def test_an_activation_that_is_not_known_leaves_a_at_z(device: torch.device) -> None:
    net = net_of(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2), device=device)
    trace = recorded(net, torch.randn(3, 5, dtype=torch.float64, device=device))
    assert trace["0"].activations == ()
    assert torch.equal(trace["0"].a, trace["0"].z)
    assert_gradients_are_those_of_autograd(trace)


def test_z_and_a_that_are_written_over(device: torch.device) -> None:
    """By a ReLU in place, and then by a sum in place: the trace has what they were."""

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


def test_an_activation_that_is_written_over(device: torch.device) -> None:
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


def test_a_z_that_goes_two_ways_has_no_one_activation(device: torch.device) -> None:
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


def test_options_that_ours_does_not_have_leave_a_at_z() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.fc(x), -0.5)

    trace = recorded(Odd(), torch.randn(6, 4))
    assert trace["fc"].activations == ()


class TestNothingIsChanged:
    def test_gradients_weights_and_random_numbers(self, device: torch.device) -> None:
        x, y = torch.randn(8, 6, device=device), torch.rand(8, 2, device=device)
        results = []
        for is_recorded in (False, True):
            torch.manual_seed(3)
            net = nn.Sequential(
                nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(0.4), Linear(5, 4), Sigmoid(),
                LinearSigmoid(4, 2),
            ).to(device)  # fmt: skip
            optimizer = torch.optim.Adam(net.parameters())
            grads = []
            for _ in range(4):
                optimizer.zero_grad()
                if is_recorded:
                    with record(net) as trace:
                        QuadraticCost()(net(x), y).backward()
                    trace.per_sample_norms()
                    trace.clipped_grads(1.0)
                    trace.diagnostics()
                else:
                    QuadraticCost()(net(x), y).backward()
                grads += [p.grad.clone() for p in net.parameters() if p.grad is not None]
                optimizer.step()
            results.append([*grads, *net.state_dict().values(), torch.rand(3, device=device)])
        assert len(results[0]) == 4 * 6 + 6 + 1
        for without, with_ in zip(*results, strict=True):
            assert torch.equal(without, with_)

    @pytest.mark.parametrize("where", ["forward", "backward", "after"])
    def test_hooks_are_gone_after_an_exception(self, where: str) -> None:
        net = nn.Sequential(Linear(3, 2), Sigmoid())

        def fail(*_: object) -> None:
            raise ArithmeticError(where)

        def run() -> Trace:
            with record(net) as trace:
                output = net(torch.randn(4, 3))
                if where == "forward":
                    fail()
                if where == "backward":
                    output.register_hook(fail)
                output.mean().backward()
                if where == "after":
                    fail()
            return trace

        with pytest.raises(ArithmeticError, match=where):
            run()
        self.assert_has_no_hooks(net)

    def test_hooks_are_gone(self) -> None:
        net = nn.Sequential(Linear(3, 2), Sigmoid())
        with record(net) as trace:
            z = net[0](torch.randn(4, 3))
            z.mean().backward(retain_graph=True)
            assert trace["0"].delta.unique() == 1 / 8
        self.assert_has_no_hooks(net)
        assert not z._backward_hooks
        z.sum().backward()
        assert trace["0"].delta.unique() == 1 / 8

    @staticmethod
    def assert_has_no_hooks(net: nn.Module) -> None:
        for module in net.modules():
            assert not module._forward_hooks
            assert not module._forward_hooks_with_kwargs
            assert not module._forward_pre_hooks
            assert not module._backward_hooks

    def test_nothing_is_left_after_a_thousand_uses(self) -> None:
        net = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), Linear(5, 2), nn.ReLU(inplace=True))
        x = torch.randn(4, 6)
        held: list[Any] = []

        def use() -> None:
            trace = recorded(net, x)
            trace.per_sample_norms()
            held[:] = [weakref.ref(trace), weakref.ref(trace.layers[0].delta)]

        for _ in range(10):
            use()
        gc.collect()
        gc.disable()  # what only the collector would find is a leak as well
        try:
            before = len(gc.get_objects())
            for _ in range(1000):
                use()
                assert [reference() for reference in held] == [None, None]
            assert len(gc.get_objects()) <= before + 20
        finally:
            gc.enable()

    def test_a_trace_does_not_hold_the_graph(self) -> None:
        net = nn.Sequential(Linear(3, 2), Sigmoid())
        net.zero_grad()
        with record(net) as trace:
            output = net(torch.randn(4, 3))
            output.mean().backward()
        node = weakref.ref(output)
        del output
        assert node() is None
        assert all(not t.requires_grad for t in (trace.output, trace.cost, *of(trace["0"])))

    def test_the_gradient_of_a_bias_is_not_the_memory_of_delta(self) -> None:
        layer = nn.Linear(3, 2)  # for one sample, δ itself is ∂C/∂b
        trace = recorded(layer, torch.randn(3), lambda z: z.square().sum())
        before = trace[""].delta.clone()
        assert layer.bias.grad is not None
        layer.bias.grad.zero_()
        assert torch.equal(trace[""].delta, before)

    def test_spectral_norm_takes_no_step_more(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Sigmoid())
        other = copy.deepcopy(net)
        x = torch.randn(5, 4)
        trace = recorded(net, x)
        other(x).square().sum(-1).mean().backward()
        for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(one, two)
        assert_same([trace["0"].z], [F.linear(x, trace["0"].w, trace["0"].b)], rtol=1e-6)
        assert trace["0"].grad_w is None  # w is computed, no parameter
        assert trace.elsewhere == ("0.parametrizations.weight.original",)


class Repeated(nn.Module):
    """One layer three times, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down, self.up = nn.Linear(4, 4), Linear(4, 4), nn.Linear(4, 4)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.up(torch.sigmoid(self.down(x)))  # type: ignore[no-any-return]


def test_a_layer_that_runs_several_times_and_tied_weights(device: torch.device) -> None:
    model = Repeated().to(device, torch.float64)
    trace = recorded(model, torch.randn(6, 4, dtype=torch.float64, device=device))
    inner = trace["inner"]
    assert len(inner.calls) == 3
    assert torch.equal(inner.calls[0].a, inner.calls[1].a_prev)
    with pytest.raises(ValueError, match=r"layer 'inner' must have run once .* it ran 3 times"):
        inner.delta  # noqa: B018
    assert_gradients_are_those_of_autograd(trace)
    assert trace["down"].w is trace["up"].w
    assert list(trace.per_sample_grads()) == [
        "inner.weight", "inner.bias", "down.weight", "down.bias", "up.bias",
    ]  # fmt: skip


def test_frozen_layers(device: torch.device) -> None:
    net = net_of(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(),
        nn.Linear(3, 2), device=device,
    )  # fmt: skip
    for frozen in (net[0], net[4]):
        frozen.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    trace = recorded(net, torch.randn(6, 5, dtype=torch.float64, device=device))
    assert [layer.name for layer in trace.layers] == ["2", "4", "6"]
    assert trace["4"].grad_w is trace["4"].grad_b is trace["6"].grad_b is None
    assert trace["4"].per_sample_grad_w() is trace["4"].per_sample_grad_b() is None
    assert list(trace.per_sample_grads()) == ["2.weight", "2.bias", "6.weight"]
    assert_gradients_are_those_of_autograd(trace)
    with pytest.raises(KeyError, match="layer '0' is not in this trace: it ran, but no error"):
        trace["0"]


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.use_reentrant = body, nn.Linear(3, 2), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        return self.head(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant: bool, device: torch.device) -> None:
    body = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), Linear(4, 3), nn.ReLU(inplace=True))
    model = Checkpointed(body, use_reentrant).to(device, torch.float64)
    plain = nn.Sequential(*body, model.head)
    x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    trace = recorded(model, x)
    expected = recorded(plain, x)
    assert [layer.name for layer in trace.layers] == ["body.0", "body.2", "head"]
    for one, other in zip(trace.layers, expected.layers, strict=True):
        assert len(one.calls) == 1
        assert_same(of(one), of(other))
        assert list(map(type, one.activations)) == list(map(type, other.activations))
    assert trace.elsewhere == ()
    assert_same([trace.per_sample_norms()], [expected.per_sample_norms()])


def test_what_a_reentrant_checkpoint_hides_is_taken_to_be_elsewhere() -> None:
    body = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    model = Checkpointed(body, use_reentrant=True)
    trace = recorded(model, torch.randn(6, 5, requires_grad=True))
    assert trace.elsewhere == ("body.1.weight", "body.1.bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
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


class TestWaysToCallBackward:
    def test_autograd_backward_and_grad(self) -> None:
        net = net_of(nn.Linear(4, 3), nn.Sigmoid(), device=torch.device("cpu"))
        x = torch.randn(5, 4, dtype=torch.float64)
        expected = recorded(net, x)
        with record(net) as trace:
            torch.autograd.backward(net(x).square().sum(-1).mean())
        assert_same(of(trace["0"]), of(expected["0"]))
        with record(net) as trace:
            torch.autograd.grad(net(x).square().sum(-1).mean(), list(net.parameters()))
        assert_same(of(trace["0"]), of(expected["0"]))
        with record(net) as trace:
            torch.autograd.backward([net(x).square().sum(-1).mean(), net(x).mean()])
        assert len(trace["0"].calls) == 2
        assert trace.cost.ndim == 0

    def test_with_a_graph_of_its_own(self) -> None:
        net = net_of(nn.Linear(4, 3), nn.Sigmoid(), device=torch.device("cpu"))
        x = torch.randn(5, 4, dtype=torch.float64)
        with record(net) as trace:
            torch.autograd.grad(net(x).sum(-1).mean(), list(net.parameters()), create_graph=True)
        assert not trace["0"].delta.requires_grad

    def test_what_has_nothing_to_do_with_the_model_does_not_count(self) -> None:
        net = nn.Linear(3, 2)
        other = torch.ones((), requires_grad=True)
        with record(net) as trace:
            (2 * other).backward()
            z = net(torch.randn(4, 3))
            (3 * other).backward()
            z.square().sum(-1).mean().backward()
            (4 * other).backward()
        assert len(trace.layers) == 1
        assert other.grad == 9

    def test_the_trace_is_there_within_the_block(self) -> None:
        net = nn.Linear(3, 2)
        with record(net) as trace:
            with pytest.raises(AttributeError, match="this trace has no layers yet: record fills"):
                trace.layers  # noqa: B018
            net(torch.randn(4, 3)).square().sum(-1).mean().backward()
            assert trace.per_sample_norms().shape == (4,)

    def test_model_called_by_a_keyword_and_a_layer_by_a_keyword(self) -> None:
        net = nn.Linear(3, 2)
        x = torch.randn(4, 3)
        with record(net) as trace:
            net(input=x).square().sum(-1).mean().backward()
        assert torch.equal(trace[""].a_prev, x)


def test_hooks_of_others_have_their_say() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    net[0].register_forward_hook(lambda _, __, output: 3 * output)
    x = torch.randn(4, 3)
    trace = recorded(net, x)
    assert torch.equal(trace["0"].a_prev, 2 * x)
    assert_same([trace["1"].a_prev], [3 * trace["0"].z], rtol=1e-6)
    assert_gradients_are_those_of_autograd(trace, rtol=1e-5)


class TestChoosingLayers:
    @pytest.fixture
    def model(self) -> nn.Module:
        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Linear(4, 4))

        return nn.ModuleDict({"encoder": block(), "decoder": block()})

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            (None, ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]),
            (["decoder.0"], ["decoder.0"]),
            ("decoder.0", ["decoder.0"]),
            (["encoder.*"], ["encoder.0", "encoder.2"]),
            ([Linear], ["encoder.2", "decoder.2"]),
            (["decoder.2", "encoder.?"], ["encoder.0", "encoder.2", "decoder.2"]),
            (iter([Linear, "*.0"]), ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]),
        ],
    )  # fmt: skip
    def test_by_name_pattern_and_type(self, model: Any, layers: Any, expected: list[str]) -> None:
        with record(model, layers=layers) as trace:
            model["decoder"](model["encoder"](torch.randn(3, 4))).square().sum(-1).mean().backward()
        assert [layer.name for layer in trace.layers] == expected
        assert trace.chosen == (layers is not None)

    def test_refusals(self, model: Any) -> None:
        with pytest.raises(
            ValueError, match=r"must choose linear layers .* 'encoder.0', .*; got 'e'"
        ):
            record(model, layers=["e"])
        with pytest.raises(ValueError, match=r"got <class .*Bilinear'>"):
            record(model, layers=[nn.Bilinear])
        with pytest.raises(TypeError, match="layers must be names or types; got int"):
            record(model, layers=[3])  # type: ignore[list-item]


class TestElsewhere:
    """Parameters whose gradient the pairs do not have, or not all of it."""

    def test_other_layers(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        trace = recorded(net, torch.randn(5, 4))
        assert trace.elsewhere == ("1.weight", "1.bias")
        assert trace.per_sample_norms().shape == (5,)
        with pytest.raises(
            ValueError, match=r"got a model where that of '1.weight', '1.bias' comes"
        ):
            trace.clipped_grads(1.0)
        chosen = recorded(net, torch.randn(5, 4), layers=[nn.Linear])
        assert list(chosen.clipped_grads(1.0)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        net[1].requires_grad_(False)
        assert recorded(net, torch.randn(5, 4)).elsewhere == ()

    def test_a_weight_that_is_an_embedding_too(self) -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        model["head"].weight = model["embed"].weight

        words = torch.arange(6)

        def run(**options: Any) -> Trace:
            with record(model, **options) as trace:
                z = model["head"](model["embed"](words))
                F.cross_entropy(z, words).backward()
            return trace

        trace = run()
        assert trace.elsewhere == ("embed.weight",)
        for ask in (trace.per_sample_grads, trace.per_sample_norms):
            with pytest.raises(ValueError, match=r"got 'embed.weight', used elsewhere as well"):
                ask()
        assert list(run(layers="head").per_sample_grads()) == ["embed.weight"]

    def test_a_penalty_in_the_cost(self) -> None:
        layer = nn.Linear(4, 3)
        penalty = lambda z: z.square().sum(-1).mean() + layer.weight.square().sum()  # noqa: E731
        assert recorded(layer, torch.randn(5, 4), penalty).elsewhere == ("weight",)

    def test_attention_that_never_calls_its_layer(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        trace = recorded(model, torch.randn(3, 5, 8), lambda z: z.square().sum((1, 2)).mean())
        assert [layer.name for layer in trace.layers] == ["linear1", "linear2"]
        assert "self_attn.out_proj.weight" in trace.elsewhere
        assert "linear1.weight" not in trace.elsewhere
        with pytest.raises(
            KeyError, match=r"'self_attn.out_proj' is not in this trace: it did not"
        ):
            trace["self_attn.out_proj"]

    def test_pruning(self) -> None:
        net: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        prune.l1_unstructured(net[0], "weight", 0.5)
        trace = recorded(net, torch.randn(5, 4))
        assert torch.equal(trace["0"].w, net[0].weight)
        assert trace.elsewhere == ("0.weight_orig",)
        assert list(trace.per_sample_grads()) == ["0.bias", "1.weight", "1.bias"]


class TestReduction:
    @pytest.mark.parametrize("told", ["mean", "sum"])
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda r: lambda z: F.mse_loss(z, torch.zeros_like(z), reduction=r),
            lambda r: lambda z: F.binary_cross_entropy_with_logits(z, z.detach() * 0, reduction=r),
            lambda r: lambda z: F.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction=r),
            lambda r: lambda z: QuadraticCost(r)(z, torch.zeros_like(z)),
            lambda r: lambda z: SigmoidCrossEntropyCost(r)(z, torch.zeros_like(z)),
            lambda r: lambda z: SoftmaxCrossEntropyCost(r)(z, torch.zeros(4, dtype=torch.long)),
            lambda r: lambda z: getattr(z.square().sum(-1), r)(),
            lambda r: lambda z: getattr(z.square(), r)(),
            lambda r: lambda z: F.l1_loss(z, z.detach() + 1, reduction=r).mean(),
        ],
    )  # fmt: skip
    def test_a_plainly_wrong_one_is_refused(self, cost_of: Any, told: Any) -> None:
        net = nn.Sequential(nn.Linear(3, 2))
        x = torch.randn(4, 3)
        recorded(net, x, cost_of(told), reduction=told)
        other = {"mean": "sum", "sum": "mean"}[told]
        net.zero_grad()
        message = (
            f"reduction must be that of the cost; got '{told}', and a cost that is the {other}"
        )
        with pytest.raises(ValueError, match=message):
            recorded(net, x, cost_of(other), reduction=told)
        assert net[0].weight.grad is None

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: z.square().sum() / 4,
            lambda z: 4 * z.square().sum(-1).mean(),
            lambda z: torch.stack([c.mean() for c in z.square()]).sum(),
            lambda z: z.square().sum(-1).mean() + z.sum(),
            lambda z: torch.einsum("ij,ij->", z, z),
        ],
    )
    def test_where_it_does_not_show_what_is_told_is_believed(self, cost_of: Any) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 2), torch.randn(4, 3), cost_of, reduction=told)

    def test_of_one_sample_both_are_right(self) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 2), torch.randn(1, 3), lambda z: z.sum(), reduction=told)

    def test_an_output_given_for_it(self) -> None:
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'; got Tensor"):
            record(nn.Linear(3, 2), torch.randn(4, 3))  # type: ignore[arg-type]

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'; got 'none'"):
            record(nn.Linear(3, 2), "none")  # type: ignore[arg-type]


class TestRefusals:
    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"model must be an nn.Module; got function"):
            record(lambda x: x)  # type: ignore[arg-type]

    def test_no_linear_layer(self) -> None:
        with pytest.raises(
            ValueError, match=r"model must have linear layers, .*; got Conv1d, which"
        ):
            record(nn.Conv1d(3, 2, 1))

    def test_compiled_models(self) -> None:
        net = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(
            TypeError, match=r"model must not be compiled, .* got OptimizedModule ''"
        ):
            record(torch.compile(net))  # type: ignore[arg-type]
        net[0].compile()
        with pytest.raises(TypeError, match="got Linear '0'"):
            record(net)

    def test_a_second_pass(self) -> None:
        net = nn.Linear(3, 2)
        with record(net) as trace:
            net(torch.randn(4, 3)).square().sum(-1).mean().backward()
            delta = trace[""].delta.clone()
            assert net.weight.grad is not None
            before = net.weight.grad.clone()
            cost = net(torch.randn(4, 3)).square().sum(-1).mean()
            with pytest.raises(RuntimeError, match="record is of one backward pass, which has run"):
                cost.backward()
        assert torch.equal(net.weight.grad, before)
        assert torch.equal(trace[""].delta, delta)

    def test_no_pass(self) -> None:
        net = nn.Linear(3, 2)
        with (
            pytest.raises(RuntimeError, match=r"backward.. must run within the block"),
            record(net),
        ):
            cost = net(torch.randn(4, 3)).sum()
        cost.backward()
        message = "a linear layer of the model must run within the block"
        with pytest.raises(RuntimeError, match=message), record(net):
            pass
        with pytest.raises(RuntimeError, match=message), record(net), torch.no_grad():
            net(torch.randn(4, 3))
        other = torch.ones((), requires_grad=True)
        with pytest.raises(RuntimeError, match=r"backward.. must run within"), record(net):  # noqa: PT012
            net(torch.randn(4, 3))
            other.backward()


def test_an_input_that_a_frozen_layer_no_longer_has() -> None:
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
    assert trace["fc"].z.isnan().all()  # it was written over, and what it was made of, too
    assert trace.diagnostics()["fc"].dead_inputs is None
    assert_gradients_are_those_of_autograd(trace, rtol=1e-5)
    assert list(trace.per_sample_grads()) == ["inner.weight", "inner.bias"]
    with pytest.raises(RuntimeError, match="a_prev and delta must still be those of the pass"):
        trace["fc"].pair  # noqa: B018


def test_several_dimensions_and_a_single_sample(device: torch.device) -> None:
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


def test_parameters_that_functional_call_puts_in_place() -> None:
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


def test_a_gradient_and_then_a_pass_through_a_reentrant_checkpoint() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = recorded(net, x)
    with record(net) as trace:
        other = torch.ones((), requires_grad=True)
        checkpoint(lambda t: 2 * t, other, use_reentrant=True).backward()
        checkpoint(net, x, use_reentrant=True).square().sum(-1).mean().backward()
    for one, other_layer in zip(trace.layers, expected.layers, strict=True):
        assert_same(of(one), of(other_layer))
        assert list(map(type, one.activations)) == list(map(type, other_layer.activations))


def test_all_of_a_model_within_a_reentrant_checkpoint() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = recorded(net, x)
    with record(net) as trace:
        checkpoint(net, x, use_reentrant=True).square().sum(-1).mean().backward()
    for one, other in zip(trace.layers, expected.layers, strict=True):
        assert_same(of(one), of(other))


def test_converted_models_give_the_same(device: torch.device) -> None:
    net = net_of(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Sigmoid(), device=device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    expected = recorded(net, x)
    for fuse in (False, True):
        converted = copy.deepcopy(net)
        manual_bp.convert(converted, fuse=fuse)
        for one, other in zip(recorded(converted, x).layers, expected.layers, strict=True):
            assert_same(of(one), of(other))


def test_complex_layers() -> None:
    options: Any = {"dtype": torch.complex128}
    net = nn.Sequential(nn.Linear(4, 3, **options), nn.Tanh(), Linear(3, 2, **options))
    x = torch.randn(5, 4, dtype=torch.complex128)
    trace = recorded(net, x, lambda z: z.abs().square().sum(-1).mean())
    assert_gradients_are_those_of_autograd(trace)


def test_a_cost_of_ones_own() -> None:
    """A Cost is a module too, and no part of the model."""
    net = nn.Sequential(nn.Linear(4, 2))
    cost: Cost = QuadraticCost()
    with record(net) as trace:
        cost(net(torch.randn(3, 4)), torch.rand(3, 2)).backward()
    assert [layer.name for layer in trace.layers] == ["0"]


def assert_per_sample_follows(trace: Trace) -> None:
    """The mean of what each sample gave is what backward() left in `.grad`, of all parameters."""
    grads = trace.per_sample_grads()
    assert grads
    for parameter, name in trace.parameter_names.items():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_same([grads[name].mean(0)], [parameter.grad])


class Doing(nn.Module):
    """A linear layer, and something that is done with its z."""

    def __init__(self, layer: nn.Module, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.does = layer, does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.fc(x))


def scale_a_part(z: Tensor) -> Tensor:
    z[..., :2].mul_(3)
    return z


class TestZChangedInPlace:
    """F.linear gives a view where it has a bias and more, or fewer, than two dimensions."""

    @pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", [nn.Linear, Linear])
    @pytest.mark.parametrize(
        "does",
        [F.relu_, torch.sigmoid_, lambda z: z.add_(1), scale_a_part, lambda z: F.relu(z.mul_(-1))],
    )
    def test_any_shape(
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

    def test_twice_the_same_layer(self) -> None:
        layer = nn.Linear(4, 4, dtype=torch.float64)
        model = Doing(layer, lambda z: F.relu_(layer(F.relu_(z))))
        x = torch.randn(5, 3, 4, dtype=torch.float64)
        trace = recorded(model, x, lambda z: z.square().sum((1, 2)).mean())
        assert len(trace["fc"].calls) == 2
        assert_gradients_are_those_of_autograd(trace)
        assert_per_sample_follows(trace)

    def test_before_an_activation_it_is_not_what_the_activation_gets(self) -> None:
        for does in (lambda z: F.relu(z.add_(10)), lambda z: F.relu_(z.add_(10))):
            trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4) - 5)
            assert trace["fc"].activations == ()
            assert trace["fc"].a is trace["fc"].z
            assert trace.diagnostics()["fc"].off is None

    def test_an_activation_without_gradients_is_none_of_the_pass(self) -> None:
        def does(z: Tensor) -> Tensor:
            with torch.no_grad():
                torch.sigmoid(z).mean()
            return torch.tanh(z)

        trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4))
        assert list(map(type, trace["fc"].activations)) == [Tanh]

    def test_under_autocast(self, device: torch.device) -> None:
        model = Doing(nn.Linear(4, 3), F.relu_).to(device)
        x = torch.randn(5, 4, device=device)
        with torch.autocast(device.type, torch.bfloat16), record(model) as trace:
            model(x).float().square().sum(-1).mean().backward()
        w, b = (p.detach().bfloat16() for p in model.fc.parameters())
        assert torch.equal(trace["fc"].z, F.linear(x.bfloat16(), w, b))

    def test_results_are_not_in_the_precision_of_autocast(self, device: torch.device) -> None:
        model = Doing(nn.Linear(8, 9), F.relu_).to(device)
        x = torch.randn(5, 2, 8, device=device)  # of two rows, so that Gram's form is taken
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

    def test_of_a_fused_layer_whose_a_goes_two_ways(self) -> None:
        layer = LinearSigmoid(4, 3)
        trace = recorded(Doing(layer, lambda a: torch.tanh(a) * torch.relu(a)), torch.randn(5, 4))
        z = trace["fc"].z
        assert list(map(type, trace["fc"].activations)) == [Sigmoid]
        expected = F.linear(trace["fc"].a_prev, layer.weight, layer.bias)
        assert_same([z, trace["fc"].a], [expected, z.sigmoid()], rtol=1e-6)

    def test_when_the_weights_have_changed_too_it_is_not_made_up(self) -> None:
        model = Doing(nn.Linear(4, 3), F.relu_)
        with record(model) as trace:
            cost = model(torch.randn(5, 4)).square().sum(-1).mean()
            with torch.no_grad():
                model.fc.weight.mul_(2)  # type: ignore[operator]
            cost.backward()
        assert trace["fc"].z.isnan().all()
        assert_gradients_are_those_of_autograd(trace, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["in place", "fused"])
    def test_with_an_optimiser_that_steps_within_backward(self, kind: str) -> None:
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


class TestUsesOfAWeightElsewhere:
    """Whatever else ran in the block, a use that no pair tells of is noticed."""

    @pytest.mark.parametrize("extra_calls", [0, 1, 3])
    def test_calls_that_the_cost_does_not_depend_on_count_for_nothing(
        self, extra_calls: int
    ) -> None:
        layer = nn.Linear(4, 4)
        x = torch.randn(5, 4)
        with record(layer) as trace:
            for _ in range(extra_calls):
                layer(x)
            (layer(x).square().sum(-1).mean() + layer.weight.square().sum()).backward()
        assert trace.elsewhere == ("weight",)
        assert len(trace[""].calls) == 1

    @pytest.mark.parametrize("kind", [nn.Linear, Linear])
    def test_through_a_cast_that_autocast_makes_once(self, kind: Any, device: torch.device) -> None:
        layer = kind(4, 4, device=device)
        x = torch.randn(5, 4, device=device)
        for uses_again in (False, True):
            layer.zero_grad()
            with record(layer) as trace:
                with torch.autocast(device.type, torch.bfloat16):
                    z = layer(torch.tanh(layer(x)))
                    if uses_again:
                        z = F.linear(torch.tanh(z), layer.weight)
                z.float().square().sum(-1).mean().backward()
            assert trace.elsewhere == (("weight",) if uses_again else ())

    def test_what_a_reentrant_checkpoint_does_with_the_weights_of_layers_it_does_not_call(
        self,
    ) -> None:
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("linear" in name or "out_proj" in name)
        x = torch.randn(3, 5, 8, requires_grad=True)
        with record(encoder) as trace:
            y = checkpoint(encoder, x, use_reentrant=True)
            y.square().sum((1, 2)).mean().backward()
        assert trace.elsewhere == ("self_attn.out_proj.weight", "self_attn.out_proj.bias")
        with pytest.raises(ValueError, match=r"got a model where that of 'self_attn.out_proj"):
            trace.clipped_grads(1.0)


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Softplus])
def test_a_penalty_on_gradients(kind: Any, activation: Any) -> None:
    """Backward through backward uses the weights again, where no layer runs."""
    net = nn.Sequential(kind(3, 4), activation(), kind(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    net.zero_grad()
    with record(net) as trace:
        y = net(x)[:, 0]
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y + slope.square().sum(1)).mean().backward()
    assert trace.elsewhere == ("0.weight", "2.weight")
    with pytest.raises(ValueError, match=r"got '0.weight', '2.weight', used elsewhere as well"):
        trace.per_sample_norms()


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("none left")


def test_a_pass_that_failed_does_not_count() -> None:
    layer = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    with record(layer) as trace:
        cost = layer(FailsInBackward.apply(x)).square().sum(-1).mean()
        with pytest.raises(MemoryError):
            cost.backward()
        layer.zero_grad()
        layer(x).square().sum(-1).mean().backward()
    assert len(trace[""].calls) == 1
    assert_gradients_are_those_of_autograd(trace)


def test_what_learned_is_what_learned_then() -> None:
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


def test_nothing_that_learns() -> None:
    net = nn.Sequential(nn.Linear(4, 3).requires_grad_(False))
    trace = recorded(net, torch.randn(5, 4, requires_grad=True))
    assert trace["0"].delta.shape == (5, 3)
    with pytest.raises(ValueError, match="a layer of the trace must have a parameter that learns"):
        trace.per_sample_norms()


class TestHooksOfOthers:
    def test_on_z_before_it_gets_to_the_layer(self) -> None:
        def clamped(z: Tensor) -> Tensor:
            z.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            return z

        trace = recorded(Doing(nn.Linear(4, 3).double(), clamped), torch.randn(5, 4).double())
        assert trace["fc"].delta.abs().max() == 0.1
        assert_gradients_are_those_of_autograd(trace)

    def test_an_output_that_is_replaced_before_it_is_seen(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

        def triple(module: nn.Module, _: Any, output: Any) -> Any:
            return 3 * output if module is net[0] else None

        handle = nn.modules.module.register_module_forward_hook(triple)
        try:
            trace = recorded(net, torch.randn(5, 4))
        finally:
            handle.remove()
        assert [layer.name for layer in trace.layers] == ["2"]
        with pytest.raises(KeyError, match=r"'0' is not in this trace: .* not its product w a"):
            trace["0"]
        assert trace.elsewhere == ("0.weight", "0.bias")


class TestWhichPassCounts:
    def test_a_gradient_on_the_way_does_not(self) -> None:
        """As a penalty on gradients takes one, or a weighting of several costs."""
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        x = torch.randn(5, 4, dtype=torch.float64)
        with record(net) as trace:
            cost = net(x).square().sum(-1).mean()
            torch.autograd.grad(cost, list(net[2].parameters()), retain_graph=True)
            assert [layer.name for layer in trace.layers] == ["2"]
            cost.backward()
            torch.autograd.grad(net(x).sum(), list(net.parameters()))
        assert [layer.name for layer in trace.layers] == ["0", "2"]
        assert_gradients_are_those_of_autograd(trace)

    def test_nor_do_those_of_torch_func_and_of_batches_of_gradients(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        x = torch.randn(5, 4, dtype=torch.float64)

        def cost_of(parameters: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(net, parameters, (x,)).square().sum()  # type: ignore[no-any-return]

        with record(net) as trace:
            each = torch.func.vmap(torch.func.grad(cost_of), (None, 0))(parameters, x)
            z = net(x)
            torch.autograd.grad(
                z, list(net.parameters()), torch.ones(2, *z.shape).double(), is_grads_batched=True
            )
            net(x).square().sum(-1).mean().backward()
        assert [len(layer.calls) for layer in trace.layers] == [1, 1]
        assert_gradients_are_those_of_autograd(trace)
        found = trace.per_sample_grads()
        assert_same([found[name] for name in each], list(each.values()))

    def test_nor_one_of_another_model_within_a_reentrant_checkpoint(self) -> None:
        other, net = nn.Linear(4, 4), nn.Linear(4, 2)
        x = torch.randn(5, 4, requires_grad=True)
        with record(net) as trace:
            checkpoint(other, x, use_reentrant=True).sum().backward()
            net(x).square().sum(-1).mean().backward()
            checkpoint(other, x, use_reentrant=True).sum().backward()
        assert len(trace[""].calls) == 1
        assert_gradients_are_those_of_autograd(trace, rtol=1e-5)

    def test_of_a_vector(self) -> None:
        net = nn.Linear(4, 2).double()
        x, weights = torch.randn(5, 4).double(), torch.rand(5).double()
        with record(net, "sum") as trace:
            losses = net(x).square().sum(-1)
            losses.backward(weights)
        assert trace.cost.ndim == 0
        assert_same([trace.cost], [(losses * weights).sum()])
        assert "Trace(cost=" in repr(trace)
        assert_gradients_are_those_of_autograd(trace)

    def test_an_empty_trace_has_a_repr(self) -> None:
        net = nn.Linear(4, 2)
        with record(net) as trace:
            assert repr(trace) == "Trace(not filled yet)"
            recorded_ = net(torch.randn(5, 4)).square().sum(-1).mean()
            recorded_.backward()


def test_the_output_is_that_of_the_pass_and_holds_no_graph() -> None:
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


class TestMoreOnReductions:
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: (torch.tensor([0.3, 0.7]) * torch.stack([z.mean(), z.square().mean()])).sum(),
            lambda z: (z.square() / 2).sum(),
            lambda z: z.square().mean(0).sum(),
            lambda z: (z.mT @ z - torch.eye(2)).square().sum(),
            lambda z: (z.square().sum(1) * torch.tensor([0.2, 0.8])).sum(),
        ],
    )  # fmt: skip
    def test_sums_of_something_else_than_losses(self, cost_of: Any) -> None:
        """Each with as many terms as there are samples."""
        recorded(nn.Linear(3, 2), torch.randn(2, 3), cost_of)

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: z.square().sum().double(),
            lambda z: z.sigmoid().sub(1).abs().sum(),
            lambda z: F.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction="none").sum(),
            lambda z: QuadraticCost("none")(z, torch.zeros_like(z)).sum(),
            lambda z: z.square().sum(1).sum().sum(),
        ],
    )
    def test_sums_of_losses(self, cost_of: Any) -> None:
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        recorded(model, x, cost_of, reduction="sum")
        with pytest.raises(ValueError, match="got 'mean', and a cost that is the sum"):
            recorded(model, x, cost_of)


def test_a_trace_can_be_gone_through_and_asked_for_names() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trace = recorded(net, torch.randn(5, 4))
    assert list(trace) == list(trace.layers)
    assert "2" in trace
    assert "1" not in trace


def test_gradients_are_not_added_twice() -> None:
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


def test_no_choice_of_layers() -> None:
    with pytest.raises(
        ValueError, match=r"layers must choose at least one linear layer, .* got none"
    ):
        record(nn.Linear(3, 2), layers=[])


def test_tied_biases() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net.double()
    net[2].bias = net[0].bias
    trace = recorded(net, torch.randn(5, 4, dtype=torch.float64))
    assert_per_sample_follows(trace)
    assert "2.bias" not in trace.per_sample_grads()


class TestUnusualWays:
    def test_one_layer_with_two_weights(self) -> None:
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

    def test_a_bias_that_has_changed_too(self) -> None:
        model = Doing(nn.Linear(4, 3), F.relu_)
        model.fc.get_parameter("weight").requires_grad_(False)
        with record(model) as trace:
            cost = model(torch.randn(5, 4)).square().sum(-1).mean()
            with torch.no_grad():
                model.fc.get_parameter("bias").add_(1)
            cost.backward()
        assert not trace["fc"].calls[0].z_is_known
        assert trace["fc"].z.isnan().all()

    def test_an_unknown_z_is_not_said_to_be_broken(self) -> None:
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

    def test_a_part_is_as_old_as_the_whole(self) -> None:
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
    def test_diagnostics_of_what_was_written_over(self, name: str) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        trace = recorded(net, torch.randn(6, 4))
        getattr(trace["0"], name).zero_()
        with pytest.raises(RuntimeError, match=f"got {name} changed in place"):
            trace.diagnostics()

    def test_a_pass_within_the_pass(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        x = torch.randn(5, 4, dtype=torch.float64)

        def look(_: Tensor) -> None:
            handle.remove()  # once, and not within itself
            with torch.enable_grad():
                torch.autograd.grad(net(2 * x).square().sum(), list(net.parameters()))

        handle = net[0].get_parameter("weight").register_hook(look)
        trace = recorded(net, x)
        assert [len(layer.calls) for layer in trace.layers] == [1, 1]
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
    def test_a_z_of_which_more_is_used_than_its_activation(self, does: Any, shape: Any) -> None:
        trace = recorded(Doing(nn.Linear(4, 3), does), torch.randn(shape))
        assert trace["fc"].activations == ()
        assert trace["fc"].a is trace["fc"].z

    def test_gradients_of_some_parameters_only(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        bias = net[0].get_parameter("bias")
        with record(net) as trace:
            net(torch.randn(5, 4)).square().sum(-1).mean().backward(inputs=[bias])
        assert list(trace.per_sample_grads()) == ["0.bias"]
        assert trace["0"].grad_w is None
        assert_same([trace["0"].grad_b], [bias.grad], rtol=1e-6)  # type: ignore[list-item]

    def test_a_gradient_of_the_input_alone_is_not_the_pass(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        with record(net) as trace:
            net(x).sum().backward(inputs=[x])
            (slope,) = torch.autograd.grad(net(x).sum(), x)
            net(x + slope).square().sum(-1).mean().backward()
        assert [len(layer.calls) for layer in trace.layers] == [1, 1]
        assert_gradients_are_those_of_autograd(trace)

    def test_layers_are_in_the_order_of_the_pass(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        x = torch.randn(5, 4)
        with record(net) as trace:
            with torch.no_grad():
                net[1](x)
            net(x).square().sum(-1).mean().backward()
        assert [layer.name for layer in trace.layers] == ["0", "1"]

    def test_options_that_are_no_numbers(self) -> None:
        beta = torch.tensor(2.0)
        model = Doing(nn.Linear(4, 3), lambda z: F.softplus(z, beta))  # type: ignore[arg-type]
        assert recorded(model, torch.randn(5, 4))["fc"].activations == ()
        model = Doing(nn.Linear(4, 3), lambda z: F.relu(z, []))  # type: ignore[arg-type]
        assert recorded(model, torch.randn(5, 4))["fc"].activations == ()

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: z.square().sum(0).mean(),
            lambda z: z.abs().sum(-2).mean(),
            lambda z: z.log_softmax(0).square().sum(1).mean(),
        ],
    )
    def test_sums_over_samples_on_the_way(self, cost_of: Any) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 2), torch.randn(4, 3), cost_of, reduction=told)

    def test_several_costs_of_any_shape(self) -> None:
        layer = nn.Linear(3, 2)
        with record(layer) as trace:
            z = layer(torch.randn(4, 3))
            torch.autograd.backward([z.square().mean(), z.abs().mean().reshape(1)])
        assert trace.cost.shape == ()
        trace = recorded(
            layer, torch.randn(4, 3), lambda z: z.square().sum(-1).mean().reshape(1, 1)
        )
        assert trace.cost.shape == ()

    def test_a_function_whose_context_has_a_variable(self) -> None:
        class Kept(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.variable = x.detach()
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad

        model = Doing(nn.Linear(4, 3), Kept.apply)
        assert recorded(model, torch.randn(5, 4)).elsewhere == ()

    # PyTorch's, of what a compiled function is given, whatever is recorded.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_a_compiled_function_within(self) -> None:
        relu = torch.compile(lambda z: z.relu(), backend="eager", fullgraph=True)
        net = Doing(nn.Linear(4, 3), relu)
        assert_gradients_are_those_of_autograd(recorded(net, torch.randn(5, 4)), rtol=1e-5)

    def test_an_activation_that_is_not_known_may_be_off(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(), nn.Linear(3, 2))
        with torch.no_grad():
            net[0].get_parameter("bias").fill_(-1000)
        found = recorded(net, torch.randn(9, 4)).diagnostics()["0"]
        assert found.zeros == 1
        assert found.zeros_off == found.zeros_from_above == found.zeros_rounded == 0
        assert found.verdict.endswith("from above, or an unknown activation is off")


class RunsAgain(torch.autograd.Function):
    """Keeps its input alone, and runs a block again in backward: for its gradients, or by hand."""

    @staticmethod
    def forward(ctx: Any, block: Any, how: str, x: Tensor) -> Tensor:
        ctx.block, ctx.how = block, how
        ctx.save_for_backward(x.detach())
        return block(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        if ctx.how == "backward":
            torch.autograd.backward(y, grad)
        elif ctx.how == "method":
            y.backward(grad)
        elif ctx.how == "engine":  # which no mode sees
            options = (False, False, (), True, True)
            torch.autograd.Variable._execution_engine.run_backward((y,), (grad,), *options)
        else:
            parameters = list(ctx.block.parameters())
            x.grad, *grads = torch.autograd.grad(y, [x, *parameters], grad)
            for parameter, found in zip(parameters, grads, strict=True):
                parameter.grad = found if parameter.grad is None else parameter.grad + found
        return None, None, x.grad


class WithHidden(nn.Module):
    """A block whose gradients come from a backward within backward."""

    def __init__(self, *modules: nn.Module, how: str = "backward") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block, self.how = nn.Sequential(*modules), how
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = RunsAgain.apply(self.block, self.how, h) if self.how else self.block(h)
        return self.head(h)  # type: ignore[no-any-return]


def arrived_but_unsaid(model: nn.Module, trace: Trace) -> list[str]:
    """The parameters that have a `.grad`, which the trace neither has nor says it has not."""
    recorded_ = {p for layer in trace for p in (layer.w, layer.b)}
    return [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p not in recorded_ and name not in trace.elsewhere
    ]


class TestGradientsThatBackwardMakesByItself:
    """Whatever the node is called that runs a pass of its own within the pass."""

    X = torch.randn(5, 4, dtype=torch.float64)

    @pytest.mark.parametrize("how", ["backward", "method"])
    @pytest.mark.parametrize(
        "activation", [nn.Tanh(), nn.ReLU(inplace=True), Softplus(), nn.GELU()], ids=str
    )
    def test_layers_within_are_recorded(self, how: str, activation: nn.Module) -> None:
        model = WithHidden(nn.Linear(6, 6), activation, Linear(6, 6), how=how)
        trace = recorded(model, self.X)
        assert trace.elsewhere == ()
        assert trace.missed == {}
        assert_gradients_are_those_of_autograd(trace)
        assert_per_sample_follows(trace)
        model.how = ""
        expected = recorded(model, self.X)
        for one, other in zip(trace, expected, strict=True):
            assert_same(of(one), of(other))
            assert list(map(repr, one.activations)) == list(map(repr, other.activations))
        clipped = trace.clipped_grads(0.1)
        assert_same(list(clipped.values()), list(expected.clipped_grads(0.1).values()))

    @pytest.mark.parametrize("how", ["backward", "engine", "by hand"])
    @pytest.mark.parametrize("with_grad", [False, True])
    def test_what_is_not_recorded_is_elsewhere(self, how: str, with_grad: bool) -> None:
        model = WithHidden(nn.LayerNorm(6), nn.PReLU(), how=how)
        with record(model) as trace:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if with_grad else None
            model(self.X).square().sum(-1).mean().backward()
        assert arrived_but_unsaid(model, trace) == []
        assert trace.elsewhere == ("block.0.weight", "block.0.bias", "block.1.weight")
        with pytest.raises(ValueError, match="clipped_grads must have the whole gradient"):
            trace.clipped_grads(1.0)

    @pytest.mark.parametrize("how", ["engine", "by hand"])
    def test_layers_of_a_pass_that_cannot_be_seen_are_elsewhere(self, how: str) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh(), how=how)
        trace = recorded(model, self.X)
        assert "block.0" in trace.missed
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")

    @pytest.mark.parametrize("how", ["backward", "engine"])
    def test_a_weight_that_is_used_within_and_without(self, how: str) -> None:
        model = WithHidden(nn.Linear(6, 6), how=how)
        model.head = model.block[0]  # type: ignore[assignment]
        trace = recorded(model, self.X)
        if how == "backward":
            assert len(trace["head" if "head" in trace else "block.0"].calls) == 2
            assert trace.elsewhere == ()
            assert_per_sample_follows(trace)
        else:
            with pytest.raises(ValueError, match="a parameter's whole gradient must come from"):
                trace.per_sample_norms()

    def test_an_optimiser_that_steps_within_backward_hides_nothing(self) -> None:
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
            parameter.grad = None

        model = WithHidden(nn.LayerNorm(6), how="engine")
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        assert recorded(model, self.X).elsewhere == ("block.0.weight", "block.0.bias")

    def test_gradients_that_share_their_memory_are_not_written_by_hand(self) -> None:
        """As in the buckets of distributed training, where all have one version."""
        model = WithHidden(nn.Tanh(), how="")
        flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        for p, part in zip(
            model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad = part.view_as(p)
        with record(model) as trace:
            model(self.X).square().sum(-1).mean().backward()
        assert trace.elsewhere == ()
        assert flat.count_nonzero() > 0
        assert_gradients_are_those_of_autograd(trace)

    def test_a_pass_that_a_hook_runs(self) -> None:
        """It brings gradients of another cost, which are no sample's."""
        model = WithHidden(nn.Tanh(), how="")

        def penalise(_: Tensor) -> None:
            with torch.enable_grad():
                model.head.weight.square().sum().backward()

        with record(model) as trace:
            h = torch.tanh(model.first(self.X))
            h.register_hook(penalise)
            model.head(h).square().sum(-1).mean().backward()
        assert trace.elsewhere == ("head.weight",)

    def test_one_within_another(self) -> None:
        inner = WithHidden(nn.Linear(6, 6), nn.Tanh())

        class Outer(WithHidden):
            def forward(self, x: Tensor) -> Tensor:
                return RunsAgain.apply(inner, "backward", x)  # type: ignore[no-any-return]

        model = Outer(inner)
        x = self.X.clone().requires_grad_()
        trace = recorded(model, x)
        assert {layer.name for layer in trace} == {
            "block.0.first",
            "block.0.block.0",
            "block.0.head",
        }
        assert trace.elsewhere == ()
        assert_gradients_are_those_of_autograd(trace)

    def test_with_gradients_of_some_inputs_only(self) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh())
        with record(model) as trace:
            cost = model(self.X).square().sum(-1).mean()
            cost.backward(inputs=[model.first.weight])
        assert arrived_but_unsaid(model, trace) == []
        assert set(trace.per_sample_grads()) == {
            name for name, p in model.named_parameters() if p.grad is not None
        }

    def test_within_autograd_grad_it_is_in_grad_already(self) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh())
        with record(model) as trace:
            cost = model(self.X).square().sum(-1).mean()
            torch.autograd.grad(
                cost, list(model.head.parameters()) + list(model.first.parameters())
            )
        assert "block.0" not in trace
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")

    @pytest.mark.parametrize("how", ["by hand", "engine"])
    def test_of_a_block_that_runs_after_it_as_well(self, how: str) -> None:
        """What is written into .grad by hand then comes after what autograd brings there."""

        class Again(WithHidden):
            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.block(RunsAgain.apply(self.block, how, self.first(x))))  # type: ignore[no-any-return]

        trace = recorded(Again(nn.Linear(6, 6), nn.Tanh()), self.X)
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")
        with pytest.raises(ValueError, match="used elsewhere as well"):
            trace.per_sample_norms()

    def test_how_often_a_checkpoint_uses_a_weight_is_counted(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) @ self.fc.weight  # type: ignore[no-any-return]

        model, x = Tied(), torch.randn(5, 4, requires_grad=True)
        trace = recorded(Checkpointed(nn.Sequential(model, nn.Linear(4, 3)), True), x)
        assert trace.elsewhere == ("body.0.fc.weight",)

    def test_no_mode_is_left(self) -> None:
        model = WithHidden(nn.Tanh())
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        with record(model) as trace:
            with pytest.raises(MemoryError):
                model(FailsInBackward.apply(x)).square().sum(-1).mean().backward()
            assert len(torch.overrides._get_current_function_mode_stack()) == 1
            model.zero_grad()
            model(x).square().sum(-1).mean().backward()
        assert not torch.overrides.has_torch_function((x,))
        assert trace.elsewhere == ()

    def test_parameters_of_functional_call(self) -> None:
        net = nn.Linear(4, 3)
        fast = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        with record(net) as trace:
            z = torch.func.functional_call(net, fast, (torch.randn(5, 4),))
            (z.square().sum(-1).mean() + fast["weight"].square().sum()).backward()
        assert trace.elsewhere == ("weight",)


class TestAnEarlierGradient:
    """The trace is of the backward() that trains the model, or there is none."""

    @pytest.fixture
    def net(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    @staticmethod
    def adapted(net: nn.Module, x: Tensor, create_graph: bool) -> Tensor:
        """The cost after one step of gradient descent, as in MAML."""
        parameters: dict[str, Tensor] = dict(net.named_parameters())
        cost = torch.func.functional_call(net, parameters, (x,)).square().sum(1).mean()
        grads = torch.autograd.grad(cost, list(parameters.values()), create_graph=create_graph)
        fast = {
            name: p - 0.1 * grad for (name, p), grad in zip(parameters.items(), grads, strict=True)
        }
        return torch.func.functional_call(net, fast, (x,)).square().sum(1).mean()  # type: ignore[no-any-return]

    @pytest.mark.parametrize("by", ["backward", "grad"])
    def test_of_second_order(self, net: Any, by: str) -> None:
        x = torch.randn(6, 2, dtype=torch.float64)
        message = r"must reach a layer that can be .* several weights"
        with pytest.raises(RuntimeError, match=message), record(net) as trace:  # noqa: PT012
            cost = self.adapted(net, x, create_graph=True)
            if by == "backward":
                cost.backward()
            else:
                torch.autograd.grad(cost, list(net.parameters()))
        with pytest.raises(AttributeError, match="this trace has no layers yet"):
            trace.layers  # noqa: B018

    def test_of_first_order(self, net: Any) -> None:
        with record(net) as trace:
            cost = self.adapted(net, torch.randn(6, 2, dtype=torch.float64), create_graph=False)
            cost.backward()
        assert torch.equal(trace.cost, cost.detach())
        assert trace.is_assigned
        assert all(layer.grad_w is None for layer in trace)
        assert trace.elsewhere == ("0.weight", "0.bias", "2.weight", "2.bias")

    @staticmethod
    def penalise(activation: nn.Module) -> tuple[Trace, Tensor]:
        net = nn.Sequential(Linear(2, 8), activation, Linear(8, 1)).double()
        x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        with record(net) as trace:
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            cost = (slope.norm(dim=1) - 1).square().mean()
            cost.backward()
        return trace, cost.detach()

    @pytest.mark.parametrize("activation", [nn.Tanh(), Sigmoid()], ids=str)
    def test_a_penalty_alone(self, activation: Any) -> None:
        trace, cost = self.penalise(activation)
        assert torch.equal(trace.cost, cost)
        with pytest.raises(ValueError, match="used elsewhere as well"):
            trace.per_sample_norms()

    def test_a_penalty_alone_that_gets_to_no_z(self) -> None:
        with pytest.raises(RuntimeError, match="must reach a layer that can be recorded"):
            self.penalise(LeakyReLU())

    def test_of_the_input_after_one_of_the_parameters(self, net: Any) -> None:
        x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        with record(net) as trace:
            cost = net(x).square().sum(1).mean()
            torch.autograd.grad(cost, list(net.parameters()), retain_graph=True)
            torch.autograd.grad(net(2 * x).sum(), x)
        assert torch.equal(trace.cost, cost.detach())

    @pytest.mark.parametrize("is_first", [True, False])
    def test_a_penalty_on_weights_by_a_backward_of_its_own(self, net: Any, is_first: bool) -> None:
        x = torch.randn(6, 2, dtype=torch.float64)
        with record(net) as trace:
            if is_first:
                net[2].weight.square().sum().backward()
            net(x).square().sum(1).mean().backward()
            if not is_first:
                net[2].weight.square().sum().backward()
        assert trace.elsewhere == ("2.weight",)
        with pytest.raises(ValueError, match=r"got a model where that of '2.weight' comes from"):
            trace.clipped_grads(1.0)


class Towers(nn.Module):
    """Logits between N samples and C classes that the model describes."""

    def __init__(self, classes: int, kind: str) -> None:
        super().__init__()
        self.img, self.txt = nn.Linear(4, 6), nn.Linear(3, 6)
        self.kind = kind
        self.register_buffer("described", torch.randn(classes, 2, 3))
        self.register_buffer("indices", torch.randint(9, (classes,)))
        self.embed, self.norm = nn.Embedding(9, 3), nn.LayerNorm(3)
        self.context = nn.Parameter(torch.randn(1, 2, 3))
        self.double()

    def classes(self) -> Tensor:
        described: Any = self.described
        if self.kind == "buffer":
            return described[:, 0]  # type: ignore[no-any-return]
        if self.kind == "computed":
            return self.norm(described.mean(1) / 2)  # type: ignore[no-any-return]
        if self.kind == "embedded":
            return F.dropout(self.embed(self.indices), 0.0)
        shared = self.context.expand(len(described), -1, -1)  # a prompt, learned for all classes
        return torch.cat([described, shared], dim=1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.img(x) @ self.txt(self.classes()).mT  # type: ignore[no-any-return]


class Held(NamedTuple):
    x: Tensor


@dataclass
class Given:
    x: Tensor


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Positions(nn.Module):
    """Adds to (N, T, 4) what a layer makes of T positions, or of T prompts."""

    WAYS: ClassVar[dict[str, Callable[[Any, int], Tensor]]] = {
        "arange": lambda self, rows: self.embed(torch.arange(rows)),
        "sinusoids": lambda self, rows: torch.outer(torch.arange(rows), self.scales).sin(),
        "linspace": lambda self, rows: torch.linspace(0, 1, rows)[:, None] * self.scales,
        "one hot": lambda _, rows: F.one_hot(torch.arange(rows), 4).double(),
        "eye": lambda _, rows: torch.eye(rows, 4),
        "indexed": lambda self, rows: self.embed.weight[torch.arange(rows)],
        "joined": lambda self, rows: torch.cat([p[None] for p in self.embed.weight[:rows]]),
        "chunks": lambda self, rows: torch.cat(self.embed.weight[:rows].chunk(2)),
        "stacked": lambda self, rows: torch.stack(list(self.embed.weight[:rows])),
        "scaled": lambda self, rows: self.embed.weight[:rows] * torch.tensor(2.0),
        "scaled from the left": lambda self, rows: torch.tensor(2.0) * self.embed.weight[:rows],
        "in place": lambda self, rows: self.embed.weight[:rows].clone().mul_(2).tanh_(),
        "own function": lambda self, rows: Twice.apply(self.embed.weight[:rows]),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.pos, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scales", torch.rand(4))
        self.double()

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else x.x
        positions = self.WAYS[self.way](self, x.shape[1]).to(x.dtype)
        return torch.tanh(self.fc(x) + self.pos(positions)).mean(1)


class TestRowsThatAreNoSamples:
    @staticmethod
    def run(model: nn.Module, x: Tensor, **options: Any) -> Trace:
        y = torch.zeros(len(x), dtype=torch.long)
        return recorded(model, x, lambda z: F.cross_entropy(z, y), **options)

    @pytest.mark.parametrize("kind", ["buffer", "computed", "embedded", "prompt"])
    @pytest.mark.parametrize("classes", [5, 6])
    def test_the_models_own(self, kind: str, classes: int) -> None:
        model, x = Towers(classes, kind), torch.randn(6, 4, dtype=torch.float64)
        trace = self.run(model, x)
        assert [layer.has_samples for layer in trace] == [True, False]
        assert trace.samples == 6
        assert_gradients_are_those_of_autograd(trace)
        assert {"txt.weight", "txt.bias"} <= set(trace.elsewhere)
        assert "txt.weight" not in str(trace.diagnostics())  # as one that is not in the table
        found = trace.per_sample_grads()
        assert list(found) == ["img.weight", "img.bias"]
        for i in range(6):
            alone = self.run(model, x[i : i + 1])["img"]
            assert_same([found["img.weight"][i]], [alone.grad_w])  # type: ignore[list-item]
        assert [len(list(part)) for part in trace.split(4)] == [1, 1]
        with pytest.raises(ValueError, match=r"got a model where that of .*txt.weight"):
            trace.clipped_grads(1.0)
        with pytest.raises(ValueError, match="layer 'txt' must have samples in its input's first"):
            trace["txt"].per_sample_grad_w()
        assert list(self.run(model, x, layers="img").clipped_grads(1.0)) == list(found)
        with pytest.raises(ValueError, match=r"chosen must have samples .* got 'txt', named"):
            self.run(model, x, layers=["img", "txt"]).per_sample_norms()

    @pytest.mark.parametrize("way", Positions.WAYS)
    @pytest.mark.parametrize("wrap", [lambda x: x, Held, Given], ids=["tensor", "tuple", "object"])
    def test_positions_and_prompts_as_many_as_samples(self, way: str, wrap: Any) -> None:
        model, x = Positions(way), torch.randn(4, 4, 4, dtype=torch.float64)
        trace = recorded(model, wrap(x))
        assert {layer.name: layer.has_samples for layer in trace} == {"fc": True, "pos": False}
        found = trace.per_sample_grads()
        assert list(found) == ["fc.weight", "fc.bias"]
        for i in range(4):
            alone = recorded(model, wrap(x[i : i + 1]))["fc"].grad_w
            assert alone is not None
            assert_same([found["fc.weight"][i]], [alone])

    def test_an_optimiser_that_steps_within_backward(self) -> None:
        model: Any = Towers(6, "buffer")
        model.context = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
        model.classes = lambda: model.context
        x = torch.randn(6, 4, dtype=torch.float64)

        def step(p: Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad)  # type: ignore[arg-type]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        trace = self.run(model, x)
        assert [layer.has_samples for layer in trace] == [True, False]
        assert list(trace.per_sample_grads()) == ["img.weight", "img.bias"]

    def test_a_count_that_the_model_is_given_is_of_samples(self) -> None:
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        with record(net) as trace:
            net(torch.linspace(0, 1, 6)[:, None]).square().sum(-1).mean().backward()
        assert trace.per_sample_norms().shape == (6,)

    def test_numbers_that_choose_a_row_are_no_factors(self) -> None:
        """The id of one sample that came alone."""
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        trace = recorded(net, torch.tensor(3))
        assert trace["1"].has_samples

    def test_named(self) -> None:
        class Experts(nn.Module):
            """Each takes as many rows as it has slots, whosesoever they are."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)
                self.out, self.slots = nn.Linear(4, 2), 3

            def forward(self, x: Tensor) -> Tensor:
                h = self.first(x)
                taken = h.norm(dim=1).topk(self.slots, dim=0).indices
                return self.out(h.index_add(0, taken, self.expert(h[taken])))  # type: ignore[no-any-return]

        model = Experts()
        for slots in (6, 3):
            model.slots = slots
            trace = recorded(model, torch.randn(6, 4), no_samples="exp*")
            assert [layer.has_samples for layer in trace] == [True, False, True]
            assert trace.elsewhere == ("expert.weight", "expert.bias")
            assert list(trace.per_sample_grads()) == [
                "first.weight", "first.bias", "out.weight", "out.bias",
            ]  # fmt: skip
        with pytest.raises(ValueError, match=r"got 6 in 'first' and 3 in 'expert': name layers"):
            recorded(model, torch.randn(6, 4)).per_sample_norms()

    def test_named_wrongly(self) -> None:
        with pytest.raises(ValueError, match=r"no_samples must choose linear layers .* got 'txt'"):
            record(nn.Linear(3, 2), no_samples=["txt"])
        with pytest.raises(TypeError, match="no_samples must be names or types; got int"):
            record(nn.Linear(3, 2), no_samples=[3])  # type: ignore[list-item]

    @pytest.mark.parametrize("kind", ["expanded", "repeated", "zeros", "joined", "stacked"])
    def test_the_models_own_repeated_for_each_sample(self, kind: str) -> None:
        """As the first state of a recurrent network is, or the queries of an attention."""

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.outer = nn.Linear(5, 5), nn.Linear(4, 5)
                self.start = nn.Parameter(torch.randn(1, 5))

            def forward(self, x: Tensor) -> Tensor:
                starts = {
                    "expanded": lambda: self.start.expand(len(x), -1),
                    "repeated": lambda: self.start.repeat(len(x), 1),
                    "joined": lambda: torch.cat([self.start] * len(x)),
                    "stacked": lambda: torch.stack([self.start[0] * 1] * len(x)),
                    "zeros": lambda: torch.zeros(len(x), 5, dtype=x.dtype),
                }
                h = starts[kind]()
                for _ in range(2):
                    h = torch.tanh(self.inner(h) + self.outer(x))
                return h

        model = Recurrent().double()
        model.start.requires_grad_(False)
        for n in (6, 5):
            assert_per_sample_follows_but_frozen(recorded(model, torch.randn(n, 4).double()))

    def test_an_empty_list_says_that_all_have_samples(self) -> None:
        """As the codes of an auto-decoder are, one for each sample."""

        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.codes, self.fc = nn.Parameter(torch.randn(6, 3)), nn.Linear(3, 4)

            def forward(self, *noise: Tensor) -> Tensor:
                return sum(noise, self.fc(self.codes))

        model, x = Decoder().double(), torch.randn(6, 4).double()
        with pytest.raises(ValueError, match="must have samples in their input; got 'fc'"):
            recorded(model, x).per_sample_grads()
        assert list(recorded(model, x, no_samples=[]).per_sample_grads()) == [
            "fc.weight",
            "fc.bias",
        ]
        model.zero_grad()
        with record(model) as trace:  # and a model that is given nothing has no other samples
            model().square().sum(-1).mean().backward()
        assert trace.per_sample_norms().shape == (6,)

    @pytest.mark.parametrize("shape", [(3, 5, 4), (1, 5, 4)], ids=str)
    def test_samples_that_are_made_rows_within(self, shape: tuple[int, ...]) -> None:
        class Flat(nn.Module):
            def __init__(self, comes_back: bool) -> None:
                super().__init__()
                self.fc, self.comes_back = nn.Linear(4, 2), comes_back

            def forward(self, x: Tensor) -> Tensor:
                z = self.fc(x.flatten(0, 1))
                return z.unflatten(0, x.shape[:2]) if self.comes_back else z  # type: ignore[no-any-return]

        trace = recorded(Flat(comes_back=True), torch.randn(shape))
        n, rows = shape[0], shape[0] * shape[1]
        with pytest.raises(ValueError, match=f"got {rows} in 'fc' and {n} in the model"):
            trace.per_sample_norms()
        trace = recorded(Flat(comes_back=False), torch.randn(shape))
        assert trace.samples == rows  # what comes out is one cost a row

    @pytest.mark.parametrize("out", ["cost", "object", "one number a sample", "one a row"])
    def test_the_output_need_not_be_a_tensor_of_samples(self, out: str) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Any:
                z = self.fc(x.flatten(0, 1)).square().sum(-1)
                return {
                    "cost": z.mean(),
                    "object": Given(z.view(x.shape[:2])),
                    "one number a sample": z.view(x.shape[:2]).sum(1),
                    "one a row": z,
                }[out]

        model, x = Flat(), torch.randn(3, 5, 4)
        with record(model) as trace:
            z = model(x)
            (z.x if isinstance(z, Given) else z).mean().backward()
        if out == "one a row":
            assert trace.samples == 15
        else:
            with pytest.raises(ValueError, match="got 15 in 'fc' and 3 in the model's input and"):
                trace.per_sample_norms()

    def test_what_comes_out_tells_n_where_what_goes_in_does_not(self) -> None:
        class Bag(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.fc, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, words: Tensor) -> Tensor:
                return self.out(self.fc(self.embed(words)).unflatten(0, (-1, 3)).mean(1))  # type: ignore[no-any-return]

        trace = recorded(Bag(), torch.arange(6) % 5, layers="fc")
        with pytest.raises(ValueError, match="got 6 in 'fc' and 2 in the model's input and"):
            trace.per_sample_norms()

    def test_what_goes_in_and_out_need_not_agree(self) -> None:
        """Time first in, samples first within and out."""

        class Swaps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.transpose(0, 1)).sum(1)  # type: ignore[no-any-return]

        trace = recorded(Swaps(), torch.randn(7, 5, 4))
        assert trace.samples == 5
        assert trace.per_sample_norms().shape == (5,)


def assert_per_sample_follows_but_frozen(trace: Trace) -> None:
    assert trace.elsewhere == ()
    assert all(layer.has_samples for layer in trace)
    assert_per_sample_follows(trace)


LOG_PROBABILITIES = torch.randn(4, 3).log_softmax(1)
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])
CLASSES = torch.tensor([0, 2, 1, 0])
# Each loss of torch.nn that has a reduction, of z (4, 3), with the arguments that it takes.
LOSSES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "BCELoss": lambda loss: lambda z: loss(z.sigmoid(), z.detach().sigmoid()),
    "BCEWithLogitsLoss": lambda loss: lambda z: loss(z, z.detach().sigmoid()),
    "CTCLoss": lambda loss: (
        lambda z: loss(
            z.log_softmax(-1).unsqueeze(1).expand(4, 2, 3), torch.ones(2, 2).long(), (4, 4), (1, 2)
        )
    ),
    "CosineEmbeddingLoss": lambda loss: lambda z: loss(z, z.detach() + 1, SIGNS),
    "CrossEntropyLoss": lambda loss: lambda z: loss(z, CLASSES),
    "GaussianNLLLoss": lambda loss: lambda z: loss(z, z.detach() + 1, z.square() + 1),
    "HingeEmbeddingLoss": lambda loss: lambda z: loss(z, SIGNS[:, None].expand(4, 3)),
    "HuberLoss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "KLDivLoss": lambda loss: lambda z: loss(z.log_softmax(1), LOG_PROBABILITIES.exp()),
    "L1Loss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "MSELoss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "MarginRankingLoss": lambda loss: lambda z: loss(z[:, 0], z[:, 1], SIGNS),
    "MultiLabelMarginLoss": lambda loss: lambda z: loss(z, torch.tensor([[0, 1, -1]] * 4)),
    "MultiLabelSoftMarginLoss": lambda loss: lambda z: loss(z, z.detach().sigmoid().round()),
    "MultiMarginLoss": lambda loss: lambda z: loss(z, CLASSES),
    "NLLLoss": lambda loss: lambda z: loss(z.log_softmax(1), CLASSES),
    "PoissonNLLLoss": lambda loss: lambda z: loss(z, z.detach().exp()),
    "SmoothL1Loss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "SoftMarginLoss": lambda loss: lambda z: loss(z, SIGNS[:, None].expand(4, 3)),
    "TripletMarginLoss": lambda loss: lambda z: loss(z, z.detach() + 1, z.detach() - 1),
    "TripletMarginWithDistanceLoss": lambda loss: lambda z: loss(z, z + 1, z.detach() - 1),
}


class TestLossesOfTorch:
    def refuse_the_other(self, cost_of: Any, reduction: Any) -> None:
        model, x = nn.Linear(3, 3), torch.randn(4, 3)
        recorded(model, x, cost_of, reduction=reduction)
        other = {"mean": "sum", "sum": "mean"}[reduction]
        with pytest.raises(ValueError, match=f"got '{other}', and a cost that is the {reduction}"):
            recorded(model, x, cost_of, reduction=other)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", LOSSES)
    # PyTorch's, of KLDivLoss("mean"), which is the mean over components as well.
    @pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
    def test_each(self, name: str, reduction: Any) -> None:
        loss = getattr(nn, name)
        self.refuse_the_other(LOSSES[name](loss(reduction=reduction)), reduction)
        of_none = LOSSES[name](loss(reduction="none"))
        self.refuse_the_other(lambda z: getattr(of_none(z), reduction)(), reduction)
        # Weights of one's own may make either of it.
        for told in ("mean", "sum"):
            model, x = nn.Linear(3, 3), torch.randn(4, 3)
            recorded(model, x, lambda z: (of_none(z) / 4).sum(), reduction=told)

    def test_none_is_left_out(self) -> None:
        others = {"AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss", "NLLLoss2d"}
        assert {name for name in dir(nn) if name.endswith("Loss")} - others == set(LOSSES)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda r: lambda z: F.cross_entropy(z, CLASSES, reduction=r, label_smoothing=0.1),
            lambda r: lambda z: F.cross_entropy(z, LOG_PROBABILITIES.exp(), reduction=r),
            lambda r: lambda z: F.poisson_nll_loss(z, z.detach().exp(), reduction=r, full=True),
            lambda r: (
                lambda z: F.kl_div(
                    z.log_softmax(1),
                    LOG_PROBABILITIES,
                    reduction="batchmean" if r == "mean" else r,
                    log_target=True,
                )
            ),
            lambda r: lambda z: F.l1_loss(z, z.detach() + 1, None, None, r),
            lambda r: lambda z: F.huber_loss(z, z.detach() + 1, reduction=r).double(),
        ],
    )
    def test_in_other_forms(self, cost_of: Any, reduction: Any) -> None:
        self.refuse_the_other(cost_of(reduction), reduction)

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: F.binary_cross_entropy_with_logits(
                z, z.detach().sigmoid(), weight=torch.tensor(0.25), reduction="sum"
            ),
            lambda z: F.kl_div(z.log_softmax(1), LOG_PROBABILITIES, reduction="sum") / 4,
            lambda z: (
                F.cross_entropy(z, CLASSES, reduction="none").unflatten(0, (4, 1)).sum(0).mean()
            ),
            lambda z: F.mse_loss(z, z.detach() + 1, reduction="sum").mul_(0.25),
        ],
    )
    def test_where_it_may_be_either_what_is_told_is_believed(self, cost_of: Any) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 3), torch.randn(4, 3), cost_of, reduction=told)

    def test_of_one_sample_both_are_right_whatever_runs_first(self) -> None:
        model, x = Towers(5, "buffer"), torch.randn(1, 4, dtype=torch.float64)
        y = torch.zeros(1, dtype=torch.long)
        with record(model, "mean"):
            model.txt(model.classes())
            F.cross_entropy(model(x), y, reduction="sum").backward()
