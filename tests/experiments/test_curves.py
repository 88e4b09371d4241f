from pathlib import Path

from experiments.curves import log_curves
from tests.helpers import logged_below


def test_a_table_becomes_a_curve_for_each_text_and_column(tmp_path: Path) -> None:
    rows = [
        {"who": who, "step": step, "size": size * step, "seen": nan}
        for who, size in (("one", 1.5), ("two", 2.5))
        for step, nan in ((1, 0.5), (2, float("nan")))
    ]
    log_curves(tmp_path, rows, over="step")
    logged = logged_below(tmp_path)
    assert {name: set(log.Tags()["scalars"]) for name, log in logged.items()} == {
        "one": {"size", "seen"},
        "two": {"size", "seen"},
    }
    assert [(p.step, p.value) for p in logged["two"].Scalars("size")] == [(1, 2.5), (2, 5)]
    assert [p.step for p in logged["two"].Scalars("seen")] == [1]  # nan is left out
