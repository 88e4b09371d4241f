"""Saving, resuming and copying a step."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from manual_bp import (
    Linear,
    QuadraticCost,
    TrainingStep,
)
from tests.training_step.networks import (
    assert_same_state,
    batch,
    every_descent,
    network,
    values,
)


@every_descent
def test_training_resumes_from_a_saved_state(descent: dict[str, Any], tmp_path: Any) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, **descent)
    for _ in range(3):
        step(*batch(net, cost, 4))
    step.lr = 0.2
    torch.save({"net": net.state_dict(), "step": step.state_dict()}, tmp_path / "saved.pt")
    x, y = batch(net, cost, 4)
    saved = torch.load(tmp_path / "saved.pt")
    other = network()
    other.load_state_dict(saved["net"])
    resumed = TrainingStep(other, cost, 1.0, momentum=0.1)
    resumed(x, y)  # so that buffers and velocities exist
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["step"])
    assert (resumed.lr, resumed.momentum, resumed.weight_decay) == (
        0.2,
        descent.get("momentum", 0),
        descent.get("weight_decay", 0),
    )
    for _ in range(3):
        step(x, y)
        resumed(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), values(other), strict=True))


ZEROS = torch.zeros(5, 7)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": 10**400}, ValueError, "lr must be a number that fits into a float"),
        ({"momentum": "no"}, TypeError, "momentum must be a number; got str"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number; got NoneType"),
        ({"velocities": {"9.weight": ZEROS}}, KeyError, "net has no parameter '9.weight'"),
        ({"velocities": {0: ZEROS}}, KeyError, "net has no parameter 0"),
        (
            {"velocities": {"0.weight": torch.zeros(2)}},
            ValueError,
            r"velocities\['0.weight'\] must have shape \(5, 7\), its parameter's; got \(2,\)",
        ),
        (
            {"velocities": {"0.bias": torch.ones(5), "0.weight": ZEROS.to("meta")}},
            ValueError,
            r"velocities\['0.weight'\] must have values; got a meta tensor",
        ),
        (
            {"velocities": {"0.bias": torch.ones(5), "0.weight": ZEROS.tolist()}},
            TypeError,
            r"velocities\['0.weight'\] must be a torch.Tensor; got list",
        ),
        (
            {"velocities": {"0.weight": ZEROS.long()}},
            TypeError,
            r"velocities\['0.weight'\] must have a real floating-point dtype",
        ),
        ({"velocities": [ZEROS]}, TypeError, "velocities must be a mapping, .* got list"),
        ({"nesterow": True}, KeyError, "state must have the keys lr, .*; got lr, .*, nesterow"),
        (None, TypeError, r"state must be a mapping, as state_dict\(\) gives it; got NoneType"),
        ([("lr", 0.1)], TypeError, "state must be a mapping, .* got list"),
        ({}, KeyError, "state must have the keys lr, .* got none"),
        (
            torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(),
            KeyError,
            "state must have the keys .* got state, param_groups",
        ),
    ],
)
def test_refused_state_changes_nothing(wrong: Any, error: type[Exception], message: str) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step(*batch(step.net, step.cost, 4))
    before = step.state_dict()
    if wrong and not isinstance(wrong, list) and "state" not in wrong:
        wrong = before | {"lr": 0.5, "momentum": 0.1} | wrong
    with pytest.raises(error, match=message):
        step.load_state_dict(wrong)
    assert_same_state(step.state_dict(), before)


def test_state_is_not_half_loaded_if_the_net_is_refused() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    before = step.state_dict()
    step.net[2] = nn.Dropout()
    with pytest.raises(TypeError, match=r"net\['2'\] must be a Linear"):
        step.load_state_dict(before | {"lr": 0.5})
    assert_same_state(step.state_dict(), before)


def test_state_is_loaded_into_the_changed_net() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step.net.append(Linear(3, 2, dtype=torch.float64))
    other = TrainingStep(copy.deepcopy(step.net), QuadraticCost(), 0.2, momentum=0.9)
    x, y = batch(other.net, other.cost, 4)
    other(x, y)
    step.load_state_dict(other.state_dict())
    assert_same_state(step.state_dict(), other.state_dict())


def test_parameter_without_saved_velocity_starts_from_zero() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step(*batch(step.net, step.cost, 4))
    state = step.state_dict()
    del state["velocities"]["2.bias"]
    step.load_state_dict(state)
    found = step.state_dict()["velocities"]
    assert not found["2.bias"].any()
    assert torch.equal(found["2.weight"], state["velocities"]["2.weight"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copy_trains_its_own_network(copied: Any) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    x, y = batch(net, cost, 4)
    step(x, y)
    twin = copied(step)
    before = values(net)
    twin(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    step(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), values(twin.net), strict=True))


def test_copy_of_a_subclass_keeps_its_attributes() -> None:
    class Named(TrainingStep):
        name = "none"

    step = Named(network(), QuadraticCost(), 0.1)
    step.name = "mine"
    assert copy.deepcopy(step).name == "mine"


def test_loaded_velocity_does_not_require_grad() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    state = step.state_dict()
    state["velocities"] = {n: v.requires_grad_() for n, v in state["velocities"].items()}
    step.load_state_dict(state)
    assert not any(v.requires_grad for v in copy.deepcopy(step).state_dict()["velocities"].values())
