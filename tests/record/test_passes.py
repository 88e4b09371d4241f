"""Which backward pass fills a trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manual_bp import (
    LeakyReLU,
    Linear,
    Sigmoid,
    Trace,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    FailsInBackward,
    assert_gradients_are_those_of_autograd,
    net_of,
    of,
    recorded,
)


class TestWaysToCallBackward:
    def test_autograd_backward_and_grad_fill_the_trace(self) -> None:
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

    def test_with_create_graph_delta_has_no_graph(self) -> None:
        net = net_of(nn.Linear(4, 3), nn.Sigmoid(), device=torch.device("cpu"))
        x = torch.randn(5, 4, dtype=torch.float64)
        with record(net) as trace:
            torch.autograd.grad(net(x).sum(-1).mean(), list(net.parameters()), create_graph=True)
        assert not trace["0"].delta.requires_grad

    def test_passes_of_other_tensors_do_not_count(self) -> None:
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


def test_a_second_backward_is_refused_before_it_runs() -> None:
    net = nn.Linear(3, 2)
    with record(net) as trace:
        net(torch.randn(4, 3)).square().sum(-1).mean().backward()
        delta = trace[""].delta.clone()
        assert net.weight.grad is not None
        before = net.weight.grad.clone()
        cost = net(torch.randn(4, 3)).square().sum(-1).mean()
        with pytest.raises(RuntimeError, match="must run one backward pass; got a second one"):
            cost.backward()
    assert torch.equal(net.weight.grad, before)
    assert torch.equal(trace[""].delta, delta)


class TestWhichPassCounts:
    def test_autograd_grad_before_backward_does_not_count(self) -> None:
        """A penalty on gradients needs one, and so does a weighting of several costs."""
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

    def test_torch_func_and_batched_gradients_do_not_count(self) -> None:
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

    def test_a_pass_of_another_model_does_not_count(self) -> None:
        other, net = nn.Linear(4, 4), nn.Linear(4, 2)
        x = torch.randn(5, 4, requires_grad=True)
        with record(net) as trace:
            checkpoint(other, x, use_reentrant=True).sum().backward()
            net(x).square().sum(-1).mean().backward()
            checkpoint(other, x, use_reentrant=True).sum().backward()
        assert len(trace[""].calls) == 1
        assert_gradients_are_those_of_autograd(trace, rtol=1e-5)

    def test_backward_of_a_vector_counts_with_its_gradient(self) -> None:
        net = nn.Linear(4, 2).double()
        x, weights = torch.randn(5, 4).double(), torch.rand(5).double()
        with record(net, "sum") as trace:
            losses = net(x).square().sum(-1)
            losses.backward(weights)
        assert trace.cost.ndim == 0
        assert_same([trace.cost], [(losses * weights).sum()])
        assert "Trace(cost=" in repr(trace)
        assert_gradients_are_those_of_autograd(trace)


class TestAnEarlierGradient:
    """The backward() that trains the model fills the trace; if it cannot, there is none."""

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
    def test_second_order_maml_reaches_no_layer_that_can_be_recorded(
        self, net: Any, by: str
    ) -> None:
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

    def test_first_order_maml_has_its_parameters_elsewhere(self, net: Any) -> None:
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
    def test_after_a_penalty_alone_per_sample_results_are_refused(self, activation: Any) -> None:
        trace, cost = self.penalise(activation)
        assert torch.equal(trace.cost, cost)
        with pytest.raises(ValueError, match="used elsewhere as well"):
            trace.per_sample_norms()

    def test_a_penalty_that_reaches_no_z_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="must reach a layer that can be recorded"):
            self.penalise(LeakyReLU())

    def test_a_gradient_of_the_input_does_not_replace_one_of_parameters(self, net: Any) -> None:
        x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        with record(net) as trace:
            cost = net(x).square().sum(1).mean()
            torch.autograd.grad(cost, list(net.parameters()), retain_graph=True)
            torch.autograd.grad(net(2 * x).sum(), x)
        assert torch.equal(trace.cost, cost.detach())

    @pytest.mark.parametrize("is_first", [True, False])
    def test_a_penalty_with_its_own_backward_is_elsewhere(self, net: Any, is_first: bool) -> None:
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


def test_autograd_grad_in_a_hook_does_not_count() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def look(_: Tensor) -> None:
        handle.remove()  # so that it does not run within itself
        with torch.enable_grad():
            torch.autograd.grad(net(2 * x).square().sum(), list(net.parameters()))

    handle = net[0].get_parameter("weight").register_hook(look)
    trace = recorded(net, x)
    assert [len(layer.calls) for layer in trace.layers] == [1, 1]
    assert_gradients_are_those_of_autograd(trace)


def test_backward_for_some_inputs_gives_only_their_gradients() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    bias = net[0].get_parameter("bias")
    with record(net) as trace:
        net(torch.randn(5, 4)).square().sum(-1).mean().backward(inputs=[bias])
    assert list(trace.per_sample_grads()) == ["0.bias"]
    assert trace["0"].grad_w is None
    assert_same([trace["0"].grad_b], [bias.grad], rtol=1e-6)  # type: ignore[list-item]


def test_a_gradient_of_the_input_alone_does_not_count() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    with record(net) as trace:
        net(x).sum().backward(inputs=[x])
        (slope,) = torch.autograd.grad(net(x).sum(), x)
        net(x + slope).square().sum(-1).mean().backward()
    assert [len(layer.calls) for layer in trace.layers] == [1, 1]
    assert_gradients_are_those_of_autograd(trace)


def test_the_cost_of_a_trace_has_no_dimensions() -> None:
    layer = nn.Linear(3, 2)
    with record(layer) as trace:
        z = layer(torch.randn(4, 3))
        torch.autograd.backward([z.square().mean(), z.abs().mean().reshape(1)])
    assert trace.cost.shape == ()
    trace = recorded(layer, torch.randn(4, 3), lambda z: z.square().sum(-1).mean().reshape(1, 1))
    assert trace.cost.shape == ()
