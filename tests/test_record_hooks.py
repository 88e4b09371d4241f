"""record beside what else is done with the model: copies, threads, replaced forwards, layouts."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from manual_bp import Linear, LinearSigmoid, Sigmoid, Trace, convert, record
from tests.helpers import assert_same


def cost(output: Tensor) -> Tensor:
    return output.square().sum(-1).mean()


def net_of(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).double()


def samples(n: int = 5, components: int = 4) -> Tensor:
    return torch.randn(n, components, dtype=torch.float64)


def recorded(model: nn.Module, x: Tensor) -> Trace:
    model.zero_grad()
    with record(model) as trace:
        cost(model(x)).backward()
    return trace


def assert_same_traces(one: Trace, other: Trace) -> None:
    assert [layer.name for layer in one] == [layer.name for layer in other]
    assert one.missed == other.missed
    assert one.elsewhere == other.elsewhere
    for this, that in zip(one, other, strict=True):
        for name in ("a_prev", "z", "a", "delta"):
            assert_same([getattr(this, name)], [getattr(that, name)])
    assert_same([one.output, one.cost], [other.output, other.cost])


def in_another_thread(work: Callable[[], Any]) -> Any:
    """What it returns, when it has run; an error in there is one here."""
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


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Named(nn.Linear):
    """A subclass that convert joins with ours."""


class WithAState(nn.Linear):
    """One that has its own idea of its state."""

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "is_loaded": True}


class WithAnOddState(nn.Linear):
    """One whose state is not the dictionary of its attributes."""

    def __getstate__(self) -> Any:
        return list(vars(self).items())

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(dict(state))


class WithACopy(nn.Linear):
    """One that copies itself."""

    def __deepcopy__(self, memo: Any) -> Any:
        twin = WithACopy(self.in_features, self.out_features, dtype=self.weight.dtype)
        twin.load_state_dict(self.state_dict())
        for key, hook in self._forward_hooks.items():
            twin._forward_hooks[key] = copy.deepcopy(hook, memo)
        return twin


class Shared(nn.Linear):
    """One that is shared by all copies."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def converted(model: nn.Sequential, fuse: bool = False) -> nn.Sequential:
    convert(model, fuse=fuse)
    return model


def two(layer: nn.Module) -> nn.Sequential:
    return net_of(layer, nn.Sigmoid(), nn.Linear(3, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: two(nn.Linear(4, 3)),
    "one layer": lambda: nn.Linear(4, 3).double(),
    "ours": lambda: net_of(Linear(4, 3), Sigmoid(), LinearSigmoid(3, 2)),
    "converted": lambda: converted(two(nn.Linear(4, 3))),
    "fused": lambda: converted(two(nn.Linear(4, 3)), fuse=True),
    "subclass": lambda: two(Named(4, 3)),
    "converted subclass": lambda: converted(two(Named(4, 3))),
    "state": lambda: two(WithAState(4, 3)),
}
# PyTorch refuses to pickle parametrized modules.
COPIED_ONLY: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: two(parametrizations.weight_norm(nn.Linear(4, 3))),
    "spectral norm": lambda: two(parametrizations.spectral_norm(nn.Linear(4, 3))),
    "converted weight norm": lambda: converted(two(parametrizations.weight_norm(nn.Linear(4, 3)))),
    "copies itself": lambda: two(WithACopy(4, 3)),
    "shared": lambda: two(Shared(4, 3)),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_a_file,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What there is of attributes, and of hooks, in all modules."""
    return {
        f"{name}.{key}": len(value) if "hooks" in key and hasattr(value, "__len__") else None
        for name, part in module.named_modules()
        for key, value in vars(part).items()
    }


class TestCopiesMadeWithinABlock:
    @pytest.mark.parametrize(
        ("model", "copied"),
        [(model, copied) for model in MODELS for copied in COPIES]
        + [(model, copied) for model in COPIED_ONLY for copied in ("deepcopy", "averaged")],
    )
    def test_are_as_those_made_outside(self, model: str, copied: str) -> None:
        net = (MODELS | COPIED_ONLY)[model]()
        copy_of = COPIES[copied]
        x = samples()
        outside = attributes(copy_of(net))
        before = attributes(net)
        expected = recorded(net, x)
        copies = []
        with record(net) as trace:
            copies.append(copy_of(net))
            output = net(x)
            copies.append(copy_of(net))
            cost(output).backward()
            copies.append(copy_of(net))
            if model != "shared":
                for one in copies:
                    assert attributes(one) == outside
                    assert_same([one(x)], [output], rtol=1e-6)  # spectral norm goes on
                    cost(one(x)).backward()
        if "spectral" not in model:
            assert_same_traces(trace, expected)
        assert attributes(net) == before
        for one in copies:
            assert attributes(one) == outside

    def test_shallow_ones(self) -> None:
        layer = nn.Linear(4, 3)
        with record(layer):
            twin = copy.copy(layer)
            assert not twin._forward_hooks
            cost(layer(torch.randn(5, 4))).backward()
        assert not layer._forward_hooks

    def test_a_state_that_is_no_dictionary(self) -> None:
        net = two(WithAnOddState(4, 3))
        x = samples()
        with record(net) as trace:
            output = net(x)
            twin = through_pickle(net)
            twin = copy.deepcopy(twin)
            assert_same([twin(x)], [output])
            cost(output).backward()
        assert len(trace["0"].calls) == 1
        assert not net[0]._forward_hooks
        assert_same([twin(x)], [output])

    def test_a_pickle_can_be_loaded_without_this_package(self) -> None:
        net = two(nn.Linear(4, 3))
        with record(net):
            assert b"manual_bp" not in pickle.dumps(net)
            cost(net(samples())).backward()

    def test_in_blocks_within_blocks(self) -> None:
        net = two(nn.Linear(4, 3))
        outside = attributes(net)
        x = samples()
        with record(net) as outer:
            with record(net[0]) as inner:
                assert attributes(copy.deepcopy(net)) == outside
                cost(net(x)).backward()
            assert attributes(copy.deepcopy(net)) == outside
            assert attributes(through_pickle(net)) == outside
        assert attributes(net) == outside
        assert_same([inner[""].delta], [outer["0"].delta])

    def test_hooks_of_others_stay_in_them(self) -> None:
        net = two(nn.Linear(4, 3))
        seen: list[str] = []
        handle = net[0].register_forward_hook(lambda *_: seen.append("called"))
        with record(net):
            twin = copy.deepcopy(net)
            cost(net(samples())).backward()
        seen.clear()
        twin(samples())
        assert seen == ["called"]
        handle.remove()
        assert not net[0]._forward_hooks
        assert len(twin[0]._forward_hooks) == 1


class Meanwhile(nn.Module):
    """Does something on the way, forward and backward."""

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
    """They use the model while a block records it, at any moment."""

    @pytest.mark.parametrize("does", ["forward", "both", "no_grad"])
    @pytest.mark.parametrize("layer", [nn.Linear, Linear])
    def test_are_not_seen(self, layer: Any, does: str) -> None:
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

    def test_between_a_product_and_its_being_noted(self) -> None:
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

    def test_a_layer_that_only_they_call_did_not_run(self) -> None:
        net = two(nn.Linear(4, 3))
        with record(net) as trace:
            in_another_thread(lambda: net(samples()))
            cost(net[0](samples())).backward()
        assert trace.missed == {"2": "it did not run"}

    def test_each_with_a_block_of_its_own(self) -> None:
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

    def test_all_at_the_same_time(self) -> None:
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
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, traces in found.items():
            assert len(traces) == 20
            for trace in traces:
                assert_same_traces(trace, expected[number])
        assert not any(module._forward_hooks for module in net.modules())

    def test_what_autograd_runs_in_a_thread_of_its_own_is_of_the_block(self) -> None:
        # Beyond 60 backward passes within one another, it changes threads.
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

    def test_a_pass_that_runs_in_another_thread_is_asked_for(self) -> None:
        net = two(nn.Linear(4, 3))
        message = "in its thread, with gradients on; none did"
        with pytest.raises(RuntimeError, match=message), record(net):
            in_another_thread(lambda: cost(net(samples())).backward())
        message = r"backward\(\) must run .* in its thread"
        with pytest.raises(RuntimeError, match=message), record(net):
            in_another_thread(cost(net(samples())).backward)


class TestABlockIsEnteredOnce:
    def test_and_not_again(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with block as trace:
            cost(net(samples())).backward()
        message = r"must be entered once, .* call record again"
        with pytest.raises(RuntimeError, match=message), block:
            pass
        assert len(trace.layers) == 2
        assert not net[0]._forward_hooks

    def test_nor_within_itself(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with block as trace:
            with pytest.raises(RuntimeError, match="must be entered once"):
                block.__enter__()
            cost(net(samples())).backward()
        assert len(trace.layers) == 2
        assert not net[0]._forward_hooks

    def test_nor_after_a_failure(self) -> None:
        net = two(nn.Linear(4, 3))
        block = record(net)
        with pytest.raises(ArithmeticError), block:
            raise ArithmeticError
        with pytest.raises(RuntimeError, match="must be entered once"), block:
            pass


class OfTanh(nn.Linear):
    """Its product is of another input than its own."""

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
    """What counts is the product that was seen, whoever called it."""

    @pytest.mark.parametrize("model", ["torch", "ours", "converted", "fused", "subclass"])
    @pytest.mark.parametrize("how_many", ["first", "all"])
    def test_wrapped_on_the_object(self, model: str, how_many: str) -> None:
        net = MODELS[model]()
        x = samples()
        expected = recorded(net, x)
        for module in list(net.modules())[:: -1 if how_many == "all" else 1]:
            wrap_forward(module)
        trace = recorded(net, x)
        assert_same_traces(trace, expected)
        assert trace.elsewhere == ()

    def test_of_another_input(self) -> None:
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

    def test_of_a_weight_that_is_computed(self) -> None:
        trace = recorded(two(Masked(4, 3)), samples())
        assert trace["0"].grad_w is None
        assert trace.elsewhere == ("0.weight",)

    def test_whose_output_is_no_product(self) -> None:
        trace = recorded(two(Doubled(4, 3)), samples())
        assert list(trace.missed) == ["0"]
        assert "what came out was not its product w a + b" in trace.missed["0"]
        assert trace.elsewhere == ("0.weight", "0.bias")

    @pytest.mark.parametrize("changes", [Tensor.relu_, lambda z: z.mul_(2), lambda z: z.add_(1)])
    def test_whose_product_is_changed_in_place(self, changes: Callable[[Tensor], Tensor]) -> None:
        class Changed(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:  # noqa: A002
                return changes(super().forward(input))

        trace = recorded(two(Changed(4, 3)), samples())
        assert list(trace.missed) == ["0"]
        assert "what came out was not its product w a + b" in trace.missed["0"]
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

    def test_within_a_reentrant_checkpoint(self) -> None:
        net = two(OfTanh(4, 3))
        x = samples().requires_grad_()
        with record(net) as trace:
            cost(checkpoint(net, x, use_reentrant=True)).backward()
        with record(net) as expected:
            cost(net(x)).backward()
        assert_same_traces(trace, expected)

    def test_if_there_is_no_product_at_all_the_error_says_why(self) -> None:
        with pytest.raises(RuntimeError, match=r"not its product w a \+ b: a hook, or a forward"):
            recorded(Doubled(4, 3).double(), samples())
        handle = nn.modules.module.register_module_forward_hook(lambda _, __, z: 3 * z)
        try:
            with pytest.raises(RuntimeError, match=r"not its product w a \+ b"):
                recorded(nn.Linear(4, 3).double(), samples())
        finally:
            handle.remove()


class TestLayouts:
    # PyTorch's own, that these are new to it.
    @pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
    @pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc"])
    def test_a_sparse_input_counts_as_the_dense_one(self, layout: str) -> None:
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

    def test_a_z_that_is_written_over(self) -> None:
        dense = samples(6)
        net = net_of(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        assert_same_traces(recorded(net, dense.to_sparse()), recorded(net, dense))

    def test_a_nested_one_is_refused(self) -> None:
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
    def test_have_no_gradients(self, layer: Any, name: str, way: str) -> None:
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
