"""How long calls take and how much memory they hold, contenders in turn, in one run."""

import math
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import set_torch_threads
from torch.utils.benchmark import timer as clock

# Seconds: how long a turn is, unless one call takes longer; and how long nothing runs before it.
# Libraries let their threads look for more to do for a while, on cores that others need.
TURN = 0.02
PAUSE = 0.05

# Else the profiler's library says on stderr, each time, that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Timed:
    """What is timed.

    call: Does it.
    each: How many times one call does what is compared.
    wait: Comes back when all calls so far are done, if a call may come back before.
    """

    call: Callable[[], object]
    each: int = 1
    wait: Callable[[], object] = lambda: None


def seconds(
    contenders: Mapping[str, Timed], rounds: int, device: str, budget: float = math.inf
) -> dict[str, list[float]]:
    """How long each contender takes for one of what is compared, round by round.

    A turn is as many calls as fit into 20 ms, warmed up; but one call, as it comes, of a contender
    that takes long. On a CUDA device its own clock measures. No round starts once the budget, in
    seconds, is spent; but one is always made.
    """
    turn = _turn_on_cuda if device == "cuda" else _turn
    started = time.monotonic()
    numbers = {name: _calls_in_a_turn(timed, turn) for name, timed in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for done in range(rounds):
        if done and time.monotonic() - started > budget:
            break
        for name, timed in contenders.items():
            time.sleep(PAUSE)
            if numbers[name] > 1:
                turn(timed, numbers[name])
            taken[name].append(turn(timed, numbers[name]) / (numbers[name] * timed.each))
    return taken


def _calls_in_a_turn(timed: Timed, turn: Callable[[Timed, int], float]) -> int:
    time.sleep(PAUSE)
    turn(timed, 2)
    number = 1
    while (taken := turn(timed, number)) < TURN / 4:
        number *= 2
    return max(1, int(number * TURN / taken))


def _turn(timed: Timed, number: int) -> float:
    started = clock()
    timeit.Timer(timed.call).timeit(number)
    timed.wait()
    return clock() - started


def _turn_on_cuda(timed: Timed, number: int) -> float:
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        timed.call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """A region in which nothing, PyTorch or other, computes on more cores than that."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    with set_torch_threads(threads), threadpool_limits(threads):
        if cores:
            # For libraries that start threads as they like: each has its part of these cores.
            os.sched_setaffinity(0, sorted(cores)[:threads])
        try:
            yield
        finally:
            if cores:
                os.sched_setaffinity(0, cores)


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Of what was taken round by round: the quartiles and the median between, of one to other."""
    return quartiles([a / b for a, b in zip(one, other, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at any one time, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # PyTorch 2.11 warns of events that are lost between cycles, of which there is but one here.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for change in changes:
        held += change.nbytes()
        most = max(most, held)
    return most
