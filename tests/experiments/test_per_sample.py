"""Every contender against a slow loop over single samples, in double precision."""

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import per_sample
from experiments.contending import is_installed
from experiments.per_sample import (
    PEERS,
    Contender,
    Found,
    Problem,
    contenders,
    left_out,
    problem,
    quiet,
    require_same,
)

SIZES = (6, 5, 4)
BATCHES = [(7,), (7, 3)]

WHATS = {
    "plain": [".grad"],
    "ours": ["norms", "clipped", "gradients"],
    "torch.func": ["norms", "clipped", "gradients"],
    "Opacus": ["norms", "clipped", "gradients"],
    "Opacus, ghost": ["norms", "clipped"],
    "BackPACK": ["norms", "gradients"],
}
PEER_OF = {"Opacus": "opacus", "Opacus, ghost": "opacus", "BackPACK": "backpack"}


def skip_unless_installed(name: str) -> None:
    if name in PEER_OF:
        pytest.importorskip(PEER_OF[name])


def right_answers(task: Problem) -> dict[str, list[Tensor]]:
    net = copy.deepcopy(task.net).double()
    weights = list(net.parameters())
    gradients: list[list[Tensor]] = [[] for _ in weights]
    clipped = [torch.zeros_like(w) for w in weights]
    norms = []
    for x, y in zip(task.x.double(), task.y.double(), strict=True):
        grads = torch.autograd.grad(F.mse_loss(net(x), y), weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        norms.append(norm)
        for of_all, total, g in zip(gradients, clipped, grads, strict=True):
            of_all.append(g)
            total += g * min(1.0, task.max_norm / norm.item()) / len(task.x)
    stacked = [torch.stack(g) for g in gradients]
    return {
        ".grad": [g.mean(0) for g in stacked],
        "norms": [torch.stack(norms)],
        "clipped": clipped,
        "gradients": stacked,
    }


def named(task: Problem, name: str) -> list[Contender]:
    return [contender for contender in contenders(task) if contender.name == name]


def assert_near(found: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", WHATS)
def test_each_contender_gives_what_a_loop_over_samples_gives(
    name: str, batch: tuple[int, ...]
) -> None:
    skip_unless_installed(name)
    task = problem(SIZES, batch, "cpu")
    right = right_answers(task)
    with quiet():
        found = named(task, name)
        assert [contender.what for contender in found] == WHATS[name]
        for contender in found * 2:  # what a call leaves behind would be added to
            answer = contender.call()
            assert_near([t * contender.unit for t in answer.asked], right[contender.what])
            if answer.grads is not None:
                assert_near(answer.grads, right[".grad"])


def elements_alive() -> int:
    return sum(t.numel() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter))


@pytest.mark.parametrize("name", WHATS)
def test_a_call_leaves_no_gradients_in_memory(name: str) -> None:
    skip_unless_installed(name)
    task = problem(SIZES, (7,), "cpu")
    weights = sum(p.numel() for p in task.net.parameters())
    with quiet():
        found = named(task, name)
        gc.collect()
        before = elements_alive()
        for contender in found:
            contender.call()
        assert elements_alive() - before < weights  # Opacus keeps the norms


@pytest.mark.parametrize("name", ["plain", "ours", "Opacus", "BackPACK"])
def test_ordinary_gradients_come_along(name: str) -> None:
    skip_unless_installed(name)
    with quiet():
        for contender in named(problem(SIZES, (7,), "cpu"), name):
            assert contender.call().grads is not None


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_the_problems_own_answers(batch: tuple[int, ...]) -> None:
    task = problem(SIZES, batch, "cpu")
    right = right_answers(task)
    assert list(task.expected) == list(right)
    for what, expected in task.expected.items():
        assert_near(expected, right[what])
    assert 1 <= (right["norms"][0] > task.max_norm * 1.001).sum() < 7  # some clipped, some not


@pytest.mark.parametrize("sizes", [SIZES, (6, 5, 400), (300, 40, 30, 20)], ids=str)
def test_right_contenders_are_let_pass(sizes: tuple[int, ...]) -> None:
    """The mean over many outputs makes gradients small, to whose norms Opacus adds 1e-6."""
    task = problem(sizes, (7,), "cpu")
    with quiet():
        require_same(task, contenders(task))


def test_samples_that_cancel_are_no_reason_to_refuse() -> None:
    """As between two reductions of a sum: what is off is small beside the terms, not the sum."""
    task = problem(SIZES, (7,), "cpu")
    right = named(task, "plain")[0]
    task.expected[".grad"] = [1e-6 * g for g in task.expected[".grad"]]

    def off_by(part: float) -> Contender:
        scales = task.scales[".grad"]
        pairs = zip(task.expected[".grad"], scales, strict=True)
        grads = [g + part * scale for g, scale in pairs]
        return replace(right, call=lambda: Found(grads))

    require_same(task, [off_by(3e-7)])
    with pytest.raises(AssertionError, match="not close"):
        require_same(task, [off_by(1e-5)])


@pytest.mark.parametrize("what", [".grad", "norms", "clipped", "gradients"])
def test_an_answer_off_by_a_thousandth_is_refused(what: str) -> None:
    task = problem(SIZES, (7,), "cpu")
    with quiet():
        for contender in contenders(task):
            if contender.what == what:
                wrong = replace(contender, unit=contender.unit * 1.001)
                with pytest.raises(AssertionError, match=f"^{what}, {contender.name}: .*not close"):
                    require_same(task, [wrong])


def test_wrong_ordinary_gradients_are_refused() -> None:
    task = problem(SIZES, (7,), "cpu")
    right = named(task, "ours")[0]

    def call() -> Found:
        asked, grads = right.call()
        assert grads is not None
        return Found(asked, [1.001 * g for g in grads])

    with pytest.raises(AssertionError, match=r"^norms, ours: .*not close"):
        require_same(task, [replace(right, call=call)])


@pytest.mark.parametrize("missing", PEERS)
def test_a_library_that_is_not_installed_is_left_out(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        per_sample, "is_installed", lambda name: name != missing and is_installed(name)
    )
    assert missing in left_out()
    found = {contender.name for contender in contenders(problem(SIZES, (7,), "cpu"))}
    assert {"plain", "ours", "torch.func"} <= found
    assert not {name for name in found if PEER_OF.get(name) == missing}


def test_all_answers_to_one_question_stand_together() -> None:
    whats = [contender.what for contender in contenders(problem(SIZES, (7,), "cpu"))]
    order = [".grad", "norms", "clipped", "gradients"]
    assert whats == sorted(whats, key=order.index)


def test_networks_stay_as_they_were() -> None:
    task = problem(SIZES, (7,), "cpu")
    with quiet():
        require_same(task, contenders(task))
    modules: list[Any] = list(task.net.modules())
    for module in modules:
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(p.grad is None for p in task.net.parameters())
