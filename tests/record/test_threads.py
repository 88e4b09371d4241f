"""Other threads that use the model while a block records it."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manual_bp import (
    Linear,
    Trace,
    record,
)
from manual_bp.record import _passes
from tests.helpers import assert_same
from tests.record.recording import (
    assert_same_traces,
    cost,
    net_of,
    recorded,
    samples,
    two,
)


def in_another_thread(work: Callable[[], Any]) -> Any:
    """Runs work in another thread, and returns its result or raises its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class Meanwhile(nn.Module):
    """Calls work in forward and again in backward."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.work = work
        self.is_busy = False

    def forward(self, z: Tensor) -> Tensor:
        if not self.is_busy:
            self.is_busy = True
            self.work()
            if z.requires_grad:
                z.register_hook(lambda _: self.work())
        return z


class TestOtherThreads:
    """They may use the model at any moment while a block records it."""

    @pytest.mark.parametrize("does", ["forward", "both", "no_grad"])
    @pytest.mark.parametrize("layer", [nn.Linear, Linear])
    def test_other_threads_are_not_recorded(self, layer: Any, does: str) -> None:
        def work() -> None:
            other = samples(7)
            if does == "no_grad":
                with torch.no_grad():
                    net(other)
            elif does == "forward":
                net(other)
            else:
                torch.autograd.grad(cost(net(other)), list(net.parameters()))

        def twice() -> None:
            in_another_thread(work)

        middle = Meanwhile(twice)
        middle.is_busy = True
        net = net_of(layer(4, 3), middle, nn.Sigmoid(), layer(3, 2))
        x = samples()
        expected = recorded(net, x)
        middle.is_busy = False
        with record(net) as trace:
            twice()
            output = net(x)
            twice()
            cost(output).backward()
            twice()
        assert_same_traces(trace, expected)
        assert [len(layer.calls) for layer in trace] == [1, 1]

    def test_a_thread_between_a_product_and_its_hook_is_not_recorded(self) -> None:
        net = two(nn.Linear(4, 3))
        x = samples()
        expected = recorded(net, x)
        main = threading.get_ident()

        def meanwhile(module: nn.Module, *_: Any) -> None:
            if threading.get_ident() == main and isinstance(module, nn.Linear):
                in_another_thread(lambda: net(samples(7)))

        handle = nn.modules.module.register_module_forward_hook(meanwhile)
        try:
            trace = recorded(net, x)
        finally:
            handle.remove()
        assert_same_traces(trace, expected)

    def test_a_layer_called_only_in_another_thread_did_not_run(self) -> None:
        net = two(nn.Linear(4, 3))
        with record(net) as trace:
            in_another_thread(lambda: net(samples()))
            cost(net[0](samples())).backward()
        assert trace.missed == {"2": "it did not run"}

    def test_each_thread_may_have_its_own_block(self) -> None:
        net = two(nn.Linear(4, 3))
        x, other = samples(), samples(7)
        expected, of_other = recorded(net, x), recorded(net, other)
        found: list[Trace] = []
        with record(net) as trace:
            output = net(x)
            found.append(in_another_thread(lambda: recorded(net, other)))
            cost(output).backward()
        assert_same_traces(trace, expected)
        assert_same_traces(found[0], of_other)
        assert not net[0]._forward_hooks

    def test_threads_may_record_at_the_same_time(self) -> None:
        net = two(nn.Linear(4, 3))
        inputs = [samples(n) for n in (3, 5, 7)]
        expected = [recorded(net, x) for x in inputs]
        found: dict[int, list[Any]] = {number: [] for number in range(len(inputs))}

        def run(number: int) -> None:
            try:
                for _ in range(20):
                    with record(net) as trace:
                        cost(net(inputs[number])).backward()
                    found[number].append(trace)
            except BaseException as error:
                found[number].append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in found]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        for number, traces in found.items():
            assert len(traces) == 20
            for trace in traces:
                assert_same_traces(trace, expected[number])
        assert not any(module._forward_hooks for module in net.modules())

    def test_threads_of_autograd_are_recorded(self) -> None:
        # Autograd changes threads when more than 60 passes are nested.
        net = two(nn.Linear(4, 3))
        x = samples().requires_grad_()
        threads: set[int] = set()

        def deep(x: Tensor, depth: int) -> Any:
            if depth:
                return checkpoint(deep, x, depth - 1, use_reentrant=True)
            threads.add(threading.get_ident())
            return net(x)

        expected = recorded(net, x)
        with record(net) as trace:
            cost(deep(x, 70)).backward()
        assert len(threads) == 2
        for this, that in zip(trace, expected, strict=True):
            assert_same([this.a_prev, this.z, this.delta], [that.a_prev, that.z, that.delta])

    @pytest.mark.parametrize("is_known", [True, False])
    def test_layers_that_threads_of_autograd_run_are_clipped_as_all_others(
        self, is_known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if PyTorch does not show which threads run the pass."""
        if not is_known:
            monkeypatch.setattr(_passes, "running_pass", lambda: 0)
        net = two(nn.Linear(4, 3))
        x = samples().requires_grad_()

        def deep(x: Tensor, depth: int) -> Any:
            return checkpoint(deep, x, depth - 1, use_reentrant=True) if depth else net(x)

        expected = recorded(net, x).clipped_grads(0.1)
        with record(net) as trace:
            cost(deep(x, 70)).backward()
        found = trace.clipped_grads(0.1)
        assert found.keys() == expected.keys()
        assert_same(list(found.values()), list(expected.values()))

    def test_a_pass_of_another_thread_while_one_runs_is_not_recorded(self) -> None:
        """Not even if autograd runs that pass in a thread that Python did not start."""
        net = two(nn.Linear(4, 3))
        x, other = samples(), samples(7).requires_grad_()
        expected = recorded(net, x)

        def deep(x: Tensor, depth: int) -> Any:
            return checkpoint(deep, x, depth - 1, use_reentrant=True) if depth else net(x)

        def run_deep(_: Tensor) -> None:
            handle.remove()
            in_another_thread(lambda: torch.autograd.backward(cost(deep(other, 70))))

        net.zero_grad()
        with record(net) as trace:
            output = net(x)
            handle = output.register_hook(run_deep)
            cost(output).backward()
        assert_same_traces(trace, expected)

    def test_a_pass_in_another_thread_is_refused(self) -> None:
        net = two(nn.Linear(4, 3))
        message = "in its thread, with gradients on; none did"
        with pytest.raises(RuntimeError, match=message), record(net):
            in_another_thread(lambda: cost(net(samples())).backward())
        message = r"backward\(\) must run .* in its thread"
        with pytest.raises(RuntimeError, match=message), record(net):
            in_another_thread(cost(net(samples())).backward)
