"""A batch that is read in parts gives the step of the whole batch."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark.measure import peak_bytes
from manual_bp import (
    AdamW,
    Cost,
    Linear,
    QuadraticCost,
    Sigmoid,
    SoftmaxCrossEntropyCost,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step import _learn
from tests.training_step.networks import (
    DESCENTS,
    RULES,
    Autograd,
    Reference,
    assert_follows,
    assert_same_state,
    batch,
    both,
    every_cost,
    network,
    values,
)

ALL = [
    *DESCENTS,
    *RULES.values(),
    {"dampening": 0.5},  # which has no meaning without momentum
    {"max_norm": 0.05},
    {"max_norm": 0.05, "rule": AdamW()},
]


def follow_in_parts(net: nn.Sequential, cost: Cost, steps: int, **descent: Any) -> None:
    """Parts of several sizes, also whole batches, against autograd and `torch.optim`."""
    step, reference = both(net, cost, 0.05, **descent)
    indices = isinstance(cost, SoftmaxCrossEntropyCost)
    for number in range(steps):
        x, y = batch(net, cost, (8, 7, 11, 1)[number % 4], indices=indices)
        size = (3, 8, 1, None, 5, 20)[number % 6]
        torch.testing.assert_close(step(x, y, micro_batch=size), reference(x, y))
        torch.testing.assert_close(step.grad_norm, reference.grad_norm)
    assert_follows(net, reference.net, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("descent", ALL, ids=str)
def test_steps_equal_those_of_whole_batches(descent: dict[str, Any], device: torch.device) -> None:
    follow_in_parts(network(Tanh(), device=device), QuadraticCost(), 24, **descent)


@every_cost
def test_every_cost_is_weighted_by_samples(cost: Cost) -> None:
    follow_in_parts(network(), cost, 12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_user_cost_is_weighted_by_samples(reduction: Any) -> None:
    follow_in_parts(network(), Autograd(reduction), 6)


def test_first_of_several_dimensions_is_split() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    for size in (2, 1, 5):
        x, y = batch(net, cost, 5, 3, 2)
        torch.testing.assert_close(step(x, y, micro_batch=size), reference(x, y))
    assert_follows(net, reference.net)


def test_an_integer_of_numpy_counts_samples() -> None:
    net, cost = network(), QuadraticCost()
    steps = [TrainingStep(copy.deepcopy(net), cost, 0.1) for _ in range(2)]
    x, y = batch(net, cost, 7)
    sizes: list[Any] = [3, np.int64(3)]
    for step, size in zip(steps, sizes, strict=True):
        step(x, y, micro_batch=size)
        step.epoch(x, y, torch.arange(7), size)
    assert all(torch.equal(*pair) for pair in zip(*(values(s.net) for s in steps), strict=True))


def test_frozen_or_changed_parameters_are_noticed() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = both(net, cost, 0.1, momentum=0.9)
    for frozen in (0, 2, 5, 3):
        for index, pair in enumerate(
            zip(net.parameters(), reference.net.parameters(), strict=True)
        ):
            for parameter in pair:
                parameter.requires_grad_(index != frozen)
        x, y = batch(net, cost, 5)
        torch.testing.assert_close(step(x, y, micro_batch=2), reference(x, y))
        assert_follows(net, reference.net)


def test_gradient_in_blocks_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_learn, "BLOCK", 15)
    follow_in_parts(network(), QuadraticCost(), 4, rule=AdamW(), weight_decay=0.1)


def test_batch_without_samples_is_as_the_whole() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    x, y = batch(net, cost, 0)
    found, expected = step(x, y, micro_batch=2), reference(x, y)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert_follows(net, reference.net)


def test_step_is_the_same_in_every_grad_mode() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = both(net, cost, 0.1, momentum=0.5)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x, y = batch(net, cost, 5)
            found = step(x, y, micro_batch=2)
        assert not found.requires_grad
        reference(x.clone(), y.clone())
    assert_follows(net, reference.net)


# PyTorch 2.11 warns of a method of its own, in code that it need not have compiled.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_step_in_parts_in_compiled_code_equals_the_eager_step() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = both(net, cost, 0.1)

    def twice(x: Tensor, y: Tensor) -> Tensor:
        return 2 * step(2 * x, y, micro_batch=3)

    x, y = batch(net, cost, 5)
    found = torch.compile(twice, backend="eager")(x, y)
    torch.testing.assert_close(found, 2 * reference(2 * x, y))
    assert_follows(net, reference.net)


def test_error_in_the_last_part_changes_nothing() -> None:
    net, cost = network(), SoftmaxCrossEntropyCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9, weight_decay=0.1, max_norm=1.0)
    x, y = batch(net, cost, 6, indices=True)
    step(x, y, micro_batch=2)
    before, state, norm = values(net), step.state_dict(), step.grad_norm
    with pytest.raises(ValueError, match="class indices from 0 to 2; got"):
        step(x, torch.tensor([0, 1, 2, 0, 1, 3]), micro_batch=2)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    assert_same_state(step.state_dict(), state)
    assert step.grad_norm == norm
    twin = Reference(net, cost, 0.1, weight_decay=0.1, max_norm=1.0)
    other = TrainingStep(net, cost, 0.1, weight_decay=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match="class indices"):
        other(x, torch.tensor([0, 1, 2, 0, 1, 3]), micro_batch=2)
    torch.testing.assert_close(other(x, y, micro_batch=4), twin(x, y))
    assert_follows(net, twin.net)


X, Y = torch.zeros(4, 7).double(), torch.zeros(4, 3).double()


@pytest.mark.parametrize(
    ("x", "y", "size", "error", "message"),
    [
        (X, Y, 0, ValueError, "micro_batch must be at least 1; got 0"),
        (X, Y, 2.0, TypeError, "micro_batch must be an integer; got float"),
        (X[0], Y[0], 2, ValueError, r"x must have a dimension to split; got shape \(7,\)"),
        (X, Y[:3], 2, ValueError, r"y must have the first size of x, 4, .* got \(3, 3\)"),
        (X, Y[0, 0], 2, ValueError, r"y must have the first size of x, 4, .* got \(\)"),
        (X, Y.tolist(), 2, TypeError, "y must be a torch.Tensor; got list"),
        (X.tolist(), Y, 2, TypeError, "x must be a torch.Tensor; got list"),
        (X.float(), Y, 2, TypeError, "x must have the dtype of"),
        (X, Y.float(), 2, TypeError, "y must have the dtype of the output"),
    ],
    ids=str,
)
def test_refused_batch_changes_nothing(
    x: Any, y: Any, size: Any, error: type[Exception], message: str
) -> None:
    net = network()
    before = values(net)
    with pytest.raises(error, match=message):
        TrainingStep(net, QuadraticCost(), 0.1)(x, y, micro_batch=size)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def test_memory_is_a_gradient_and_the_buffers_of_one_part() -> None:
    net = nn.Sequential(Linear(50, 40), Sigmoid(), Linear(40, 3)).double()
    step = TrainingStep(net, QuadraticCost(), 0.1)
    x, y = batch(net, step.cost, 64)
    gradient = sum(p.numel() for p in net.parameters())
    part = 4 * (40 + 3 + 2 * 40) + 40 + 3 + 4  # activations, two δ; BP3, and its 1/N
    held = peak_bytes(lambda: step(x, y, micro_batch=4), "cpu")
    assert 8 * (gradient + part) <= held <= 8 * (gradient + part) + 300
    assert peak_bytes(lambda: step(x, y, micro_batch=4), "cpu") < 300
