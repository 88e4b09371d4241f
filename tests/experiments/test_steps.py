import importlib.util
import shutil
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from experiments import steps
from experiments.measuring import Timed, peak_bytes
from experiments.steps import (
    bare_products,
    contenders,
    left_out,
    memory_contenders,
    passes,
    problem,
    require_same,
    torch_contenders,
)
from tests.helpers import Operations

SIZES, BATCH = (6, 5, 4), 3


@pytest.fixture
def task(device: torch.device) -> steps.Problem:
    return problem(SIZES, BATCH, device.type)


def test_every_contender_makes_the_same_step(task: steps.Problem) -> None:
    found = contenders(task)
    names = ["ours"] + ["ours, captured"] * task.x.is_cuda + ["torch, SGD", "torch, fused SGD"]
    assert list(found)[: len(names)] == names
    assert list(found)[-1] == "bare products"
    assert ("NumPy" in found) != task.x.is_cuda
    require_same(task, found)


@pytest.mark.parametrize("peer", [p for p in steps.PEERS if p != "a C++ compiler"])
def test_a_peer_that_is_not_there_is_left_out_and_named(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, real = peer.split(" and ")[-1], importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a)
    )
    assert peer in left_out("cpu")
    assert peer in left_out("cuda")


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "a C++ compiler" in left_out("cpu")
    found = contenders(problem(SIZES, BATCH, "cpu"))
    assert "torch.compile, fused SGD" not in found


@pytest.mark.parametrize("factor", [0.0, 0.99, -1.0])
def test_a_contender_that_learns_something_else_is_found(factor: float) -> None:
    task = problem(SIZES, BATCH, "cpu")
    right = torch_contenders(task)["torch, SGD"]
    assert right.parameters is not None
    first = right.parameters()

    def parameters() -> Any:
        assert right.parameters is not None
        now = right.parameters()
        return [old + factor * (new - old) for old, new in zip(first, now, strict=True)]

    with pytest.raises(AssertionError, match="wrong one"):
        require_same(task, {"wrong one": replace(right, parameters=parameters)})


def test_the_bare_products_are_those_of_the_step() -> None:
    task = problem((6, 5, 7, 4), BATCH, "cpu")
    operations = Operations()
    with operations:
        bare_products(task).timed.call()
    names = [name for name in operations.names if name in ("addmm", "mm", "addmm_")]
    assert names == ["addmm"] * 3 + ["mm"] * 2 + ["addmm_"] * 3


@pytest.mark.parametrize(("sizes", "batch"), [((64, 128, 96, 128, 10), 512), ((64, 128, 128), 8)])
def test_memory_is_the_activations_and_two_errors(sizes: tuple[int, ...], batch: int) -> None:
    """The promise, where activations fill the memory, and where gradients would."""
    found = memory_contenders(problem(sizes, batch, "cpu"))
    peaks = {name: peak_bytes(call, "cpu") for name, call in found.items()}
    activations, two_errors = 4 * batch * sum(sizes[1:]), 2 * 4 * batch * 128
    others = 4 * (batch + sum(sizes[1:]) + 50)  # ones for BP3, gradients of biases, numbers
    assert activations < peaks["ours"] <= activations + two_errors + others
    weights = 4 * sum(i * o for i, o in pairwise(sizes))
    assert peaks["torch, SGD"] > weights
    assert peaks["torch, SGD"] > 5 * peaks["ours"] or weights < activations


def test_forward_and_backward_are_apart() -> None:
    task = problem((8, 8, 8, 8), BATCH, "cpu")
    found = passes(task)
    assert list(found.timed) == [
        f"{who}, {which}" for who in ("products", "autograd") for which in ("forward", "backward")
    ]
    for timed in found.timed.values():
        assert isinstance(timed, Timed)
        timed.call()
        timed.call()  # backward can be asked again
