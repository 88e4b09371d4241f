"""The figures in docs/training_step.md are measured ones."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training_step.md").read_text("utf-8")
RESULTS = [file.read_text("utf-8") for file in (ROOT / "experiments" / "results").rglob("*.md")]


def test_each_measured_row_is_in_the_results() -> None:
    """Figures are copied from results that state their command, versions and date."""
    measured = re.findall(r"^\| +(?:\d|ours|torch|bare).*\|$", PAGE, flags=re.MULTILINE)
    assert len(measured) > 10
    kept = {line for page in RESULTS for line in page.splitlines()}
    assert not [row for row in measured if row not in kept]


def test_every_result_states_how_it_was_measured() -> None:
    assert RESULTS
    for page in RESULTS:
        for said in (
            "command: python -m experiments.benchmark",
            "machine: ",
            "versions: ",
            "date: ",
        ):
            assert f"\n- {said}" in page
