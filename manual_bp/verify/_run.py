"""Running the checks on a case, and the two calls that most users need."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from manual_bp.verify._bench import Bench
from manual_bp.verify._case import Case, Samples, function_case, module_case
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._report import Outcome, Report, Status
from manual_bp.verify._warnings import pytorchs_own_left_out
from manual_bp.verify.checks import CHECKS, Check
from manual_bp.verify.checks._shared import first_line


@pytorchs_own_left_out()
def run(case: Case, only: Iterable[str] | None = None, *, slow: bool = True) -> Report:
    """Judge a case by all checks, by those named, or by all but the compiler's, which are slow.

    Raises:
        ValueError: A name is no check's, or the device cannot be used here.
    """
    if isinstance(only, str):
        raise TypeError(f"only must be names in a list or tuple; got {only!r}")
    _require_device(case.device)
    names = [check.name for check in CHECKS]
    only = None if only is None else list(only)
    unknown = sorted({*(only or ()), *case.expected_failures} - set(names))
    if unknown:
        raise ValueError(f"only and expected_failures must name checks of {names}; got {unknown}")
    named = set(only or ())
    chosen = [
        check
        for check in CHECKS
        if check.name in named
        or (
            only is None
            and (slow or not check.is_slow)
            and (case.factory is not None or not check.is_for_modules)
        )
    ]
    forked = [] if case.device.type == "cpu" else [case.device]
    with torch.random.fork_rng(forked, device_type=case.device.type if forked else "cuda"):
        outcomes = tuple(_outcomes(case, chosen))
    return Report(case.name, case.seed, str(case.device), outcomes)


def _outcomes(case: Case, chosen: list[Check]) -> Iterator[Outcome]:
    """One outcome a check. Where two calls differ, nothing else can be compared."""
    differs = False
    for check in chosen:
        if differs:
            message = "two calls with the same arguments differ: see deterministic"
            yield Outcome(check.name, "not applicable", 0, 0.0, message)
            continue
        outcome = _outcome(case, check)
        differs = check.name == "deterministic" and "of a second call" in outcome.message
        yield outcome


def _require_device(device: torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"device must be one that PyTorch can use here; got {device}") from None


def check_function(
    fn: Any,
    samples: Samples,
    reference: Callable[..., Any] | None = None,
    *,
    only: Iterable[str] | None = None,
    slow: bool = True,
    **options: Any,
) -> Report:
    """Judge a callable or an `autograd.Function` class.

    Args:
        fn: What is judged, as for `function_case`.
        samples: A list of argument tuples, or a function of a generator that makes one.
        reference: What is right, as ordinary differentiable PyTorch.
        only: Names of checks; all, if None.
        slow: Whether to run the compiler's checks too.
        options: name, supports, in_dims, device, seed and expected_failures of `function_case`.

    Raises:
        TypeError: fn or reference cannot be called, or samples are no argument tuples.
        ValueError: A capability or the name of a check is unknown.
    """
    return run(function_case(fn, samples, reference, **options), only, slow=slow)


def check_module(
    factory: Callable[..., nn.Module],
    samples: Samples,
    reference: Callable[..., nn.Module] | None = None,
    *,
    only: Iterable[str] | None = None,
    slow: bool = True,
    **options: Any,
) -> Report:
    """Judge a module, its parameters lifted to arguments, so that their gradients count.

    Arguments and errors are those of `check_function`, with functions that make the module and
    its reference in the place of both; see `module_case`.
    """
    return run(module_case(factory, samples, reference, **options), only, slow=slow)


def _outcome(case: Case, check: Check) -> Outcome:
    started = time.perf_counter()
    declared = not check.is_capability or check.name in case.supports
    bench = Bench(case, check.name)
    status: Status = "passed"
    message = "" if declared else "not declared, but it works"
    try:
        check.run(bench)
        if bench.kinks:
            message = f"{bench.kinks} directions start at a kink, which at_zero judges"
        if not bench.comparisons:
            status, message = "not applicable", "nothing to compare"
        elif "telling_samples" not in case.expected_failures and (unseen := bench.unseen()):
            status, message = "not applicable", f"it cannot tell: {unseen}"
    except NotApplicable as reason:
        status, message = "not applicable", str(reason)
    except Mismatch as mismatch:
        if check.only_if_declared and not declared:
            status, message = "not applicable", f"not declared; {str(mismatch).splitlines()[0]}"
        else:
            status, message = "failed", f"{mismatch}\n{_again(case, check)}"
    except Exception as error:
        if declared:
            status, message = "failed", f"raised {_told(error)}\n{_again(case, check)}"
        else:
            status, message = "not applicable", f"not declared; it refuses: {first_line(error)}"
    if status == "not applicable" and check.name in case.supports:
        status, message = "failed", f"declared, but it cannot be judged: {message}"
    if check.name in case.expected_failures:
        reason_given = case.expected_failures[check.name]
        if status == "failed":
            status, message = "expected failure", reason_given
        elif status == "passed":
            status, message = "unexpected pass", f"expected to fail: {reason_given}"
    seconds = time.perf_counter() - started
    return Outcome(check.name, status, bench.comparisons, seconds, message)


def _told(error: Exception) -> str:
    if isinstance(error, Warning):
        return f"its own warning, which the filters in force make an error: {first_line(error)}"
    return first_line(error)


def _again(case: Case, check: Check) -> str:
    if case.place:
        options = f"--check {check.name} --seed {case.seed}"
        return f"again: python -m manual_bp.verify {case.place} {options}"
    call = "check_module" if case.factory is not None else "check_function"
    return f"again: {call}({case.name}, ..., seed={case.seed}, only=[{check.name!r}])"
