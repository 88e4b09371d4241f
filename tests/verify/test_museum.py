"""The museum: every published mistake is caught, none in its correction, as the page says."""

import re

import pytest

from manual_bp.verify import run
from tests.verify.museum import EXHIBITS, Exhibit
from tests.verify.museum._table import PAGE, judge, rows_of, totals

TEXT = PAGE.read_text("utf-8")
ROWS = {row[0].strip("`"): row for row in rows_of(TEXT)}

REPORT = r"[\w.-]+/[\w.-]+#\d+"
RELEASE = r"[\w-]+ \d+(\.\d+)+, \w+"

each = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)


@each
def test_the_mistake_is_caught_and_judged_as_the_page_says(exhibit: Exhibit) -> None:
    row = judge(exhibit)
    assert exhibit.diagnosis in row[3]
    assert exhibit.diagnosis or row[3].endswith("not diagnosed")
    assert ROWS[exhibit.name] == row


@each
def test_the_correction_raises_no_alarm(exhibit: Exhibit) -> None:
    run(exhibit.fixed, slow=False).raise_if_failed()


def test_the_page_shows_every_exhibit_and_counts_them() -> None:
    assert list(ROWS) == [exhibit.name for exhibit in EXHIBITS]
    assert totals(list(ROWS.values())) in TEXT


def test_every_exhibit_tells_its_report_and_its_mistake() -> None:
    for exhibit in EXHIBITS:
        assert re.fullmatch(f"{REPORT}|{RELEASE}", exhibit.source), exhibit.name
        assert exhibit.mistake.endswith("."), exhibit.name
    assert len({exhibit.name for exhibit in EXHIBITS}) == len(EXHIBITS)
