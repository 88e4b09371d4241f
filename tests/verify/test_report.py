import json

import pytest

from manual_bp.verify import Outcome, Report
from manual_bp.verify._report import NOT_JUDGED


def report(*outcomes: Outcome) -> Report:
    return Report("case", 3, "cpu", outcomes)


PASSED = Outcome("one", "passed", 5, 0.1)
FAILED = Outcome(
    "two",
    "failed",
    2,
    0.2,
    "gradient of w, at index (0,): expected 1, got -1\ndiagnosis: a sign\nwhere: only in float32",
)
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


def test_the_first_line_is_the_verdict() -> None:
    assert report(PASSED).verdict == str(report(PASSED)).splitlines()[0] == "ok"
    wrong = report(PASSED, FAILED)
    assert wrong.verdict == "NOT OK: gradient of w – a sign, only in float32"
    assert str(wrong).splitlines()[:2] == [wrong.verdict, "case on cpu in float64, seed 3"]
    assert report(LEFT).verdict == "NOT OK: nothing was compared"
    raised = Outcome("two", "failed", 0, 0.0, "raised TypeError: no\nagain: run it")
    assert report(raised).verdict == "NOT OK: two: raised TypeError: no"


def test_failures_stand_before_the_table_and_what_follows_from_them_on_one_line() -> None:
    later = [Outcome(name, "failed", 1, 0.0, "wrong", follows_from="two") for name in "abc"]
    lines = str(report(PASSED, later[0], FAILED, *later[1:], LEFT)).splitlines()
    assert lines[3:8] == [
        "two: gradient of w, at index (0,): expected 1, got -1",
        "    diagnosis: a sign",
        "    where: only in float32",
        "    3 checks that build on it fail too: a, b, c",
        "",
    ]
    assert lines[8].split() == ["one", "passed", "5", "0.10", "s"]
    assert lines[9].split() == ["a", "failed", "1", "0.00", "s", "follows", "from", "two"]
    assert lines[10].split() == ["two", "failed", "2", "0.20", "s"]
    assert lines[-2].endswith("no reference was given")
    one = report(FAILED, later[0])
    assert "    1 check that builds on it fails too: a" in str(one).splitlines()


def test_what_cannot_be_judged_stands_after_what_is_wrong() -> None:
    unjudged = Outcome("one", "failed", 0, 0.0, f"{NOT_JUDGED}: no in_dims")
    assert report(unjudged, FAILED).causes == (FAILED, unjudged)


def test_to_dict_can_be_printed_as_json_and_tells_all() -> None:
    noted = Outcome("one", "passed", 5, 0.1, "a; b", notes=("a", "b"))
    later = Outcome("six", "failed", 1, 0.0, "wrong", follows_from="two")
    found = json.loads(json.dumps(report(noted, FAILED, later).to_dict()))
    assert found["ok"] is False
    assert found["seed"] == 3
    assert found["dtypes"] == ["float64"]
    assert found["verdict"] == "NOT OK: gradient of w – a sign, only in float32"
    assert found["causes"] == ["two"]
    first, second, third = found["outcomes"]
    assert (first["check"], first["notes"]) == ("one", ["a", "b"])
    assert (second["diagnosis"], second["where"]) == ("a sign", "only in float32")
    assert (third["follows_from"], third["diagnosis"]) == ("two", "")
