"""The table of docs/museum.md: what the kit and other tools say about every exhibit."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from manual_bp.verify import Report, run
from tests.verify.museum._exhibit import Exhibit
from tests.verify.museum._rivals import allclose, gradcheck, opcheck, what_it_says

PAGE = Path(__file__).parents[3] / "docs" / "museum.md"
HEADS = ("Exhibit", "Report", "Mistake", "The kit", "gradcheck", "opcheck", "allclose")
TOOLS = (gradcheck, opcheck, allclose)


def judge(exhibit: Exhibit) -> tuple[str, ...]:
    """The row of an exhibit."""
    said = [what_it_says(tool, exhibit) for tool in TOOLS]
    verdict = verdict_of(run(exhibit.wrong, slow=False))
    cells = (f"`{exhibit.name}`", exhibit.source, exhibit.mistake, verdict, *said)
    return tuple(cell.replace("|", "\\|") for cell in cells)


def verdict_of(report: Report) -> str:
    """The first cause in a report, with its diagnosis."""
    if report.ok:
        return "missed"
    first = report.causes[0]
    return f"`{first.check}`: {first.diagnosis or 'caught, not diagnosed'}"


def check_of(row: Sequence[str]) -> str:
    """The check that a row names."""
    return row[3].split("`")[1]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """The table, and the totals below it."""
    table = tabulate(rows, HEADS, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{totals(rows)}\n"


def totals(rows: Sequence[Sequence[str]]) -> str:
    """How many exhibits the kit and each tool caught."""
    caught = sum(row[3] != "missed" for row in rows)
    diagnosed = sum(not row[3].endswith(("missed", "not diagnosed")) for row in rows)
    theirs = [
        f"{name} {sum(row[i] == 'caught' for row in rows)}"
        for i, name in enumerate(HEADS[4:], start=4)
    ]
    return (
        f"Of {len(rows)} exhibits the kit catches {caught}, {diagnosed} of them with a diagnosis; "
        f"{', '.join(theirs)}."
    )


def rows_of(page: str) -> list[tuple[str, ...]]:
    """The rows of the table in a page."""
    lines: Iterable[str] = re.findall(r"^\| (`\w+` .*) \|$", page, re.MULTILINE)
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)) for line in lines]
