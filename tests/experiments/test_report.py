import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from torch.utils.tensorboard.writer import SummaryWriter

from experiments import report
from experiments.report import write_report

STEPS = [0, 10, 20]


def drawn(svg: str, colour: str) -> list[tuple[float, float]]:
    """The corners of the line of a colour."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: {colour};', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])]


def test_curves_are_drawn_to_scale_each_in_its_colour() -> None:
    svg = report._chart({"a": (STEPS, [1.0, 3.0, 2.0]), "b": ([0, 20], [2.0, -1.0])})
    (x0, y0), (x1, y1), (x2, y2) = drawn(svg, "#1f77b4")
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-4)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(0.5, rel=1e-4)
    assert y1 < y0  # upwards
    (left, top), (right, bottom) = drawn(svg, "#ff7f0e")
    assert (left, right) == (x0, x2)
    assert top == pytest.approx(y2, rel=1e-4)
    assert (bottom - y0) / (y0 - y1) == pytest.approx(1, rel=1e-4)


def test_a_distribution_is_a_band_around_its_median() -> None:
    svg = report._chart({"a": ([0, 10], [1.0, 2.0], [0.0, 1.0], [4.0, 4.0])})
    (_, first), (_, second) = drawn(svg, "#1f77b4")
    band = re.search(r'<path id="\w+" d="([^"]*)"[^#]*#\w+\)">\s*<use [^>]*fill: #1f77b4', svg)
    assert band is not None
    heights = {float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", band[1])}
    found = sorted((max(heights) - y) / (first - second) for y in heights)
    assert found == pytest.approx([0, 1, 4], abs=1e-3)


@pytest.mark.parametrize("values", [[math.nan], [math.inf, -math.inf], [1e38, -1e38], [0.0]])
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    """Without a warning."""
    ElementTree.fromstring(report._chart({"a": (range(len(values)), values)}))


def test_many_long_curves_make_a_small_chart_and_have_different_colours() -> None:
    curves: dict[str, Any] = {}
    for layer in range(60):
        values = [float((layer + 7 * k) % 97) for k in range(1000)]
        curves[str(layer)] = range(1000), values, values, values
    svg = report._chart(curves)
    assert len(svg) < 200_000
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: (#\w+); stroke-width: 1.5', svg)
    assert len({colour for _, colour in lines}) == 60
    ends = {re.findall(r"[ML] (\S+) \S+", path)[-1] for path, _ in lines[:60]}
    assert len(ends) == 1  # all have their last point
    assert [text for text in re.findall(">([^<>]+)</text>", svg) if text in ("0", "59")][-2:] == [
        "0",
        "59",
    ]


@pytest.mark.parametrize(("layers", "has_bands"), [(8, True), (9, False)])
def test_bands_are_left_out_if_they_would_hide_each_other(layers: int, has_bands: bool) -> None:
    curves = {str(k): ([0, 1], [1.0, 2.0], [0.0, 1.0], [4.0, 4.0]) for k in range(layers)}
    assert ("fill-opacity: 0.25" in report._chart(curves)) == has_bands
    assert ("band" in report._about_lines(curves)) == has_bands
    assert "median" in report._about_lines(curves)
    assert report._about_lines({"a": ([0], [1.0])}) == ""


def test_layers_are_in_their_order_on_the_page(tmp_path: Path) -> None:
    names = ["1 64→30 sigmoid", "2 30→30 sigmoid", "3 30→9", "10 9→9 sigmoid"]
    for name in reversed(names):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("2. layers/loss", 1.0, 0)
    curves, _ = report._logged(tmp_path)
    ((_, found),) = curves.items()
    assert list(found) == names


def test_a_page_is_written_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, {"cost": "<b>"}, ["a < b"])
    before = (tmp_path / report.NAME).read_text("utf-8")
    assert "<p>a &lt; b</p>" in before
    assert "<td>&lt;b&gt;</td>" in before

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, {}, ["c"])
    assert [path.name for path in tmp_path.iterdir()] == [report.NAME]
    assert (tmp_path / report.NAME).read_text("utf-8") == before
