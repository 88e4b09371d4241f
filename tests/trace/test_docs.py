"""docs/trace.md agrees with the code."""

import re
from pathlib import Path

from manual_bp import LayerDiagnostics, Trace
from manual_bp.trace import _measure, _verdict

PAGE = (Path(__file__).parents[2] / "docs" / "trace.md").read_text("utf-8")


def test_every_number_of_the_diagnostics_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`\w+`.*?) \|", PAGE, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(LayerDiagnostics.__dataclass_fields__) - {"name", "verdict"}


def test_the_thresholds_are_those_of_the_code() -> None:
    assert f"< {_measure.SATURATED:.0%}".replace("%", " %") in PAGE
    assert f"{_measure.DEAD:.0%}".replace("%", " %") in PAGE
    words = " ".join(PAGE.split())
    assert f"its error {_verdict.FAR:.0f} times smaller" in words
    assert _verdict.MANY == 0.5  # "half"
    assert f": {_verdict.MOST * 100:.0f} % of its neurons saturated or more" in words
    assert f"less than {_verdict.PASSED * 100:.0f} % of the error passed" in words
    assert f"an update {_verdict.LEAP:.0f} times larger than the weights" in words


def test_every_method_of_a_trace_named_in_the_page_exists() -> None:
    for name in re.findall(r"`(?:trace\.)?(\w+)\(", PAGE):
        if name.startswith(("per_sample", "clipped", "split", "diagnostics")):
            assert hasattr(Trace, name), name
