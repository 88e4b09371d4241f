"""How long contenders take and how much memory they hold: in turns, within one run."""

import os
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import set_torch_threads
from torch.utils.benchmark import timer as clock

from experiments.benchmark.contender import Contender, attempt
from experiments.command_line import require_counts

# In seconds: how long a turn lasts, unless one call takes longer, and the rest before it. Libraries
# let their threads spin for a while after a call, on cores that others need.
TURN = 0.02
PAUSE = 0.05

# Otherwise the profiler's library reports on stderr every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Conditions:
    """What holds for every contender."""

    rounds: int = 50
    """The most rounds to measure. Tables show the median over rounds, and the quartiles."""
    budget: float = 60.0
    """Seconds after which no further round starts. Each table says how many rounds were made."""
    threads: int = 1
    """CPU cores that each contender may use."""
    device: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        require_counts(self, "rounds", "threads")
        if not self.budget >= 0:
            raise ValueError(f"--budget must be at least 0; got {self.budget}")
        if self.device != "cpu" and not (self.device == "cuda" and torch.cuda.is_available()):
            raise ValueError(
                f"--device must be cpu, or cuda if PyTorch finds such a device; got {self.device}"
            )


def measure(
    contenders: Sequence[Contender], conditions: Conditions, *, memory: bool = False
) -> None:
    """Check the results of all contenders, time them in turns, and take their peaks if asked to.

    A turn is as many calls as fit into 20 ms, after as many to warm up; or a single call of a
    contender that takes longer, not warmed up. CUDA devices are timed by their own clock. No round
    starts once the budget is spent, but one is always made. A contender that is inexact or raises
    drops out.
    """
    turn = _turn_on_cuda if conditions.device == "cuda" else _turn

    def count(contender: Contender) -> None:
        time.sleep(PAUSE)
        turn(contender, 2)
        number = 1
        while (taken := turn(contender, number)) < TURN / 4:
            number *= 2
        contender.calls = max(1, int(number * TURN / taken))

    def take_turn(contender: Contender) -> None:
        number = contender.calls
        time.sleep(PAUSE)
        if number > 1:
            turn(contender, number)
        contender.seconds.append(turn(contender, number) / (number * contender.each))

    attempt(Contender.check, contenders)
    started = time.monotonic()
    attempt(count, contenders)
    for done in range(conditions.rounds):
        if done and time.monotonic() - started > conditions.budget:
            break
        attempt(take_turn, contenders)
    if memory:
        attempt(partial(take_peak, conditions.device), contenders)


def take_peak(device: str, contender: Contender) -> None:
    """Note the peak of memory of a contender's call."""
    contender.peak = peak_bytes(contender.call, device)


def _turn(contender: Contender, number: int) -> float:
    started = clock()
    timeit.Timer(contender.call).timeit(number)
    contender.wait()
    return clock() - started


def _turn_on_cuda(contender: Contender, number: int) -> float:
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        contender.call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """A region in which nothing, PyTorch or other, computes on more cores than that."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    with set_torch_threads(threads), threadpool_limits(threads):
        if cores:
            # Some libraries start as many threads as they like; these then share the cores.
            os.sched_setaffinity(0, sorted(cores)[:threads])
        try:
            yield
        finally:
            if cores:
                os.sched_setaffinity(0, cores)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at any one time, beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # With several cycles PyTorch 2.11 would lose events, and warns of it; here there is only one.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return int(max(accumulate((change.nbytes() for change in changes), initial=0)))
