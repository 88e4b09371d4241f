"""The block: it changes nothing, leaves nothing behind, and is entered once."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from manual_bp import (
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Sigmoid,
    Trace,
    record,
)
from tests.helpers import assert_same, only_new_objects
from tests.record.recording import (
    Doing,
    FailsInBackward,
    WithHidden,
    assert_gradients_are_those_of_autograd,
    cost,
    of,
    recorded,
    samples,
    two,
)


class TestNothingIsChanged:
    def test_gradients_weights_and_random_numbers_stay_the_same(self, device: torch.device) -> None:
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
    def test_hooks_are_removed_after_an_exception(self, where: str) -> None:
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

    def test_hooks_are_removed_after_the_block(self) -> None:
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
        gc.disable()  # memory that only the collector would free counts as a leak
        try:
            with only_new_objects():
                for _ in range(1000):
                    use()
                    assert [reference() for reference in held] == [None, None]
                assert len(gc.get_objects()) <= 20
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

    def test_spectral_norm_takes_no_extra_step(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Sigmoid())
        other = copy.deepcopy(net)
        x = torch.randn(5, 4)
        trace = recorded(net, x)
        other(x).square().sum(-1).mean().backward()
        for this, that in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(this, that)
        assert_same([trace["0"].z], [F.linear(x, trace["0"].w, trace["0"].b)], rtol=1e-6)
        assert trace["0"].grad_w is None  # w is computed, and not a parameter
        assert trace.elsewhere == ("0.parametrizations.weight.original",)


class TestABlockIsEnteredOnce:
    def test_a_block_cannot_be_entered_again(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with block as trace:
            cost(net(samples())).backward()
        message = r"must be entered once, .* call record again"
        with pytest.raises(RuntimeError, match=message), block:
            pass
        assert len(trace.layers) == 2
        assert not net[0]._forward_hooks

    def test_a_block_cannot_be_entered_within_itself(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with block as trace:
            with pytest.raises(RuntimeError, match="must be entered once"):
                block.__enter__()
            cost(net(samples())).backward()
        assert len(trace.layers) == 2
        assert not net[0]._forward_hooks

    def test_a_block_cannot_be_entered_after_a_failure(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with pytest.raises(ArithmeticError), block:
            raise ArithmeticError
        with pytest.raises(RuntimeError, match="must be entered once"), block:
            pass


def test_leaving_the_block_without_a_pass_is_refused() -> None:
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


def test_the_trace_can_be_used_within_the_block() -> None:
    net = nn.Linear(3, 2)
    with record(net) as trace:
        with pytest.raises(AttributeError, match="this trace has no layers yet: record fills"):
            trace.layers  # noqa: B018
        net(torch.randn(4, 3)).square().sum(-1).mean().backward()
        assert trace.per_sample_norms().shape == (4,)


def test_an_empty_trace_has_a_repr() -> None:
    net = nn.Linear(4, 2)
    with record(net) as trace:
        assert repr(trace) == "Trace(not filled yet)"
        recorded_ = net(torch.randn(5, 4)).square().sum(-1).mean()
        recorded_.backward()


def test_no_mode_is_left_after_a_pass_that_failed() -> None:
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


# PyTorch warns of the inputs of a compiled function, with or without record.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_function_may_run_within() -> None:
    relu = torch.compile(lambda z: z.relu(), backend="eager", fullgraph=True)
    net = Doing(nn.Linear(4, 3), relu)
    assert_gradients_are_those_of_autograd(recorded(net, torch.randn(5, 4)), rtol=1e-5)
