import os
import time
from collections.abc import Callable
from itertools import groupby, pairwise

import pytest
import torch

from experiments import measuring
from experiments.measuring import Timed, limited_to, peak_bytes, quartiles, ratios, seconds


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PAUSE", 0.0)


def noting(turns: list[str], name: str, seconds: float = 0) -> Callable[[], None]:
    def call() -> None:
        time.sleep(seconds)
        turns.append(name)

    return call


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    contenders = {name: Timed(noting(turns, name)) for name in ("one", "other")}
    taken = seconds(contenders, 4, "cpu")
    assert [len(times) for times in taken.values()] == [4, 4]
    changes = sum(one != two for one, two in pairwise(turns))
    assert changes >= 7


def test_a_turn_of_a_slow_contender_is_one_call() -> None:
    turns: list[str] = []
    slow, fast = Timed(noting(turns, "slow", 0.11)), Timed(noting(turns, "fast"))
    seconds({"slow": slow, "fast": fast}, 3, "cpu")
    counts = [(name, len(list(calls))) for name, calls in groupby(turns)]
    assert counts[-6::2] == [("slow", 1)] * 3
    assert all(count > 100 for _, count in counts[-5::2])


def test_what_a_call_does_many_times_is_counted_so() -> None:
    taken = seconds({"ten": Timed(lambda: time.sleep(0.03), each=10)}, 2, "cpu")
    assert taken["ten"] == pytest.approx([0.003, 0.003], rel=0.3)


def test_what_is_under_way_is_waited_for() -> None:
    taken = seconds({"later": Timed(lambda: None, wait=lambda: time.sleep(0.03))}, 2, "cpu")
    assert all(each >= 0.03 for each in taken["later"])


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


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert quartiles([2.0]) == (2, 2, 2)
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (2.5, 3, 3.5)
