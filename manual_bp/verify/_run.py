"""Runs the checks on a case."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from manual_bp.verify._autograd import HiddenTensorsError
from manual_bp.verify._case import Call, Case, Dtypes, Samples
from manual_bp.verify._check import STATE, Check
from manual_bp.verify._compare import Mismatch, NotApplicable, first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify._evidence import blind_spot, most_informative
from manual_bp.verify._global_state import restored
from manual_bp.verify._make_case import function_case, module_case
from manual_bp.verify._prepare import prepared
from manual_bp.verify._report import NOT_JUDGED, Outcome, Report, Status
from manual_bp.verify._warnings import without_pytorch_warnings
from manual_bp.verify._where import narrower, passes, pattern
from manual_bp.verify.checks import CHECKS

_FLAKY = (
    "flaky: the same check with the same arguments passed the second time, so it is random, or it "
    "remembers earlier calls"
)

_DETERMINISTIC = next(check for check in CHECKS if check.name == "deterministic")


class Judged(NamedTuple):
    """An outcome, and whether two calls with the same arguments gave different results."""

    outcome: Outcome
    calls_differ: bool


@without_pytorch_warnings()
def run(case: Case, only: Iterable[str] | None = None, *, slow: bool = True) -> Report:
    """Judge a case.

    Args:
        case: What is judged.
        only: Names of checks; by default all that apply to functions, modules or operators.
        slow: Whether to run the compiler checks, if `only` is not given.

    Raises:
        TypeError: only is a string, or a result holds tensors that would not be judged.
        ValueError: A check is unknown, or PyTorch cannot use the device here.

    Examples:
        >>> case = function_case(torch.sin, [(torch.randn(5, 3),)])
        >>> report = run(case, only=["finite_differences"])
        >>> report.ok, report.ran
        (True, 1)
    """
    if isinstance(only, str):
        raise TypeError(f"only must be names in a list or tuple; got {only!r}")
    only = None if only is None else list(only)
    require_usable(case, only or ())
    if only is None:
        chosen = [c for c in CHECKS if (slow or not c.slow) and _is_for(c, case)]
    else:
        chosen = [c for c in CHECKS if c.name in only]
    return report_on(case, chosen, first_outcome(case))


def first_outcome(case: Case) -> Judged:
    """Whether calls agree.

    Before anything else calls the code, so that what its first call leaves behind shows.
    """
    with restored(case.device):
        return _outcome(case, _DETERMINISTIC)


def report_on(case: Case, checks: Iterable[Check], first: Judged) -> Report:
    """Judge a case, of which it is known whether calls agree."""
    with restored(case.device):
        with restored(case.device):
            ready, notes = prepared(case, first.calls_differ)
        known = {_DETERMINISTIC.name: first} if ready.call is case.call else {}
        outcomes = tuple(_follow(_outcomes(ready, checks, known), checks))
    return Report(case.name, case.seed, str(case.device), outcomes, _names(case.dtypes), notes)


def require_usable(case: Case, only: Iterable[str] = ()) -> None:
    """Refuse what `run` cannot judge.

    Raises:
        ValueError: A check is unknown, or PyTorch cannot use the device here.
    """
    names = [check.name for check in CHECKS]
    unknown = sorted({*only, *case.expected_failures} - set(names))
    if unknown:
        raise ValueError(f"only and expected_failures must name checks of {names}; got {unknown}")
    try:
        torch.zeros(1, device=case.device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(
            f"device must be one that PyTorch can use here; got {case.device}"
        ) from None


def check_function(
    fn: Any,
    samples: Samples,
    reference: Call | None = None,
    *,
    only: Iterable[str] | None = None,
    slow: bool = True,
    **options: Any,
) -> Report:
    """Judge a callable or an `autograd.Function` class.

    Args:
        fn: What is judged, as for `function_case`.
        samples: A list of argument tuples, or a function that makes one from a generator.
        reference: The same function in ordinary differentiable PyTorch.
        only: Names of checks; by default all.
        slow: Whether to run the compiler checks.
        options: The keyword arguments of `function_case`.

    Raises:
        TypeError: fn or reference is not callable, or samples are not argument tuples.
        ValueError: A capability or a check is unknown.

    Examples:
        >>> checks = ["gradients_match_reference"]
        >>> check_function(torch.sin, [(torch.randn(5, 3),)], torch.cos, only=checks).ok
        False
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
    """Judge a module. Its parameters become arguments, so their gradients are judged too.

    Takes functions that make the module and its reference, see `module_case`. The other arguments
    are those of `check_function`, which raises the same errors.

    Examples:
        >>> checks = ["gradients_match_reference"]
        >>> check_module(nn.Tanh, [(torch.randn(5, 3),)], nn.Tanh, only=checks).ok
        True
    """
    return run(module_case(factory, samples, reference, **options), only, slow=slow)


def _names(dtypes: Iterable[Dtypes]) -> tuple[str, ...]:
    """The dtypes of a case for the report, such as "bfloat16" or "(bfloat16, float32)"."""
    return tuple(str(dtype).replace("torch.", "").replace("None", "as given") for dtype in dtypes)


def _outcomes(
    case: Case, checks: Iterable[Check], known: Mapping[str, Judged]
) -> Iterator[Outcome]:
    """The outcome of each check. If two calls differ, nothing else can be compared."""
    calls_differ = False
    failed: set[str] = set()
    for check in checks:
        if calls_differ:
            message = "two calls with the same arguments differ: see deterministic"
            yield Outcome(check.name, "not applicable", 0, 0.0, message)
            continue
        judged = known.get(check.name) or _outcome(case, check, failed)
        if judged.outcome.status == "failed":
            failed.add(check.name)
            calls_differ = judged.calls_differ
        yield judged.outcome


def _outcome(case: Case, check: Check, failed: Set[str] = frozenset()) -> Judged:
    started = time.perf_counter()
    ctx = CheckContext(case, check.name)
    ctx.is_cause = failed.isdisjoint(check.builds_on)
    with restored(case.device):
        status, message = _as_declared(case, check, *_judge(ctx, check))
    seconds, notes = time.perf_counter() - started, tuple(dict.fromkeys(ctx.notes))
    outcome = Outcome(check.name, status, ctx.comparisons, seconds, message, notes)
    return Judged(outcome, ctx.calls_differ)


def _is_for(check: Check, case: Case) -> bool:
    """Whether a check applies to a function, a module or an operator, as the case is one."""
    is_module, is_operator = case.factory is not None, case.operator is not None
    return (is_module or not check.for_modules) and (is_operator or not check.for_operators)


def _judge(ctx: CheckContext, check: Check) -> tuple[Status, str]:
    declared = not check.capability or check.name in ctx.case.supports
    try:
        _run_on_samples(ctx, check)
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except HiddenTensorsError:
        raise
    except Mismatch as mismatch:
        if check.only_if_declared and not declared:
            return "not applicable", f"not declared; {ctx.located(mismatch.finding)}"
        return "failed", _failure(ctx, check, mismatch)
    except Exception as error:
        if not declared:
            refusal = ctx.located(first_line(error))
            return "not applicable", f"not declared; it refuses: {refusal}"
        return "failed", _failure(ctx, check, Mismatch(f"raised {_description(error)}"))
    if ctx.kinks:
        ctx.notes.append(f"{ctx.kinks} directions start at a kink, which at_zero judges")
    if not declared:
        ctx.notes.append("not declared, but it works")
    return "passed", "; ".join(dict.fromkeys(ctx.notes))


def _run_on_samples(ctx: CheckContext, check: Check) -> None:
    """Run a check on the samples. It must compare something, and a mistake must be able to show."""
    reasons: dict[str, None] = {}
    for sample in ctx.each([most_informative(ctx)] if check.best_sample else ctx.samples):
        if ctx.failed and not ctx.may_go_on():
            break
        try:
            check.run(ctx, sample)
            ctx.judged.append(sample)
        except NotApplicable as reason:
            reasons[str(reason)] = None
        except Exception as problem:
            ctx.failed.append((ctx.current or sample, problem))
    if ctx.failed:
        ctx.current, first = ctx.failed[0]
        raise first
    if check.after_all is not None:
        check.after_all(ctx)
    if not (ctx.comparisons and ctx.judged):
        raise NotApplicable("; ".join(reasons) or "nothing to compare")
    if "informative_samples" not in ctx.case.expected_failures and (blind := blind_spot(ctx)):
        raise NotApplicable(f"inconclusive: {blind}")


def _failure(ctx: CheckContext, check: Check, mismatch: Mismatch) -> str:
    """The whole message of a failed check: what was found, why, where, and how to run it again."""
    lines = [ctx.located(mismatch.finding)]
    can_repeat = "deterministic" in check.builds_on and bool(ctx.failed) and ctx.may_go_on()
    # Checks of what one call does to another may well pass the second time.
    is_flaky = can_repeat and check.name not in STATE and passes(ctx.case, check)
    if is_flaky:
        lines.append(f"diagnosis: {_FLAKY}")
    elif mismatch.diagnosis:
        lines.append(f"diagnosis: {mismatch.diagnosis}")
    where = pattern(ctx.case, [sample for sample, _ in ctx.failed], ctx.judged)
    if where in ("", "at every sample") and can_repeat and not is_flaky:
        where = narrower(ctx.case, check) or where
    if where:
        lines.append(f"where: {where}")
    return "\n".join([*lines, _reproduction(ctx.case, check)])


def _follow(outcomes: Iterable[Outcome], checks: Iterable[Check]) -> Iterator[Outcome]:
    """The outcomes; those that follow from another failure say from which.

    That one may be expected. The author of the case has not expected what follows from it.
    """
    outcomes = list(outcomes)
    broken = [o for o in outcomes if o.status in ("failed", "expected failure")]
    findings = {o.check: o.message.partition("\n")[0] for o in broken}
    builds_on = {check.name: check.builds_on for check in checks}

    def cause(name: str) -> str:
        causes = (other for other in builds_on[name] if other in findings and not cause(other))
        return next(causes, "")

    roots = {name: cause(name) or name for name in findings}
    raised: dict[str, str] = {}
    for outcome in outcomes:
        root = roots.get(outcome.check, outcome.check)
        if "raised " in findings.get(root, ""):  # the same error has the same cause
            root = raised.setdefault(findings[root], root)
        yield replace(outcome, follows_from="" if root == outcome.check else root)


def _as_declared(case: Case, check: Check, status: Status, message: str) -> tuple[Status, str]:
    """The status in view of what the case supports, and of what is expected to fail."""
    if status == "not applicable" and check.name in case.supports and _is_for(check, case):
        status, message = "failed", f"{NOT_JUDGED}: {message}"
    reason = case.expected_failures.get(check.name)
    if reason is not None and status == "failed":
        return "expected failure", reason
    if reason is not None and status == "passed":
        return "unexpected pass", f"expected to fail: {reason}"
    return status, message


def _description(error: Exception) -> str:
    if isinstance(error, Warning):
        return f"a warning that the current filters turn into an error: {first_line(error)}"
    return first_line(error)


def _reproduction(case: Case, check: Check) -> str:
    if case.location:
        options = f"--check {check.name} --seed {case.seed}"
        return f"again: python -m manual_bp.verify {case.location} {options}"
    call = "check_module" if case.factory is not None else "check_function"
    return f"again: {call}({case.name}, ..., seed={case.seed}, only=[{check.name!r}])"
