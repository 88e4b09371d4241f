"""A pytest test for each case and check."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from manual_bp.verify._case import Case
from manual_bp.verify._check import Check
from manual_bp.verify._run import Judged, first_outcome, report_on, require_usable
from manual_bp.verify._warnings import without_pytorch_warnings
from manual_bp.verify.checks import CHECKS

if TYPE_CHECKING:
    import pytest


def parametrize_with_checks(cases: Iterable[Case], *, slow: bool = True) -> "pytest.MarkDecorator":
    """A decorator for a test with one argument, `check`, which the test should call.

    Tests are named `<case>-<check>`, so that `-k` can select them. Checks that do not apply are
    skipped with the reason, as are cases on a device that is missing. An expected failure is an
    xfail.

    Args:
        cases: What to judge.
        slow: Whether to run the compiler checks too.

    Examples:
        >>> @parametrize_with_checks([function_case(torch.sin, [(torch.randn(5, 3),)])])
        ... def test_my_layers(check):
        ...     check()
    """
    import pytest

    parameters = [
        pytest.param(
            partial(_judge, case, check, first),
            id=f"{case.name}-{check.name}" + ("" if case.device.type == "cpu" else "-cuda"),
            marks=pytest.mark.skipif(
                case.device.type == "cuda" and not torch.cuda.is_available(),
                reason="PyTorch sees no CUDA device",
            ),
        )
        for case in cases
        for first in [cache(partial(first_outcome, case))]  # once for all tests of a case
        for check in CHECKS
        if slow or not check.slow
    ]
    return pytest.mark.parametrize("check", parameters)


@without_pytorch_warnings()
def _judge(case: Case, check: Check, first: Callable[[], Judged]) -> None:
    import pytest

    require_usable(case)
    (outcome,) = report_on(case, [check], first()).outcomes
    if outcome.status == "not applicable":
        pytest.skip(outcome.message)
    if outcome.status == "expected failure":
        pytest.xfail(outcome.message)
    if outcome.is_failure:
        where = f"{case.name}, {check.name}, seed {case.seed}"
        pytest.fail(f"{where}: {outcome.message}", pytrace=False)
