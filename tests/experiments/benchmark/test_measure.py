import os
from collections.abc import Callable
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.benchmark import measure as measuring
from experiments.benchmark.contender import Contender
from experiments.benchmark.measure import Conditions, limited_to, measure, peak_bytes


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PAUSE", 0.0)


class Clock:
    """A clock that runs only during calls, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, name: str = "") -> Callable[[], None]:
        """A function that takes some seconds, and records that it was called."""

        def call() -> None:
            self.now += seconds
            self.turns.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measuring, "clock", made)
    return made


def test_contenders_take_turns(clock: Clock) -> None:
    contenders = [Contender(name, clock.call(0.0001, name)) for name in ("one", "other")]
    measure(contenders, Conditions(rounds=4))
    assert [len(contender.seconds) for contender in contenders] == [4, 4]
    changes = sum(one != two for one, two in pairwise(clock.turns))
    assert changes >= 7


def test_a_turn_of_a_slow_contender_is_one_call(clock: Clock) -> None:
    slow = Contender("slow", clock.call(0.11, "slow"))
    fast = Contender("fast", clock.call(0.0001, "fast"))
    measure([slow, fast], Conditions(rounds=3))
    counts = [(name, len(list(calls))) for name, calls in groupby(clock.turns)]
    assert counts[-6::2] == [("slow", 1)] * 3
    assert all(count > 100 for _, count in counts[-5::2])


def test_the_time_of_a_call_is_divided_by_what_it_does(clock: Clock) -> None:
    ten = Contender("ten", clock.call(0.03), each=10)
    measure([ten], Conditions(rounds=2))
    assert ten.seconds == pytest.approx([0.003, 0.003])


def test_the_time_includes_waiting_for_the_result(clock: Clock) -> None:
    later = Contender("later", lambda: None, wait=clock.call(0.03))
    measure([later], Conditions(rounds=2))
    assert later.seconds == pytest.approx([0.03, 0.03])


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 1), (5.0, 2), (100.0, 4)])
def test_no_round_starts_once_the_budget_is_spent(
    budget: float, rounds: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes in each pause: two before the first round, and two in each."""
    paused = Clock()
    pause = SimpleNamespace(sleep=lambda _: paused.call(1)(), monotonic=paused)
    monkeypatch.setattr(measuring, "time", pause)
    contenders = [Contender(name, clock.call(0.11)) for name in ("one", "other")]
    measure(contenders, Conditions(rounds=4, budget=budget))
    assert [len(contender.seconds) for contender in contenders] == [rounds, rounds]


def test_a_contender_that_raises_while_it_is_timed_takes_no_further_turn(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        clock.now += 0.11
        calls.append(len(calls))
        if len(calls) == 5:  # three to count calls, and two turns
            raise RuntimeError("no more")

    bad, good = Contender("bad", call), Contender("good", clock.call(0.11))
    measure([bad, good], Conditions(rounds=4), memory=True)
    assert (bad.note, len(calls), len(good.seconds)) == ("RuntimeError: no more", 5, 4)
    assert not good.note


def test_a_contender_that_fails_the_check_is_neither_timed_nor_measured(clock: Clock) -> None:
    def fail() -> Any:
        raise ValueError("wrong")

    bad = Contender("bad", clock.call(0.11, "bad"), results=fail)
    measure([bad, Contender("good", clock.call(0.11, "good"))], Conditions(rounds=2), memory=True)
    assert bad.note == "ValueError: wrong"
    assert set(clock.turns) == {"good"}


def test_a_contender_that_raises_while_its_memory_is_measured_drops_out(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> Any:
        clock.now += 0.11
        calls.append(len(calls))
        return 1 / (5 - len(calls))  # three to count calls, one turn, and one for the memory

    bad = Contender("bad", call)
    measure([bad], Conditions(rounds=1), memory=True)
    assert (bad.note, bad.peak) == ("ZeroDivisionError: division by zero", 0)


def test_computation_is_limited_to_as_many_cores() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with limited_to(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_device_is_timed_by_its_own_clock() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    product = Contender("product", lambda: a @ a)
    measure([product], Conditions(rounds=1, device="cuda"))
    assert 1e-6 < product.seconds[0] < 1


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000)

    def together() -> int:
        return len([torch.empty(1000) for _ in range(3)])

    assert peak_bytes(one_after_the_other, "cpu") == 4000
    assert peak_bytes(together, "cpu") == 12000


def test_measuring_memory_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_bytes(lambda: torch.ones(10), "cpu")
    assert capfd.readouterr() == ("", "")
