"""What is recorded of a call of a layer, for all ways to call it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manual_bp import (
    Linear,
    LinearSigmoid,
    Trace,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    Checkpointed,
    Doing,
    assert_gradients_are_those_of_autograd,
    assert_same_traces,
    cost,
    net_of,
    of,
    recorded,
    samples,
    two,
)
from tests.record.test_hooks import MODELS


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


def test_each_run_of_a_layer_is_a_call_and_tied_weights_are_one(device: torch.device) -> None:
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


def test_frozen_parameters_have_no_gradient(device: torch.device) -> None:
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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_in_a_checkpoint_count_once(use_reentrant: bool, device: torch.device) -> None:
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


def test_a_reentrant_checkpoint_of_something_else_may_come_before() -> None:
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


def test_a_whole_model_in_a_reentrant_checkpoint_is_recorded() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = recorded(net, x)
    with record(net) as trace:
        checkpoint(net, x, use_reentrant=True).square().sum(-1).mean().backward()
    for one, other in zip(trace.layers, expected.layers, strict=True):
        assert_same(of(one), of(other))


def test_a_model_may_be_called_with_keywords() -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with record(net) as trace:
        net(input=x).square().sum(-1).mean().backward()
    assert torch.equal(trace[""].a_prev, x)


def test_hooks_of_others_change_input_and_output_first() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    net[0].register_forward_hook(lambda _, __, output: 3 * output)
    x = torch.randn(4, 3)
    trace = recorded(net, x)
    assert torch.equal(trace["0"].a_prev, 2 * x)
    assert_same([trace["1"].a_prev], [3 * trace["0"].z], rtol=1e-6)
    assert_gradients_are_those_of_autograd(trace, rtol=1e-5)


class TestHooksOfOthers:
    def test_delta_is_what_tensor_hooks_on_z_left_of_it(self) -> None:
        def clamped(z: Tensor) -> Tensor:
            z.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            return z

        trace = recorded(Doing(nn.Linear(4, 3).double(), clamped), torch.randn(5, 4).double())
        assert trace["fc"].delta.abs().max() == 0.1
        assert_gradients_are_those_of_autograd(trace)

    def test_a_layer_whose_output_a_global_hook_replaces_is_missed(self) -> None:
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


class OfTanh(nn.Linear):
    """Its product has another input than the layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        z: Tensor = F.linear(torch.tanh(input), bias=self.bias, weight=self.weight)
        return z


class Masked(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        z: Tensor = F.linear(input, self.weight.tril(), self.bias)
        return z


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def wrap_forward(module: nn.Module) -> None:
    """As accelerate does, to move weights and inputs between devices."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


class TestForwardsOfTheirOwn:
    """The product that was seen counts, whether or not the forward does more."""

    @pytest.mark.parametrize("model", ["torch", "ours", "converted", "fused", "subclass"])
    @pytest.mark.parametrize("how_many", ["first", "all"])
    def test_a_wrapped_forward_changes_nothing(self, model: str, how_many: str) -> None:
        net = MODELS[model]()
        x = samples()
        expected = recorded(net, x)
        for module in list(net.modules())[:: -1 if how_many == "all" else 1]:
            wrap_forward(module)
        trace = recorded(net, x)
        assert_same_traces(trace, expected)
        assert trace.elsewhere == ()

    def test_the_input_of_the_product_is_recorded(self) -> None:
        net, plain = (
            two(OfTanh(4, 3)),
            net_of(nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)),
        )
        plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
        x = samples()
        trace, expected = recorded(net, x), recorded(plain, x)
        assert_same([trace["0"].a_prev, trace["0"].z], [expected["1"].a_prev, expected["1"].z])
        assert_same(
            list(trace.per_sample_grads().values()), list(expected.per_sample_grads().values())
        )

    def test_a_computed_weight_is_elsewhere(self) -> None:
        trace = recorded(two(Masked(4, 3)), samples())
        assert trace["0"].grad_w is None
        assert trace.elsewhere == ("0.weight",)

    def test_a_layer_whose_output_is_not_its_product_is_missed(self) -> None:
        trace = recorded(two(Doubled(4, 3)), samples())
        assert list(trace.missed) == ["0"]
        assert "its output was not its product w a + b" in trace.missed["0"]
        assert trace.elsewhere == ("0.weight", "0.bias")

    @pytest.mark.parametrize("changes", [Tensor.relu_, lambda z: z.mul_(2), lambda z: z.add_(1)])
    def test_a_layer_that_changes_its_product_in_place_is_missed(
        self, changes: Callable[[Tensor], Tensor]
    ) -> None:
        class Changed(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:  # noqa: A002
                return changes(super().forward(input))

        trace = recorded(two(Changed(4, 3)), samples())
        assert list(trace.missed) == ["0"]
        assert "its output was not its product w a + b" in trace.missed["0"]
        assert trace.elsewhere == ("0.weight", "0.bias")

        net = two(nn.Linear(4, 3))

        def change(module: nn.Module, _: Any, z: Tensor) -> None:
            if module is net[0]:
                changes(z)

        handle = nn.modules.module.register_module_forward_hook(change)
        try:
            assert recorded(net, samples()).missed == trace.missed
        finally:
            handle.remove()

    def test_a_custom_forward_is_seen_in_a_reentrant_checkpoint(self) -> None:
        net = two(OfTanh(4, 3))
        x = samples().requires_grad_()
        with record(net) as trace:
            cost(checkpoint(net, x, use_reentrant=True)).backward()
        with record(net) as expected:
            cost(net(x)).backward()
        assert_same_traces(trace, expected)

    def test_the_error_says_why_no_layer_has_a_product(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"not its product w a \+ b: a hook, or a custom forward"
        ):
            recorded(Doubled(4, 3).double(), samples())
        handle = nn.modules.module.register_module_forward_hook(lambda _, __, z: 3 * z)
        try:
            with pytest.raises(RuntimeError, match=r"not its product w a \+ b"):
                recorded(nn.Linear(4, 3).double(), samples())
        finally:
            handle.remove()


class TestLayouts:
    # PyTorch warns that these layouts are in beta.
    @pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
    @pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc"])
    def test_a_sparse_input_is_recorded_as_the_dense_one(self, layout: str) -> None:
        dense = samples(6) * (torch.rand(6, 4) > 0.5)
        sparse = {
            "coo": dense.to_sparse(),
            "uncoalesced": (0.5 * dense).to_sparse() + (0.5 * dense).to_sparse(),
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
        }[layout]
        net = two(nn.Linear(4, 3))
        expected = recorded(net, dense)
        trace = recorded(net, sparse)
        assert_same_traces(trace, expected)
        for name, grad in expected.per_sample_grads().items():
            assert_same([trace.per_sample_grads()[name]], [grad])
        assert_same([trace.per_sample_norms()], [expected.per_sample_norms()])
        assert_same(
            list(trace.clipped_grads(0.1).values()), list(expected.clipped_grads(0.1).values())
        )
        for part, of_dense in zip(trace.split(2), expected.split(2), strict=True):
            assert_same([part["0"].a_prev], [of_dense["0"].a_prev])
        assert str(trace.diagnostics()) == str(expected.diagnostics())

    def test_z_of_an_overwritten_sparse_input_keeps_its_old_values(self) -> None:
        dense = samples(6)
        net = net_of(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        assert_same_traces(recorded(net, dense.to_sparse()), recorded(net, dense))

    def test_a_nested_input_is_refused(self) -> None:
        net = two(nn.Linear(4, 3))
        nested = torch.nested.nested_tensor([samples(3), samples(5)], layout=torch.jagged)
        message = "the input of layer '0' must be a dense tensor; got a nested tensor"
        with pytest.raises(TypeError, match=message), record(net, reduction="sum"):
            net(nested)
        assert not net[0]._forward_hooks
        net(nested)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
    def test_a_sparse_weight_is_refused(self) -> None:
        layer = nn.Linear(4, 3)
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
        message = "the weight of layer '' must be a dense tensor; got layout torch.sparse_csr"
        with pytest.raises(TypeError, match=message), record(layer):
            layer(torch.randn(5, 4))


def as_buffer(layer: nn.Module, name: str) -> nn.Module:
    value = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, value)
    return layer


class TestBuffers:
    """Frozen layers may hold their weights as buffers."""

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("layer", [nn.Linear, Linear, LinearSigmoid])
    @pytest.mark.parametrize("way", ["plain", "reentrant", "not reentrant"])
    def test_weights_held_as_buffers_have_no_gradient(
        self, layer: Any, name: str, way: str
    ) -> None:
        net = net_of(nn.Linear(4, 3), as_buffer(layer(3, 3), name), nn.Linear(3, 2))
        frozen = copy.deepcopy(net)
        value = getattr(frozen[1], name)
        delattr(frozen[1], name)
        setattr(frozen[1], name, nn.Parameter(value, requires_grad=False))
        x = samples().requires_grad_()

        def trace_of(net: nn.Module) -> Trace:
            with record(net) as trace:
                if way == "plain":
                    cost(net(x)).backward()
                else:
                    cost(checkpoint(net, x, use_reentrant=way == "reentrant")).backward()
            return trace

        trace, expected = trace_of(net), trace_of(frozen)
        assert len(trace.layers) == 3
        assert getattr(trace["1"], "grad_w" if name == "weight" else "grad_b") is None
        for this, that in zip(trace, expected, strict=True):
            assert_same([this.a_prev, this.z, this.delta], [that.a_prev, that.z, that.delta])
        assert trace.elsewhere == ()
        assert f"1.{name}" not in trace.per_sample_grads()
        assert_same([trace.per_sample_norms()], [expected.per_sample_norms()])
