"""An activation that is defined elsewhere, and registered by subclassing, is known everywhere."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp import QuadraticCost, TrainingStep, _require, backprop, convert, record, restore
from manual_bp.layers._activation import ACTIVATIONS, Activation, entry_point
from manual_bp.verify import CAPABILITIES, check_function, check_module
from tests.helpers import assert_same
from tests.training_step.networks import Reference, assert_follows, batch, network
from tests.training_step.test_export import exported, train


class ELUFunction(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, alpha: float, inplace: bool) -> Tensor:
        return F.elu(z, alpha, inplace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        z, ctx.alpha, inplace = inputs
        if inplace:
            ctx.mark_dirty(z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_a is None:
            return None, None, None
        (a,) = ctx.saved_tensors
        return torch.where(a <= 0, grad_a * (a + ctx.alpha), grad_a), None, None

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, _: None, __: None) -> Tensor:
        (a,) = ctx.saved_tensors
        return torch.where(a <= 0, dz * (a + ctx.alpha), dz)


def elu(z: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return _elu("z", z, alpha, inplace)


def check_options(alpha: float, _: bool) -> None:
    _require.at_least("alpha", alpha, 0)


_elu = entry_point(elu, ELUFunction, _require.real, check_options, in_place=True)


def define() -> Any:
    class ELU(Activation, nn.ELU, function=elu):
        def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
            super().__init__(alpha, inplace)
            self.require_options()

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return _elu("input", input, self.alpha, self.inplace)

        def require_options(self) -> None:
            check_options(self.alpha, self.inplace)

        @property
        def slope_bounds(self) -> tuple[float, float]:
            return 0.0, max(1.0, self.alpha)

        def sigma_prime(self, a: Tensor) -> Tensor:
            return torch.where(a > 0, 1, a + self.alpha)

        def sigma_prime_from_z(self, z: Tensor) -> Tensor:
            return torch.where(z > 0, 1, self.alpha * z.exp())

        def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
            self.require_options()
            alpha = self.alpha

            def times_sigma_prime_(grad_a: Tensor) -> None:
                is_line = a > 0
                grad_a.mul_(a.add_(alpha).masked_fill_(is_line, 1))

            return partial(F.elu_, a, alpha), times_sigma_prime_

    return ELU


@pytest.fixture(scope="module")
def new() -> Iterator[Any]:
    """The class ELU, registered while the tests of this file run."""
    known = list(ACTIVATIONS)
    kind = define()
    assert [*known, kind] == ACTIVATIONS
    yield kind
    ACTIVATIONS[:] = known


def draw(generator: torch.Generator) -> Any:
    return [(torch.randn(5, 3, generator=generator, dtype=torch.float64),)]


OPTIONS: Any = {"supports": CAPABILITIES - {"factory_kwargs"}, "in_dims": (0,), "slow": False}


def test_facts_are_derived_from_the_functional_form(new: Any) -> None:
    assert new.function is elu
    assert new.options == ("alpha",)
    assert set(new.functions) == {elu, F.elu, F.elu_}
    z = torch.ones(2, requires_grad=True)
    for function in (elu, F.elu):
        a = function(z)  # held, because PyTorch 2.11 drops the node of a Function with its output
        assert a.grad_fn is not None
        assert a.grad_fn.name().startswith(new.node_names)


def test_verification_kit_passes_the_function() -> None:
    check_function(elu, draw, F.elu, **OPTIONS).raise_if_failed()


def test_verification_kit_passes_the_module(new: Any) -> None:
    check_module(lambda: new(0.3), draw, lambda: nn.ELU(0.3), **OPTIONS).raise_if_failed()


def test_backprop_gives_the_gradients_of_autograd(new: Any) -> None:
    for activation in (new(0.3), nn.ELU(0.3), nn.ELU(0.3, inplace=True)):
        net, cost = network(activation), QuadraticCost()
        x, y = batch(net, cost, 8)
        cost(net(x), y).backward()
        expected = [p.grad for p in net.parameters()]
        trace = backprop(net, x, y, cost)
        trace.assign_grads()
        assert_same([p.grad for p in net.parameters()], expected)  # type: ignore[misc, arg-type]
        assert [type(activation) for layer in trace for activation in layer.activations] == [
            new
        ] * 3


def test_record_sees_the_module_and_the_functions(new: Any) -> None:
    z_to_a: list[Any] = [new(0.3), nn.ELU(0.3), partial(elu, alpha=0.3), partial(F.elu, alpha=0.3)]
    for activation in z_to_a:

        class Model(nn.Module):
            def __init__(self, activation: Any) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(7, 5).double(), nn.Linear(5, 3).double()
                self.activation = activation

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.activation(self.first(x)))  # type: ignore[no-any-return]

        model = Model(activation)
        x = torch.randn(8, 7, dtype=torch.float64)
        with record(model) as trace:
            model(x).square().mean().backward()
        (known,) = trace["first"].activations
        assert type(known) is new
        assert known.alpha == 0.3
        assert_same([trace["first"].a], [F.elu(trace["first"].z, 0.3)])


@pytest.mark.parametrize("total", ["mean", "sum"])
def test_record_refuses_the_wrong_reduction_behind_it(new: Any, total: str) -> None:
    other = {"mean": "sum", "sum": "mean"}[total]
    for activation in (new(), nn.ELU()):
        model = nn.Sequential(nn.Linear(7, 3), activation)
        with (
            pytest.raises(ValueError, match="reduction must be that of the cost"),
            record(model, reduction=other),  # type: ignore[arg-type]
        ):
            getattr(model(torch.randn(8, 7)), total)().backward()


@pytest.mark.parametrize("kind", ["ours", "torch.nn's"])
def test_training_step_follows_a_changed_option(new: Any, kind: str) -> None:
    net = network((new if kind == "ours" else nn.ELU)(0.3))
    cost = QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.5), Reference(net, cost, 0.5)
    for alpha in (0.3, 1.7, 0.9):
        for model in (net, reference.net):
            for module in model.modules():
                if isinstance(module, nn.ELU):
                    module.alpha = alpha
        x, y = batch(net, cost, 8)
        assert_same([step(x, y)], [reference(x, y)])
        assert_follows(net, reference.net)


def test_convert_and_restore_know_it(new: Any) -> None:
    model = nn.Sequential(nn.ELU(0.3, inplace=True))
    x = torch.randn(8, 7)
    expected = model(x.clone())
    report = convert(model)
    assert "1 ELU -> ELU" in str(report)
    assert type(model[0]) is new
    assert torch.equal(model(x.clone()), expected)
    restore(model)
    assert type(model[0]) is nn.ELU


def test_convert_leaves_an_option_that_it_refuses(new: Any) -> None:
    model = nn.Sequential(nn.ELU(-0.3))
    (left,) = convert(model).left
    assert left.reason == "its alpha must be at least 0; got -0.3"
    with pytest.raises(ValueError, match=r"alpha must be at least 0; got -0\.3"):
        new(-0.3)


def test_error_messages_name_the_argument(new: Any) -> None:
    with pytest.raises(TypeError, match=r"z must be a torch\.Tensor; got int"):
        elu(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor; got int"):
        new()(1)
    with pytest.raises(TypeError, match=r"an activation .*ELU"):
        backprop(nn.Sequential(nn.Dropout()), torch.ones(1), torch.ones(1), QuadraticCost())


def test_symbolic_tracing_records_the_public_function(new: Any) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), new(0.3))).graph
    assert "elu" in str(graph)
    traced = torch.fx.symbolic_trace(lambda z: elu(z, 0.3))
    (call,) = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert call.target is elu


def test_compiler_takes_the_module_whole(new: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(new(0.3), fullgraph=True, backend="aot_eager")
    z = torch.randn(5, 3, requires_grad=True)
    assert_same([compiled(z)], [F.elu(z, 0.3)], rtol=1e-6)


def test_exported_program_trains_as_autograd_and_sgd(new: Any, tmp_path: Path) -> None:
    net, cost = network(new(0.3)), QuadraticCost()
    reference = Reference(net, cost, 0.5)
    TrainingStep(net, cost, 0.5).export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    for samples in (8, 3):
        x, y = batch(net, cost, samples)
        found, parameters = program(x, y, torch.tensor(0.5, dtype=x.dtype), parameters)
        assert_same([found], [reference(x, y)])
    expected = dict(reference.net.named_parameters())
    assert_same(list(parameters.values()), [expected[name] for name in parameters])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_model_trains_as_autograd_and_sgd(new: Any, tmp_path: Path) -> None:
    step = TrainingStep(network(new(0.3), dtype=torch.float32), QuadraticCost(), 0.1)
    train(step, exported(step, tmp_path), 8)
