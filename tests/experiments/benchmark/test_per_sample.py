"""Every contender against a slow loop over single samples in float64."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmark import per_sample
from experiments.benchmark.contender import Contender, InexactError, Result, is_installed
from experiments.benchmark.contenders.samples import Samples, samples
from experiments.benchmark.per_sample import PEERS, contenders, left_out, quiet
from experiments.benchmark.problem import problem
from tests.helpers import only_new_objects

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


def make(sizes: tuple[int, ...] = SIZES, batch: tuple[int, ...] = (7,)) -> Samples:
    return samples(problem(sizes, batch, "cpu"))


def skip_unless_installed(name: str) -> None:
    if name in PEER_OF:
        pytest.importorskip(PEER_OF[name])


def right_answers(task: Samples) -> dict[str, list[Tensor]]:
    net = copy.deepcopy(task.problem.net).double()
    weights = list(net.parameters())
    gradients: list[list[Tensor]] = [[] for _ in weights]
    clipped = [torch.zeros_like(w) for w in weights]
    norms = []
    for x, y in zip(task.problem.x.double(), task.problem.y.double(), strict=True):
        grads = torch.autograd.grad(F.mse_loss(net(x), y), weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        norms.append(norm)
        for of_all, total, g in zip(gradients, clipped, grads, strict=True):
            of_all.append(g)
            total += g * min(1.0, task.max_norm / norm.item()) / len(task.problem.x)
    stacked = [torch.stack(g) for g in gradients]
    return {
        ".grad": [g.mean(0) for g in stacked],
        "norms": [torch.stack(norms)],
        "clipped": clipped,
        "gradients": stacked,
    }


def named(task: Samples, name: str) -> list[Contender]:
    """The contenders of one library, or of one way of it."""
    return [each for each in contenders(task) if each.name.partition(", ")[2] == name]


def asked(contender: Contender) -> str:
    return contender.name.partition(", ")[0]


def scaled(contender: Contender, factor: float, which: slice) -> Contender:
    """The same contender, with some of its results multiplied by a factor."""
    right = contender.results

    def results() -> list[Result]:
        found = list(right())
        found[which] = [found._replace(found=factor * found.found) for found in found[which]]
        return found

    contender.results = results
    return contender


def assert_near(found: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", WHATS)
def test_each_contender_gives_what_a_loop_over_samples_gives(
    name: str, batch: tuple[int, ...]
) -> None:
    skip_unless_installed(name)
    task = make(batch=batch)
    right = right_answers(task)
    with quiet():
        found = named(task, name)
        assert [asked(contender) for contender in found] == WHATS[name]
        for contender in found * 2:  # a second call would add to what the first one left behind
            answers = [result.found for result in contender.results()]
            expected = right[asked(contender)]
            assert_near(answers[: len(expected)], expected)
            if len(answers) > len(expected):
                assert_near(answers[len(expected) :], right[".grad"])


def elements_alive() -> int:
    return sum(t.numel() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter))


@pytest.mark.parametrize("name", WHATS)
def test_a_call_leaves_no_gradients_in_memory(name: str) -> None:
    skip_unless_installed(name)
    task = make()
    weights = sum(p.numel() for p in task.problem.net.parameters())
    with quiet():
        found = named(task, name)
        with only_new_objects():
            for contender in found:
                contender.call()
            assert elements_alive() < weights  # Opacus keeps the norms


@pytest.mark.parametrize("name", ["plain", "ours", "Opacus", "BackPACK"])
def test_ordinary_gradients_come_with_the_answer(name: str) -> None:
    skip_unless_installed(name)
    task = make()
    with quiet():
        for contender in named(task, name):
            assert len(contender.results()) == len(task.right[asked(contender)]) + 4


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_the_right_answers_are_those_of_the_loop(batch: tuple[int, ...]) -> None:
    task = make(batch=batch)
    right = right_answers(task)
    assert list(task.right) == list(right)
    for what, expected in task.right.items():
        assert_near(list(expected), right[what])
    assert 1 <= (right["norms"][0] > task.max_norm * 1.001).sum() < 7  # some clipped, some not


@pytest.mark.parametrize("sizes", [SIZES, (6, 5, 400), (300, 40, 30, 20)], ids=str)
def test_right_contenders_pass(sizes: tuple[int, ...]) -> None:
    """The mean over many outputs makes gradients small, and Opacus adds 1e-6 to their norms."""
    with quiet():
        for contender in contenders(make(sizes)):
            contender.check()


def test_samples_that_cancel_do_not_make_a_contender_inexact() -> None:
    """An error, as between two orders of a sum, is small relative to the terms, not the sum."""
    task = make()
    cancelled = task.right | {".grad": [1e-6 * g for g in task.right[".grad"]]}
    task = Samples(task.problem, task.max_norm, cancelled, task.scales)

    def off_by(part: float) -> Contender:
        pairs = zip(cancelled[".grad"], task.scales[".grad"], strict=True)
        grads = [(g + part * scale).float() for g, scale in pairs]
        return task.contender(".grad", "off", lambda: (grads, []))

    off_by(3e-7).check()
    with pytest.raises(InexactError):
        off_by(1e-5).check()


@pytest.mark.parametrize("what", [".grad", "norms", "clipped", "gradients"])
def test_an_answer_off_by_a_thousandth_is_inexact(what: str) -> None:
    task = make()
    with quiet():
        for contender in contenders(task):
            if asked(contender) == what:
                wrong = scaled(contender, 1.001, slice(len(task.right[what])))
                with pytest.raises(InexactError, match="inexact: off by "):
                    wrong.check()


def test_wrong_ordinary_gradients_are_inexact() -> None:
    wrong = scaled(named(make(), "ours")[0], 1.001, slice(1, None))
    assert asked(wrong) == "norms"  # a single tensor
    with pytest.raises(InexactError, match="inexact: off by "):
        wrong.check()


@pytest.mark.parametrize("missing", PEERS)
def test_a_library_that_is_not_installed_is_left_out(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        per_sample, "is_installed", lambda name: name != missing and is_installed(name)
    )
    assert missing in left_out("cpu")
    found = {contender.name.partition(", ")[2] for contender in contenders(make())}
    assert {"plain", "ours", "torch.func"} <= found
    assert not {name for name in found if PEER_OF.get(name) == missing}


def test_all_answers_to_one_question_stand_together() -> None:
    whats = [asked(contender) for contender in contenders(make())]
    order = [".grad", "norms", "clipped", "gradients"]
    assert whats == sorted(whats, key=order.index)


def test_a_library_that_fails_stands_last() -> None:
    def fail(_: Samples) -> Any:
        raise RuntimeError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_sample, "PEERS", {"torch": {"broken": fail}})
        *others, last = contenders(make())
    assert (last.name, last.note) == ("broken", "RuntimeError: no")
    assert not any(contender.note for contender in others)


def test_the_network_of_the_problem_stays_as_it_was() -> None:
    task = make()
    with quiet():
        for contender in contenders(task):
            contender.check()
    modules: list[Any] = list(task.problem.net.modules())
    for module in modules:
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(p.grad is None for p in task.problem.net.parameters())


def test_maker_that_raises_costs_only_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_installed("Opacus, ghost")

    def fail(_: Samples) -> list[Contender]:
        raise RuntimeError("planted")

    monkeypatch.setitem(PEERS["opacus"], "Opacus, ghost", fail)
    *others, last = contenders(make())
    assert (last.name, last.note) == ("Opacus, ghost", "RuntimeError: planted")
    assert others
    assert not any(each.note for each in others)
