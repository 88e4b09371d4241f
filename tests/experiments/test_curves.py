from pathlib import Path

from experiments.curves import log_curves
from tests.helpers import logged_in


def test_a_table_becomes_a_curve_for_each_text_and_column(tmp_path: Path) -> None:
    rows = [
        {"who": who, "step": step, "size": size * step, "seen": nan}
        for who, size in (("one", 1.5), ("two", 2.5))
        for step, nan in ((1, 0.5), (2, float("nan")))
    ]
    log_curves(tmp_path, rows, over="step")
    logged = logged_in(tmp_path)
    assert set(logged.Tags()["scalars"]) == {"size/one", "size/two", "seen/one", "seen/two"}
    assert [(p.step, p.value) for p in logged.Scalars("size/two")] == [(1, 2.5), (2, 5)]
    assert [p.step for p in logged.Scalars("seen/two")] == [1]  # nan is left out
    assert "custom_scalars__config__" in logged.Tags()["tensors"]
