"""Judges cases with many seeds, as the tests do with one: the command of several modules."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace

from manual_bp.verify import Report
from manual_bp.verify._case import Case
from manual_bp.verify._run import run
from tests.verify.low_precision import every_gradient, with_one_percent_more


def main(
    cases: dict[str, Case],
    judge: Callable[[Case], Iterable[Report]],
    accurate: dict[str, Case],
) -> None:
    """Print every false alarm, and every planted error that is missed, then how many there are.

    What a case expects to fail may pass with some seeds: a second multiplication by an upstream
    gradient does not show where that is 1. This is no alarm, but is counted too.

    Args:
        cases: Those in which nothing must be found.
        judge: How one of them is judged.
        accurate: Those in whose gradients 1 % is planted, one gradient at a time, in bfloat16.
    """
    parser = argparse.ArgumentParser(description="Judge right candidates, and planted errors.")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    seeds = range(parser.parse_args().seeds)
    alarms = held = missed = 0
    for seed in seeds:
        for name, case in cases.items():
            for report in judge(replace(case, seed=seed)):
                for outcome in report.failures:
                    is_alarm = outcome.status != "unexpected pass"
                    alarms, held = alarms + is_alarm, held + (not is_alarm)
                    kind = "alarm" if is_alarm else "passed"
                    print(f"{kind}: {name}, seed {seed}, {outcome.check}: {outcome.message}")
        for name, i in every_gradient(accurate):
            if not one_percent_is_found(replace(accurate[name], seed=seed), i):
                missed += 1
                print(f"missed: {name}, seed {seed}, argument {i}")
    planted = len(every_gradient(accurate)) * len(seeds)
    print(f"{len(cases)} candidates, seeds {len(seeds)}: {alarms} false alarms")
    print(f"expected to fail, but passed: {held}")
    print(f"1 % planted in a gradient: {planted - missed} of {planted} found")


def one_percent_is_found(case: Case, i: int) -> bool:
    """Whether the kit finds that a gradient is 1 % too large in bfloat16."""
    failures = run(with_one_percent_more(case, i), ["unbiased"]).failures
    return bool(failures) and "bfloat16" in failures[0].message
