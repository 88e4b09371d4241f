"""Every planted mistake is caught by the check meant for it; twins and PyTorch's layers pass."""

from collections import Counter

import pytest

from manual_bp.verify import Case, run
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.mutants import MUTANTS, TWINS, Mutant, Twin
from manual_bp.verify.self_test import judge_twin, pytorch_cases, pytorch_reports


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_by_the_check_meant_for_it(mutant: Mutant) -> None:
    (outcome,) = run(mutant.case, only=[mutant.caught_by]).outcomes
    assert outcome.status == "failed", outcome
    assert outcome.message


def test_every_check_has_a_mutant() -> None:
    meant = Counter(mutant.caught_by for mutant in MUTANTS)
    # It needs a second device.
    assert set(meant) == {check.name for check in CHECKS} - {"device_parity"}
    assert len(MUTANTS) >= 25
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_no_check_accuses_a_right_twin(twin: Twin) -> None:
    judge_twin(twin, seed=11).raise_if_failed()


def test_every_twin_has_its_own_name() -> None:
    assert len({twin.name for twin in TWINS}) == len(TWINS) > 0


def test_no_false_alarm_on_pytorchs_layers() -> None:
    """With more seeds: python -m manual_bp.verify --self-test --seeds 50."""
    for report in pytorch_reports(seed=11):
        report.raise_if_failed()


@pytest.mark.parametrize("case", pytorch_cases(), ids=lambda case: case.name)
def test_no_false_alarm_by_the_compiler_checks(case: Case) -> None:
    report = run(case, only=[check.name for check in CHECKS if check.slow])
    assert not report.failures, report
