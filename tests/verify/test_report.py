import json

import pytest

from manual_bp.verify import Outcome, Report


def report(*outcomes: Outcome) -> Report:
    return Report("case", 3, "cpu", outcomes)


PASSED = Outcome("one", "passed", 5, 0.1)
FAILED = Outcome("two", "failed", 2, 0.2, "wrong\ndiagnosis: a sign")
LEFT = Outcome("three", "not applicable", 0, 0.0, "no reference was given")
KNOWN = Outcome("four", "expected failure", 1, 0.0, "known")
SURPRISE = Outcome("five", "unexpected pass", 1, 0.0, "expected to fail: known")


def test_a_report_without_failures_is_ok() -> None:
    found = report(PASSED, LEFT, KNOWN)
    assert found.ok
    assert found.failures == ()
    assert found.ran == 2
    found.raise_if_failed()
    assert str(found).splitlines()[-1] == (
        "ok: 2 checks ran (1 passed, 1 expected failure), 1 not applicable"
    )


@pytest.mark.parametrize(
    ("outcomes", "last"),
    [
        ((PASSED, FAILED), "NOT OK: 2 checks ran (1 passed, 1 failed), 0 not applicable"),
        (
            (PASSED, SURPRISE),
            "NOT OK: 2 checks ran (1 passed, 1 unexpected pass), 0 not applicable",
        ),
        ((LEFT,), "NOT OK: 0 checks ran (none), 1 not applicable"),
        ((), "NOT OK: 0 checks ran (none), 0 not applicable"),
    ],
)
def test_a_report_with_a_failure_or_without_any_run_is_not_ok(
    outcomes: tuple[Outcome, ...], last: str
) -> None:
    found = report(*outcomes)
    assert not found.ok
    assert str(found).splitlines()[-1] == last
    with pytest.raises(AssertionError, match="case on cpu in float64, seed 3"):
        found.raise_if_failed()


def test_the_table_has_a_line_per_check_and_the_whole_message() -> None:
    lines = str(report(PASSED, FAILED, LEFT)).splitlines()
    assert lines[1].split() == ["one", "passed", "5", "0.10", "s"]
    assert lines[2].split()[:2] == ["two", "failed"]
    assert lines[3].strip() == "diagnosis: a sign"
    assert lines[4].endswith("no reference was given")


def test_to_dict_can_be_printed_as_json() -> None:
    found = json.loads(json.dumps(report(PASSED, FAILED).to_dict()))
    assert found["ok"] is False
    assert found["seed"] == 3
    assert [outcome["check"] for outcome in found["outcomes"]] == ["one", "two"]
