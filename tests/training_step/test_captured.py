"""The step in a CUDA graph; on the CPU, in a stand-in that records and replays kernels."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_bp import CapturedStep, Cost, QuadraticCost, SoftmaxCrossEntropyCost, TrainingStep
from tests.training_step.networks import (
    COSTS,
    DESCENTS,
    RULES,
    Autograd,
    Counting,
    Reference,
    assert_follows,
    batch,
    both,
    every_activation,
    every_descent,
    every_rule,
    network,
    values,
)

Capture = Callable[[TrainingStep, Tensor, Tensor], CapturedStep]


class Recorded:
    """A stand-in for a CUDA graph: the kernels that ran, and the tensors that they ran on."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for kernel, args, kwargs, output in self.kernels:
            found = kernel(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and new is not old:
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """A stand-in for a capture. Unlike a real one it runs the kernels; the caller undoes that."""

    def __init__(self, graph: Recorded, **_: Any) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.graph.kernels.append((func, args, kwargs or {}, output))
        return output


class Stream:
    """A stand-in for a stream. On the CPU everything happens in order anyway."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: "Stream") -> None:
        pass


@pytest.fixture
def capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Capture:
    if device.type == "cuda":
        return lambda step, x, y: step.cuda_graph(x, y)
    for name, stand_in in {
        "CUDAGraph": Recorded,
        "graph": Recording,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "current_stream": Stream,
        "device": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def recorded(step: TrainingStep, x: Tensor, y: Tensor, **options: bool) -> CapturedStep:
        state = [
            *step.net.parameters(),
            *(t for kept in step._plan.state.values() for t in kept.values()),
        ]
        before = [t.detach().clone() for t in state]
        captured = step._capture(x, y, **options)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return captured

    return recorded


@every_descent
@pytest.mark.parametrize("cost", [*COSTS, Autograd()], ids=repr)
def test_captured_steps_equal_autograd_and_sgd(
    cost: Cost, descent: dict[str, Any], device: torch.device, capture: Capture
) -> None:
    net = network(device=device)
    indices = isinstance(cost, SoftmaxCrossEntropyCost)
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    before = values(net)
    captured = capture(step, *batch(net, cost, 4, indices=indices))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    for number in range(10):
        step.lr = 0.1 / (1 + number // 4)
        reference.set_lr(step.lr)
        x, y = batch(net, cost, 4, indices=indices)
        run = step if number == 5 else captured  # they share parameters and velocities
        torch.testing.assert_close(run(x, y), reference(x, y))
    assert_follows(net, reference.net)


@every_rule
def test_captured_steps_of_every_rule_equal_torch_optim(
    rule: dict[str, Any], device: torch.device, capture: Capture
) -> None:
    net, cost = network(device=device), QuadraticCost()
    step, reference = both(net, cost, 0.1, max_norm=0.1, **rule)
    captured = capture(step, *batch(net, cost, 4))
    for number in range(10):
        step.lr = 0.1 / (1 + number // 4)
        reference.set_lr(step.lr)
        x, y = batch(net, cost, 4)
        run = step if number in (0, 5) else captured  # they share the numbers of steps, too
        torch.testing.assert_close(run(x, y), reference(x, y))
        torch.testing.assert_close(step.grad_norm, reference.grad_norm)
    assert_follows(net, reference.net)


@pytest.mark.parametrize("descent", [*DESCENTS, *RULES.values()], ids=str)
def test_captured_kernels_that_are_compiled_equal_torch_optim(
    descent: dict[str, Any], device: torch.device, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU they are not compiled: what is captured is the program that would be."""
    net, cost = network(device=device), SoftmaxCrossEntropyCost()
    net.get_parameter("2.weight").requires_grad_(False)
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", lambda module, **_: module)
        captured = capture(step, *batch(net, cost, 4, indices=True), compiled=True)
    else:
        captured = step.compile(*batch(net, cost, 4, indices=True))
    for number in range(4):
        step.lr = 0.1 / (1 + number // 2)
        reference.set_lr(step.lr)
        x, y = batch(net, cost, 4, indices=True)
        torch.testing.assert_close(captured(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_epoch_of_captured_steps_equals_a_step_for_each_batch(
    device: torch.device, capture: Capture
) -> None:
    net, cost = network(device=device), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    captured = capture(step, *batch(net, cost, 4))
    x, y = batch(net, cost, 20)
    order = torch.randperm(20, device=device)[:12]
    costs = captured.epoch(x, y, order, 4)
    expected = [reference(x[part], y[part]) for part in torch.split(order, 4)]
    torch.testing.assert_close(costs, torch.stack(expected))
    assert_follows(net, reference.net)
    for wrong in ((x, y, order, 3), (x, y, order[:5], 4)):
        with pytest.raises(ValueError, match="batch_size must be 4, as captured, and divide"):
            captured.epoch(*wrong)
    with pytest.raises(ValueError, match="y must have shape"):
        captured.epoch(x, y[:, :2], order, 4)
    assert_follows(net, reference.net)


@every_activation
def test_every_activation_can_be_captured(
    activation: nn.Module, device: torch.device, capture: Capture
) -> None:
    net, cost = network(activation, device=device), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    x, y = batch(net, cost, 2, 3)
    captured = capture(step, x.transpose(0, 1), y.transpose(0, 1))
    for _ in range(5):
        x, y = batch(net, cost, 3, 2)
        torch.testing.assert_close(captured(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_each_call_returns_a_new_cost_tensor(device: torch.device, capture: Capture) -> None:
    net, cost = network(device=device), QuadraticCost()
    captured = capture(TrainingStep(net, cost, 0.5), *(pair := batch(net, cost, 4)))
    first = captured(*pair)
    value = first.item()
    assert captured(*pair).item() < value == first.item()


def test_captured_cost_may_set_its_own_attributes(device: torch.device, capture: Capture) -> None:
    net, cost = network(device=device), Counting()
    captured = capture(TrainingStep(net, cost, 0.5), *(pair := batch(net, cost, 4)))
    assert captured(*pair) > captured(*pair)
    cost.calls = 0
    with pytest.raises(RuntimeError, match="must be what was captured; got others: capture"):
        captured(*pair)


def test_refused_batch_changes_nothing(device: torch.device, capture: Capture) -> None:
    net, cost = network(device=device), QuadraticCost()
    captured = capture(TrainingStep(net, cost, 0.1), *batch(net, cost, 4))
    before = values(net)
    x, y = batch(net, cost, 3)
    with pytest.raises(ValueError, match=r"x must have shape \(4, 7\), that of the one captured"):
        captured(x, y)
    with pytest.raises(TypeError, match="x must have the dtype of the captured x"):
        captured(x.float(), y)
    with pytest.raises(ValueError, match="x must be on the device of the captured x"):
        captured(x.to("meta"), y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def moved(step: TrainingStep) -> None:
    w = step.net.get_parameter("0.weight")
    w.data = w.data.clone()


def replaced(step: TrainingStep) -> None:
    step.net[2].weight = nn.Parameter(step.net.get_parameter("2.weight").detach().clone())


def frozen(step: TrainingStep) -> None:
    step.net.get_parameter("4.bias").requires_grad_(False)


def loaded(step: TrainingStep) -> None:
    step.load_state_dict(step.state_dict())


def shortened(step: TrainingStep) -> None:
    del step.net[5]


def summed(step: TrainingStep) -> None:
    step.cost.reduction = "sum"


@pytest.mark.parametrize("change", [moved, replaced, frozen, loaded, shortened, summed])
def test_captured_step_refuses_after_a_change(
    change: Any, device: torch.device, capture: Capture
) -> None:
    net, cost = network(device=device), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    captured = capture(step, *(pair := batch(net, cost, 4)))
    captured(*pair)
    change(step)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must be what was captured; got others: capture"):
            captured(*pair)
        step(*pair)  # which notices the change and continues


class FailsLater(QuadraticCost):
    """Fails at its second call."""

    def bind(self, a: Tensor, delta: Tensor) -> Any:
        error_, weight = super().bind(a, delta)
        calls = iter([error_])
        return lambda y: next(calls)(y), weight


def test_failed_capture_changes_nothing(device: torch.device, capture: Capture) -> None:
    step = TrainingStep(network(device=device), FailsLater(), 0.1, momentum=0.9)
    x, y = batch(step.net, step.cost, 4)
    before, state = values(step.net), step.state_dict()
    with pytest.raises(StopIteration):
        capture(step, x, y)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))
    for name, velocity in step.state_dict()["velocities"].items():
        assert torch.equal(velocity, state["velocities"][name])


def test_step_captured_in_inference_mode_can_be_called(
    device: torch.device, capture: Capture
) -> None:
    net, cost = network(device=device), QuadraticCost()
    with torch.inference_mode():
        captured = capture(TrainingStep(net, cost, 0.1, momentum=0.9), *batch(net, cost, 4))
    captured(*batch(net, cost, 4))


@pytest.mark.parametrize(
    ("dtype", "y", "error", "message"),
    [
        (torch.float64, None, ValueError, "x must be on a CUDA device to be captured; got cpu"),
        (torch.float64, [1.0], TypeError, "y must be a torch.Tensor; got list"),
    ],
)
def test_wrong_device_target_or_autocast_is_refused(
    dtype: torch.dtype, y: Any, error: type[Exception], message: str
) -> None:
    net = network(dtype=dtype)
    step = TrainingStep(net, QuadraticCost(), 0.1)
    x, target = batch(net, step.cost, 4)
    before = values(net)
    with pytest.raises(error, match=message):
        step.cuda_graph(x, target if y is None else y)
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of autocast"):
        step.cuda_graph(x, target)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_steps_do_not_synchronise() -> None:
    """Neither the eager step nor the captured one synchronises."""
    net = network(device="cuda", dtype=torch.float32)
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)
    x, y = batch(net, step.cost, 4)
    captured = step.cuda_graph(x, y)
    step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y)
        captured(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_float16_is_refused() -> None:
    net = network(device="cuda", dtype=torch.float16)
    step = TrainingStep(net, QuadraticCost(), 0.1)
    with pytest.raises(TypeError, match="a step to be captured must be of float64, float32 or bf"):
        step.cuda_graph(*batch(net, step.cost, 4))
