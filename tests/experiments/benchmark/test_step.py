import importlib.util
import shutil
from itertools import pairwise

import pytest
import torch

from experiments.benchmark import step
from experiments.benchmark.contender import Contender, InexactError
from experiments.benchmark.contenders.step import ADAM, autograd, bare_products, judged
from experiments.benchmark.measure import peak_bytes
from experiments.benchmark.problem import Problem, problem
from experiments.benchmark.step import contenders, left_out, memory_contenders
from tests.helpers import Operations

SIZES, BATCH = (6, 5, 4), 3


@pytest.fixture
def task(device: torch.device) -> Problem:
    return problem(SIZES, BATCH, device.type)


def test_every_contender_makes_the_same_step(task: Problem) -> None:
    found = contenders(task)
    listed = [contender.name for contender in found]
    names = ["ours"] + ["ours, captured"] * task.x.is_cuda + ["ours, compiled"]
    names += ["ours, epoch of 200 steps"] * (not task.x.is_cuda)
    names += ["ours, 32 networks"]
    names += ["torch, SGD", "torch, fused SGD", "torch, compiled whole"]
    assert listed[: len(names)] == names
    assert listed[-1] == "bare products"
    assert ("NumPy" in listed) != task.x.is_cuda
    for contender in found:
        assert not contender.note
        contender.check()
        assert len(contender.results()) == (0 if contender.name == "bare products" else 4)


def test_all_make_the_same_step_with_adam(task: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)  # what is compiled is judged when it runs
    found = contenders(task, ADAM)
    listed = [contender.name for contender in found if "jax" not in contender.name]
    captured = ["ours, captured"] * task.x.is_cuda
    assert listed == ["ours", *captured, "torch, Adam", "torch, fused Adam", "bare products"]
    for contender in found:
        assert not contender.note
        contender.check()


@pytest.mark.parametrize("peer", [*step.PEERS, *step.SGD_PEERS][1:])
def test_a_peer_whose_library_is_missing_is_left_out_and_named(
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
    assert not [contender.name for contender in found if "compile" in contender.name]


@pytest.mark.parametrize("factor", [0.0, 0.99, -1.0, float("nan")])
def test_a_contender_that_learns_something_else_is_inexact(factor: float) -> None:
    task = problem(SIZES, BATCH, "cpu")
    (right,) = autograd(task)
    first = [p.detach() for p in task.net.parameters()]

    def parameters() -> list[torch.Tensor]:
        now = [found for found, _, _ in right.results()]
        return [old + factor * (new - old) for old, new in zip(first, now, strict=True)]

    wrong = judged(Contender("wrong one", lambda: None), task, parameters)
    with pytest.raises(InexactError, match="inexact: off by "):
        wrong.check()


def test_a_contender_that_follows_another_rule_is_inexact() -> None:
    task = problem(SIZES, BATCH, "cpu")
    learned = autograd(task)[0].results
    wrong = judged(Contender("SGD"), task, lambda: [found for found, _, _ in learned()], ADAM)
    with pytest.raises(InexactError, match="inexact: off by "):
        wrong.check()


def test_several_steps_in_one_call_are_compared_with_as_many() -> None:
    task = problem(SIZES, BATCH, "cpu")
    (one,) = autograd(task)

    def twice() -> None:
        one.call()
        one.call()

    def parameters() -> list[torch.Tensor]:
        call, one.call = one.call, lambda: None
        found = [found for found, _, _ in one.results()]
        one.call = call
        return found

    judged(Contender("twice", twice, each=2), task, parameters).check()
    with pytest.raises(InexactError, match="inexact: off by "):
        judged(Contender("twice", lambda: None, each=1), task, parameters).check()


def test_the_bare_products_are_those_of_the_step() -> None:
    (products,) = bare_products(problem((6, 5, 7, 4), BATCH, "cpu"))
    operations = Operations()
    with operations:
        products.call()
    names = [name for name in operations.names if name in ("addmm", "mm", "addmm_")]
    assert names == ["addmm"] * 3 + ["mm"] * 2 + ["addmm_"] * 3


@pytest.mark.parametrize(("sizes", "batch"), [((64, 128, 96, 128, 10), 512), ((64, 128, 128), 8)])
def test_memory_is_the_activations_and_two_errors(sizes: tuple[int, ...], batch: int) -> None:
    """As promised, both where activations fill the memory and where gradients would."""
    found = memory_contenders(problem(sizes, batch, "cpu"))
    peaks = {contender.name: peak_bytes(contender.call, "cpu") for contender in found}
    activations, two_errors = 4 * batch * sum(sizes[1:]), 2 * 4 * batch * 128
    others = 4 * (batch + sum(sizes[1:]) + 50)  # ones for BP3, gradients of biases, numbers
    assert activations < peaks["ours"] <= activations + two_errors + others
    weights = 4 * sum(i * o for i, o in pairwise(sizes))
    assert peaks["torch, SGD"] > weights
    assert peaks["torch, SGD"] > 5 * peaks["ours"] or weights < activations
