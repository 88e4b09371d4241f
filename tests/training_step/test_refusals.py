"""What a step refuses, and that a refusal changes nothing."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from manual_bp import (
    CapturedStep,
    CompiledStep,
    Cost,
    Linear,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from tests.training_step.networks import (
    Autograd,
    assert_same_state,
    batch,
    network,
    values,
)


class Misshapen(Autograd):
    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        return super().gradient(output, y)[0]


def test_misshapen_gradient_is_refused() -> None:
    net = network()
    before = values(net)
    step = TrainingStep(net, Misshapen(), 0.1)
    with pytest.raises(
        ValueError, match=r"Misshapen.gradient\(output, y\) must have shape \(4, 3\)"
    ):
        step(*batch(net, step.cost, 4))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def sequential(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def tied() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def shared_memory() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net.get_parameter("2.weight").data = net.get_parameter("0.weight").data
    return net


def twice() -> nn.Sequential:
    layer = Linear(3, 3)
    return sequential(layer, Sigmoid(), layer)


def expanded() -> nn.Sequential:
    net = sequential(Linear(3, 2))
    net.get_parameter("0.weight").data = torch.ones(1, 3).expand(2, 3)
    return net


def with_memory(*views: Tensor) -> nn.Sequential:
    """3 by 3 layers without biases, with these weights."""
    net = nn.Sequential(*(Linear(3, 3, bias=False, dtype=v.dtype) for v in views))
    for layer, view in zip(net, views, strict=True):
        layer.weight = nn.Parameter(view)
    return net


def overlapping_in_part() -> nn.Sequential:
    memory = torch.randn(20)
    return with_memory(memory[:9].view(3, 3), memory[8:17].view(3, 3))


def transposed_tie() -> nn.Sequential:
    w = torch.randn(3, 3)
    return with_memory(w, w.t())


def overlapping_itself() -> nn.Sequential:
    return with_memory(torch.randn(20).as_strided((3, 3), (2, 1)))


def a_bias_within_a_weight() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net[2].bias = nn.Parameter(net.get_parameter("0.weight").detach()[1])
    return net


def frozen_overlapped_by_learning() -> nn.Sequential:
    net = overlapping_in_part()
    net[0].requires_grad_(False)
    return net


def made_in_inference_mode() -> nn.Sequential:
    with torch.inference_mode():
        return sequential(Linear(3, 2))


NET: Any = sequential(Linear(3, 2))


NO_NET: Any = Linear(3, 2)


NO_COST: Any = nn.MSELoss()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TrainingStep(NO_NET, QuadraticCost(), 0.1),
            TypeError,
            "net must be an nn.S",
        ),
        (lambda: TrainingStep(NET, NO_COST, 0.1), TypeError, "cost must be a manual_bp.Cost"),
        (
            lambda: TrainingStep(NET, QuadraticCost("none"), 0.1),
            ValueError,
            "cost must be reduced by 'mean' or 'sum'; got reduction='none'",
        ),
        (lambda: TrainingStep(NET, QuadraticCost(), -1), ValueError, "lr must be at least 0; got"),
        (
            lambda: TrainingStep(NET, QuadraticCost(), float("nan")),
            ValueError,
            "lr must be at least 0; got nan",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), float("inf")),
            ValueError,
            "lr must be finite; got inf",
        ),
        (
            lambda: TrainingStep(
                sequential(Linear(3, 2), nn.LeakyReLU(-0.5)), QuadraticCost(), 0.1
            ),
            ValueError,
            "negative_slope must be at least 0; got -0.5",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), nn.Softplus(0.0)), QuadraticCost(), 0.1),
            ValueError,
            "beta must not be 0; got 0.0",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2, device="meta")), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have values to train; got a meta tensor",
        ),
        (
            lambda: TrainingStep(expanded(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have memory for each of its elements; got an expanded tensor",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), "0.1"),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got str",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=-0.1),
            ValueError,
            "momentum must be at least 0; got -0.1",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=-0.1),
            ValueError,
            "weight_decay must be at least 0; got -0.1",
        ),
        (
            lambda: TrainingStep(tied(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must share no memory with another .* got the memory of 0.w",
        ),
        (
            lambda: TrainingStep(shared_memory(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must share no memory with another parameter",
        ),
        (
            lambda: TrainingStep(twice(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must share no memory with another parameter",
        ),
        (
            lambda: TrainingStep(overlapping_in_part(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must share no memory with another .* got memory that overlaps 0.w",
        ),
        (
            lambda: TrainingStep(transposed_tie(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must share no memory with another .* got the memory of 0.w",
        ),
        (
            lambda: TrainingStep(a_bias_within_a_weight(), QuadraticCost(), 0.1),
            ValueError,
            "2.bias of net must share no memory with another .* got memory that overlaps 0.w",
        ),
        (
            lambda: TrainingStep(frozen_overlapped_by_learning(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must share no memory with another parameter",
        ),
        (
            lambda: TrainingStep(overlapping_itself(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have memory for each .* got one that overlaps itself, strides",
        ),
        (
            lambda: TrainingStep(made_in_inference_mode(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must be made outside of inference mode",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 10**400),
            ValueError,
            "lr must be a number that fits into a float; got one beyond",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=10**5000),
            ValueError,
            "momentum must be a number that fits",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=Fraction(10**400)),  # type: ignore[arg-type]
            ValueError,
            "weight_decay must be a number that fits",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1e39),
            ValueError,
            r"lr must be at most 3\.40.*e\+38, the largest number of torch.float32; got 1e\+39",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=1e39),
            ValueError,
            "momentum must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=1e39),
            ValueError,
            "weight_decay must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1e20, weight_decay=1e20),
            ValueError,
            r"lr \* weight_decay must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), torch.tensor(0.1)),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got Tensor",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1j),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got complex",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), Softplus(1, 5)), QuadraticCost(), 0.1),
            ValueError,
            "threshold must be at least 20",
        ),
        (
            lambda: TrainingStep(
                sequential(Linear(3, 2, dtype=torch.cfloat)), QuadraticCost(), 0.1
            ),
            TypeError,
            "0.weight of net must be of float16, bfloat16, float32 or float64; got torch.complex64",
        ),
        (
            lambda: TrainingStep(sequential(nn.LazyLinear(2)), QuadraticCost(), 0.1),
            TypeError,
            r"net\['0'\].weight must be initialised",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), nn.Dropout()), QuadraticCost(), 0.1),
            TypeError,
            r"net\['1'\] must be a Linear",
        ),
    ],
)
def test_constructor_refuses(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


GOOD_X, GOOD_Y = torch.zeros(4, 7).double(), torch.zeros(4, 3).double()


NESTED = torch.nested.nested_tensor([torch.zeros(3).double()], layout=torch.jagged)


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            GOOD_X.float(),
            GOOD_Y,
            TypeError,
            r"x must have the dtype of net\['0'\].weight, .*64; got",
        ),
        (GOOD_X.numpy(), GOOD_Y, TypeError, "x must be a torch.Tensor; got ndarray"),
        (GOOD_X.tolist(), GOOD_Y, TypeError, "x must be a torch.Tensor; got list"),
        (GOOD_X.long(), GOOD_Y, TypeError, "x must have a real floating-point dtype; got"),
        (GOOD_X.to_sparse(), GOOD_Y, TypeError, "x must be a dense tensor; got layout"),
        (GOOD_X[:, :5], GOOD_Y, ValueError, r"x must have last dimension 7, the in_features of"),
        (GOOD_X[0, 0], GOOD_Y, ValueError, "x must have at least one dimension"),
        (GOOD_X.to("meta"), GOOD_Y, ValueError, "x must be on the device of"),
        (
            GOOD_X,
            GOOD_Y.float(),
            TypeError,
            "y must have the dtype of the output, torch.float64; got",
        ),
        (
            GOOD_X,
            GOOD_Y[:3],
            ValueError,
            r"y must have shape \(4, 3\), that of the output; got \(3, 3\)",
        ),
        (
            GOOD_X,
            GOOD_Y[:, :1],
            ValueError,
            r"y must have shape \(4, 3\), that of the output; got \(4, 1\)",
        ),
        (GOOD_X, GOOD_Y.numpy(), TypeError, "y must be a torch.Tensor; got ndarray"),
        (GOOD_X, GOOD_Y.tolist(), TypeError, "y must be a torch.Tensor; got list"),
        (GOOD_X, GOOD_Y.to_sparse(), TypeError, "y must be a dense tensor; got layout"),
        (GOOD_X, GOOD_Y.to("meta"), ValueError, "y must be on the device of the output"),
        (GOOD_X, NESTED, TypeError, "y must be a dense tensor; got a nested tensor"),
        (NESTED, GOOD_Y, TypeError, "x must be a dense tensor; got a nested tensor"),
    ],
)
def test_refused_batch_changes_nothing(
    x: Any, y: Any, error: type[Exception], message: str, is_warm: bool
) -> None:
    net = network()
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)
    if is_warm:
        step(GOOD_X, GOOD_Y)
    before = values(net)
    with pytest.raises(error, match=message):
        step(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def with_short_bias(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(torch.ones(1))


def with_bias_matrix(step: TrainingStep) -> None:
    step.net[2].bias = nn.Parameter(torch.ones(1, 6))


def with_weight_vector(step: TrainingStep) -> None:
    step.net[2].weight = nn.Parameter(torch.ones(5))


def with_weights_stacked(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.ones(2, 5, 7))


def with_another_width(step: TrainingStep) -> None:
    step.net[0] = Linear(7, 4)


def with_another_dtype(step: TrainingStep) -> None:
    step.net[0].double()


def partly_on_meta(step: TrainingStep) -> None:
    step.net[0].to("meta")


def partly_inference(step: TrainingStep) -> None:
    with torch.inference_mode():
        step.net[0] = Linear(7, 5)


def partly_expanded(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(torch.ones(1).expand(5))


def partly_overlapping_itself(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.randn(40).as_strided((5, 7), (2, 1)))


def partly_overlapping(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(step.net.get_parameter("4.weight").detach()[1, :5])


def partly_sparse(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.eye(5, 7).to_sparse())


def with_half_the_range(step: TrainingStep) -> None:
    step.lr = 1e5
    step.net.half()


def with_a_slope_beyond_all(step: TrainingStep) -> None:
    step.net[1] = nn.LeakyReLU(1e39)


def with_a_low_threshold(step: TrainingStep) -> None:
    step.net[1] = nn.Softplus(1.0, 5.0)


def pruned(step: TrainingStep) -> None:
    prune.random_unstructured(step.net[0], "weight", amount=0.5)


def unreduced(step: TrainingStep) -> None:
    step.cost.reduction = "none"


def fail(*_: Any) -> Any:
    raise ArithmeticError("no cost today")


def whose_forward_fails(step: TrainingStep) -> None:
    step.cost.forward = fail  # type: ignore[assignment, method-assign]


def whose_gradient_fails(step: TrainingStep) -> None:
    step.cost.gradient = fail  # type: ignore[assignment, method-assign]


class InPlaceFails(QuadraticCost):
    def bind(self, a: Tensor, delta: Tensor) -> Any:
        error_, weight = super().bind(a, delta)
        return lambda y: fail(error_(y)), weight


def whose_in_place_fails(step: TrainingStep) -> None:
    step.cost.__class__ = InPlaceFails
    step.net[1] = Tanh()  # a change that is noticed, so that the cost is bound again


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    "change",
    [
        with_short_bias,
        with_bias_matrix,
        with_weight_vector,
        with_weights_stacked,
        with_another_width,
        with_another_dtype,
        partly_on_meta,
        partly_inference,
        partly_expanded,
        partly_overlapping_itself,
        partly_overlapping,
        partly_sparse,
        with_half_the_range,
        with_a_slope_beyond_all,
        with_a_low_threshold,
        pruned,
        unreduced,
        whose_forward_fails,
        whose_gradient_fails,
        whose_in_place_fails,
    ],
)
def test_error_changes_no_parameter_velocity_or_number(change: Any, is_warm: bool) -> None:
    """A second try does not continue from half of the first either."""
    net = network(dtype=torch.float32)
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9, weight_decay=0.1)
    x, y = batch(net, step.cost, 4)
    if is_warm:
        step(x, y)
    change(step)
    parameters = [p.detach() for p in net.parameters()]
    before = [p.clone() for p in parameters]
    state = step.state_dict()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError, ArithmeticError)):
            step(x.to(net[4].weight.dtype), y.to(net[4].weight.dtype))
        for found, value in zip(net.parameters(), before, strict=True):
            assert found.is_meta or torch.equal(found.to_dense(), value.to_dense())
        assert_same_state(step.state_dict(), state)


@pytest.mark.parametrize(
    ("cost", "y", "message"),
    [
        (SoftmaxCrossEntropyCost(), torch.tensor([0, 1, 2, 3]), "class indices from 0 to 2; got 0"),
        (SoftmaxCrossEntropyCost(), GOOD_Y[:2], "y must have shape"),
        (SigmoidCrossEntropyCost(), GOOD_Y[:, 0], "y must have shape"),
    ],
)
def test_refused_target_changes_nothing(cost: Cost, y: Tensor, message: str) -> None:
    net = network()
    before = values(net)
    with pytest.raises(ValueError, match=message):
        TrainingStep(net, cost, 0.1)(GOOD_X, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def test_autocast_is_refused(device: torch.device) -> None:
    net = network(dtype=torch.float32, device=device)
    step = TrainingStep(net, QuadraticCost(), 0.1)
    x, y = batch(net, step.cost, 4)
    message = re.escape("a training step must be called outside of autocast")
    with (
        torch.autocast(device.type, torch.bfloat16),
        pytest.raises(RuntimeError, match=message),
    ):
        step(x, y)


IN_TRANSFORMS: list[Callable[[TrainingStep, Tensor, Tensor], object]] = [
    lambda step, x, y: torch.vmap(step)(x.expand(2, -1, -1), y.expand(2, -1, -1)),
    lambda step, x, y: torch.vmap(step, (None, 0))(x, y.expand(2, -1, -1)),
    lambda step, x, y: torch.vmap(lambda z: step(x, y) + z)(torch.zeros(2)),
    lambda step, x, y: torch.func.grad(step)(x, y),
    lambda step, x, y: torch.func.grad(lambda y: step(x, y))(y),
    lambda step, x, y: torch.func.jvp(step, (x, y), (x, y)),
    lambda step, x, y: torch.func.functionalize(step)(x, y),
]


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("call", IN_TRANSFORMS)
def test_transforms_are_refused(call: Any, is_warm: bool) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    x, y = batch(step.net, step.cost, 4)
    if is_warm:
        step(x, y)
    before = values(step.net)
    with pytest.raises(RuntimeError, match=r"must be called outside of torch\.func's transforms"):
        call(step, x, y)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_fullgraph_compilation_is_refused_and_changes_nothing() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    x, y = batch(step.net, step.cost, 4)
    before = values(step.net)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x, y: step(x, y), backend="eager", fullgraph=True)(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_tracing_by_torch_export_is_refused() -> None:
    class Calling(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return step(x, y)

    step = TrainingStep(network(), QuadraticCost(), 0.1)
    before = values(step.net)
    with pytest.raises(RuntimeError, match=r"use its own export\(\) and export_onnx\(\)"):
        torch.export.export(Calling(), batch(step.net, step.cost, 4), strict=False)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_learning_rate_is_checked_when_set() -> None:
    step = TrainingStep(NET, QuadraticCost(), 0.1)
    for wrong, error, message in (
        (1e39, ValueError, "lr must be at most 3.4"),
        (10**400, ValueError, "lr must be a number that fits into a float"),
        (None, TypeError, "lr must be a number; got NoneType"),
    ):
        with pytest.raises(error, match=message):
            step.lr = wrong  # type: ignore[assignment]
        assert step.lr == 0.1
    with pytest.raises(ValueError, match="lr must be at least 0; got -2"):
        step.lr = -2
    assert step.lr == 0.1


@pytest.mark.parametrize(
    ("kind", "instead"),
    [(CompiledStep, "use CompiledStep.load"), (CapturedStep, "the TrainingStep, and capture that")],
)
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda step: torch.save({"step": step}, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_a_step_that_is_bound_to_its_tensors_refuses_to_be_copied(
    duplicate: Callable[[object], object], kind: Any, instead: str
) -> None:
    refusal = f"^a {kind.__name__} must not be copied or pickled, .*{re.escape(instead)}"
    with pytest.raises(TypeError, match=refusal):
        duplicate(kind.__new__(kind))


@pytest.mark.parametrize("path", [None, 3, b"step.pt2", ["step.pt2"]])
def test_what_is_no_path_is_refused_by_its_name(path: Any) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    pair = batch(step.net, step.cost, 4)
    calls: list[Callable[[], object]] = [
        lambda: step.export(path),
        lambda: step.export_onnx(path),
        lambda: CompiledStep.load(path, dict(step.net.named_parameters()), 0.1),
    ]
    if path is not None:  # then compile keeps no package
        calls.append(lambda: step.compile(*pair, path=path))
    message = rf"^path must be a str or a pathlib\.Path; got {type(path).__name__}$"
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()
