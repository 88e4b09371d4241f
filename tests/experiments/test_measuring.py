import os
from collections.abc import Callable
from itertools import groupby, pairwise
from types import SimpleNamespace

import pytest
import torch

from experiments import measuring
from experiments.measuring import Timed, limited_to, peak_bytes, quartiles, ratios, seconds


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PAUSE", 0.0)


class Clock:
    """Time that passes only in calls, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, name: str = "") -> Callable[[], None]:
        """What takes some seconds, and notes that it was called."""

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
    contenders = {name: Timed(clock.call(0.0001, name)) for name in ("one", "other")}
    taken = seconds(contenders, 4, "cpu")
    assert [len(times) for times in taken.values()] == [4, 4]
    changes = sum(one != two for one, two in pairwise(clock.turns))
    assert changes >= 7


def test_a_turn_of_a_slow_contender_is_one_call(clock: Clock) -> None:
    slow, fast = Timed(clock.call(0.11, "slow")), Timed(clock.call(0.0001, "fast"))
    seconds({"slow": slow, "fast": fast}, 3, "cpu")
    counts = [(name, len(list(calls))) for name, calls in groupby(clock.turns)]
    assert counts[-6::2] == [("slow", 1)] * 3
    assert all(count > 100 for _, count in counts[-5::2])


def test_what_a_call_does_many_times_is_counted_so(clock: Clock) -> None:
    taken = seconds({"ten": Timed(clock.call(0.03), each=10)}, 2, "cpu")
    assert taken["ten"] == pytest.approx([0.003, 0.003])


def test_what_is_under_way_is_waited_for(clock: Clock) -> None:
    taken = seconds({"later": Timed(lambda: None, wait=clock.call(0.03))}, 2, "cpu")
    assert taken["later"] == pytest.approx([0.03, 0.03])


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 1), (5.0, 2), (100.0, 4)])
def test_no_round_starts_once_the_budget_is_spent(
    budget: float, rounds: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second goes by in each pause: two before the first round, and two in each."""
    paused = Clock()
    pause = SimpleNamespace(sleep=lambda _: paused.call(1)(), monotonic=paused)
    monkeypatch.setattr(measuring, "time", pause)
    contenders = {name: Timed(clock.call(0.11)) for name in ("one", "other")}
    taken = seconds(contenders, 4, "cpu", budget)
    assert [len(times) for times in taken.values()] == [rounds, rounds]


def test_nothing_computes_on_more_cores() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with limited_to(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_device_is_timed_by_its_own_clock() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    (taken,) = seconds({"product": Timed(lambda: a @ a)}, 1, "cuda")["product"]
    assert 1e-6 < taken < 1


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000)

    def together() -> int:
        return len([torch.empty(1000) for _ in range(3)])

    assert peak_bytes(one_after_the_other, "cpu") == 4000
    assert peak_bytes(together, "cpu") == 12000


def test_measuring_memory_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_bytes(lambda: torch.ones(10), "cpu")
    assert capfd.readouterr() == ("", "")


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert quartiles([2.0]) == (2, 2, 2)
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (2.5, 3, 3.5)
