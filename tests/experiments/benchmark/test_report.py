import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmark.contender import Contender
from experiments.benchmark.report import Table, relative, save

BARS = Table(
    "Bars",
    [{"who": "a", "note": "out of memory"}, {"who": "b", "time": "2.50"}, {"who": "c", "time": ""}],
    "time",
    "who",
)
LINES = Table(
    "Lines",
    [
        {"who": "a", "size": "1", "µs": "3"},
        {"who": "a", "size": "2", "note": "inexact: off by 1.0e+00, 1.0e-06 allowed"},
        {"who": "a", "size": "4", "µs": "9"},
    ],
    "µs",
    "who",
    over="size",
)


def drawn(table: Table) -> Any:
    axes = Figure().subplots()
    table.draw(axes)
    return axes


def test_a_bar_without_a_figure_has_no_length_and_shows_the_note() -> None:
    axes = drawn(BARS)
    assert [bar.get_width() for bar in axes.patches] == [0, 2.5, 0]
    assert [text.get_text() for text in axes.texts] == ["out of memory", "2.50", ""]


def test_a_line_has_no_point_without_a_figure() -> None:
    (line,) = drawn(LINES).lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 4], [3, 9])


def test_the_note_is_the_last_column(tmp_path: Path) -> None:
    assert str(BARS).splitlines() == [
        "| who   | time   | note          |",
        "|-------|--------|---------------|",
        "| a     |        | out of memory |",
        "| b     | 2.50   |               |",
        "| c     |        |               |",
    ]
    paths = save(tmp_path, "question", ["a line"], [BARS, LINES])
    with paths[1].open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["table", "who", "time", "size", "µs", "note"]


def test_time_and_memory_are_relative_to_the_first_contender() -> None:
    contenders = [
        Contender("a", seconds=[1.0, 2.0], peak=2_000_000),
        Contender("b", seconds=[2.0, 2.0], peak=1_000_000),
        Contender("c", note="out of memory", is_ours=True),
    ]
    table = relative("title", {"net": "6-4"}, "who", "ms", contenders)
    assert table.rows[1:] == [
        {
            "net": "6-4",
            "who": "b",
            "ms": "2000.000",
            "time": "1.500",
            "quartiles": "1.250 to 1.750",
            "peak, MB": "1.00",
            "memory": "0.500",
        },
        {"net": "6-4", "who": "c", "note": "out of memory"},
    ]
    assert table.caption == "title; rounds: 2"
    assert table.faults == ["title: c: out of memory"]


def test_nothing_is_relative_to_a_contender_that_dropped_out() -> None:
    contenders = [Contender("a", note="no"), Contender("b", seconds=[2.0], peak=1_000_000)]
    _, row = relative("title", {}, "who", "µs", contenders).rows
    assert (row["µs"], row["time"], row["quartiles"], row["memory"]) == ("2000000.0", "", "", "")
