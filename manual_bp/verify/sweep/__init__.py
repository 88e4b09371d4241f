"""Judges PyTorch's own functions and modules, each against itself: nothing may be found wrong."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain

from tabulate import tabulate

from manual_bp.verify._case import Case
from manual_bp.verify._report import Report
from manual_bp.verify._run import run
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.sweep._exceptions import KNOWN, SKIPPED
from manual_bp.verify.sweep._own import own_cases
from manual_bp.verify.sweep._pytorch import pytorch_cases

_GROUPS = ("nn.functional", "nn", "linalg", "fft", "special", "masked")


def sweep_cases(seed: int = 0, every: int = 1) -> Iterator[Case]:
    """A case of each function and module.

    Args:
        seed: Which of PyTorch's samples are taken, and the seed of all random numbers.
        every: Take one case of so many, from the one of number `seed` on. So as many successive
            seeds take all cases, and each takes cases of every group.

    Raises:
        RuntimeError: This version of PyTorch has no such samples.
        ModuleNotFoundError: A package is missing that PyTorch's samples need.
    """
    for number, make in enumerate(chain(pytorch_cases(seed), own_cases(seed))):
        if number % every == seed % every and (case := make()) is not None:
            yield case


def judge(cases: Iterable[Case]) -> Iterator[Report]:
    """Judge each case by all fast checks but `informative_samples`, which judges the samples."""
    fast = [check for check in CHECKS if not check.slow and check.name != "informative_samples"]
    for case in cases:
        is_module = case.factory is not None
        yield run(case, [check.name for check in fast if is_module or not check.for_modules])


def alarms_of(report: Report) -> list[str]:
    """What the checks of a report found wrong.

    A check that is known to fail may pass for some samples.
    """
    return [
        f"{report.case}, seed {report.seed}, {outcome.check}: {outcome.message}"
        for outcome in report.outcomes
        if outcome.status == "failed"
    ]


def sweep(seeds: int) -> bool:
    """Judge all cases with several seeds, and print a table, and each alarm as it is found.

    Returns:
        Whether there was no alarm.
    """
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0, 0])
    names = set()
    for seed in range(seeds):
        for report in judge(sweep_cases(seed)):
            alarms = alarms_of(report)
            print("".join(f"{alarm}\n" for alarm in alarms), end="", flush=True)
            seconds = sum(outcome.seconds for outcome in report.outcomes)
            comparisons = sum(outcome.comparisons for outcome in report.outcomes)
            new = (report.case not in names, report.ran, comparisons, seconds, len(alarms))
            for group in (group_of(report.case), "all"):
                counts[group] = [a + b for a, b in zip(counts[group], new, strict=True)]
            names.add(report.case)
    table = [(group, *counts[group]) for group in ("torch", *_GROUPS, "all")]
    headers = ["", "cases", "checks", "comparisons", "s", "alarms"]
    print(tabulate(table, headers, floatfmt=".0f"))
    print(f"{seeds} seeds; left out: {len(SKIPPED)}, with a check known to fail: {len(KNOWN)}")
    return not counts["all"][-1]


def group_of(name: str) -> str:
    """The namespace of torch to which a function or module belongs."""
    return next((group for group in _GROUPS if name.startswith(f"{group}.")), "torch")
