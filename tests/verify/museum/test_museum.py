"""The museum: every published mistake is caught, none in its correction, as the page says.

Only the check that the page names judges a mistake. That one, the common ones and an eighth of the
others judge its correction; the next correction has another eighth. Other tools judge two exhibits.
All checks and all tools: python -m tests.verify.museum
"""

import re

import pytest

from manual_bp.verify import run
from manual_bp.verify.checks import CHECKS
from tests.verify.museum import EXHIBITS, MISSED, Exhibit
from tests.verify.museum._table import PAGE, check_of, judge, rows_of, totals

TEXT = PAGE.read_text("utf-8")
ROWS = {row[0].strip("`"): row for row in rows_of(TEXT)}

# Judging each correction by all checks takes half a minute.
SHARE = 8
FAST = [c.name for c in CHECKS if not (c.slow or c.for_modules or c.for_operators)]
COMMON = ("forward_matches_reference", "gradients_match_reference", "double_backward")

REPORT = r"[\w.-]+/[\w.-]+#\d+"
RELEASE = r"[\w-]+ \d+(\.\d+)+, \w+"

each = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)


@each
def test_the_mistake_is_caught_by_the_check_on_the_page(exhibit: Exhibit) -> None:
    report = run(exhibit.wrong, [check_of(ROWS[exhibit.name])])
    assert exhibit.diagnosis in report.failures[0].diagnosis
    assert exhibit.diagnosis in ROWS[exhibit.name][3]


@each
def test_the_correction_passes_that_check_and_others(exhibit: Exhibit) -> None:
    own = FAST[EXHIBITS.index(exhibit) % SHARE :: SHARE]
    run(exhibit.fixed, [*COMMON, check_of(ROWS[exhibit.name]), *own]).raise_if_failed()


@pytest.mark.parametrize("name", ["upstream_overwritten", "gate_detached"])
def test_the_row_is_what_the_tools_say(name: str) -> None:
    (exhibit,) = (exhibit for exhibit in EXHIBITS if exhibit.name == name)
    assert judge(exhibit) == ROWS[name]


def test_the_page_shows_every_exhibit_and_counts_them() -> None:
    assert list(ROWS) == [exhibit.name for exhibit in EXHIBITS]
    assert totals(list(ROWS.values())) in TEXT


@pytest.mark.parametrize("exhibit", MISSED, ids=lambda exhibit: exhibit.name)
def test_the_page_names_what_is_missed(exhibit: Exhibit) -> None:
    assert run(exhibit.wrong, slow=False).ok
    assert f"`{exhibit.name}`" in TEXT


def test_every_exhibit_tells_its_report_and_its_mistake() -> None:
    for exhibit in EXHIBITS:
        assert re.fullmatch(f"{REPORT}|{RELEASE}", exhibit.source), exhibit.name
        assert exhibit.mistake.endswith("."), exhibit.name
    assert len(ROWS) == len(EXHIBITS)
