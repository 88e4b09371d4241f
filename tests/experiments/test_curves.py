from pathlib import Path

import pytest

from experiments.curves import log_curves
from tests.helpers import logged_below


def test_a_table_becomes_a_curve_for_each_text_and_column(tmp_path: Path) -> None:
    rows = [
        {"who": who, "step": step, "size": size * step, "seen": nan}
        for who, size in (("one", 1.5), ("two", 2.5))
        for step, nan in ((1, 0.5), (2, float("nan")))
    ]
    charts = {"size": "Of one or two.", "seen": "If at all."}
    log_curves(tmp_path, rows, "step", charts)
    logged = logged_below(tmp_path)
    assert {name: set(log.Tags()["scalars"]) for name, log in logged.items()} == {
        "one": {"size", "seen"},
        "two": {"size", "seen"},
    }
    assert [(p.step, p.value) for p in logged["two"].Scalars("size")] == [(1, 2.5), (2, 5)]
    assert [p.step for p in logged["two"].Scalars("seen")] == [1]  # nan is left out
    found = logged["one"].SummaryMetadata("size")
    assert found.summary_description == charts["size"]


def test_a_chart_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="size"):
        log_curves(tmp_path, [{"who": "one", "step": 1, "size": 0.5}], "step", {})
