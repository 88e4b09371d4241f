"""The tables of a benchmark: on the terminal, and in a folder as Markdown, CSV and a picture."""

import csv
import datetime
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from experiments.benchmark.contender import Contender, Row
from experiments.run_folder import versions

# What a figure may depend on, besides the machine.
LIBRARIES = ("torch", "numpy", "jax", "onnxruntime", "opacus", "backpack-for-pytorch")


@dataclass(frozen=True)
class Table:
    """What was found.

    rows: The cells as text, by the names of their columns.
    shows: The column that the picture shows.
    by: The column that names what a row is about: a bar, or a line.
    contenders: Those that were measured for it.
    over: A column of numbers to plot against, if the picture has lines instead of bars.
    """

    title: str
    rows: list[Row]
    shows: str
    by: str
    contenders: Sequence[Contender] = ()
    over: str | None = None

    @property
    def caption(self) -> str:
        """The title, and how many rounds were measured, if any."""
        rounds = min((len(c.seconds) for c in self.contenders if not c.note), default=0)
        return f"{self.title}; rounds: {rounds}" if rounds else self.title

    @property
    def faults(self) -> list[str]:
        """Why contenders of ours dropped out."""
        return [
            f"{self.title}: {c.name}: {c.note}" for c in self.contenders if c.is_ours and c.note
        ]

    def __str__(self) -> str:
        heads = _columns(self.rows)
        cells = [[row.get(head, "") for head in heads] for row in self.rows]
        return tabulate(cells, heads, tablefmt="github", disable_numparse=True)

    def draw(self, axes: Any) -> None:
        """Draw bars or lines from 0; a row without a figure gets its note, or no point."""
        axes.set_title(self.title, fontsize="medium", loc="left")
        if self.over is None:
            labels = [row.get(self.shows) or row.get("note", "") for row in self.rows]
            values = [float(row.get(self.shows) or 0) for row in self.rows]
            bars = axes.barh([row[self.by] for row in self.rows], values)
            axes.bar_label(bars, labels, padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.set(xlabel=self.shows, xlim=(0, None))
            return
        for name in dict.fromkeys(row[self.by] for row in self.rows):
            rows = [row for row in self.rows if row[self.by] == name and row.get(self.shows)]
            x, y = ([float(row[column]) for row in rows] for column in (self.over, self.shows))
            axes.plot(x, y, marker="o", label=name)
        axes.set(xlabel=self.over, ylabel=self.shows, xlim=(0, None), ylim=(0, None))
        axes.legend()


def relative(title: str, label: Row, by: str, unit: str, contenders: Sequence[Contender]) -> Table:
    """Time and memory of each contender, also relative to the first one's."""
    base = contenders[0]

    def cells(contender: Contender) -> Row:
        time, quartiles = contender.ratio(base)
        micros, peak = contender.micros, contender.peak
        return {
            unit: f"{micros:.1f}" if unit == "µs" else f"{micros / 1e3:.3f}",
            "time": time,
            "quartiles": quartiles,
            "peak, MB": f"{peak / 1e6:.2f}",
            "memory": "" if base.note else f"{peak / base.peak:.3f}",
        }

    rows = [c.row(label | {by: c.name}, cells) for c in contenders]
    return Table(title, rows, "time", by, contenders)


def _columns(rows: Iterable[Row]) -> list[str]:
    """The columns of all rows, in order, the note last."""
    found = dict.fromkeys(column for row in rows for column in row)
    return sorted(found, key=lambda column: column == "note")


def heading(command: Sequence[str], device: str) -> list[str]:
    """How the figures were obtained: command, machine, versions, date."""
    found = versions(LIBRARIES)
    installed = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    return [
        f"command: {shlex.join(command)}",
        f"machine: {machine(device)}",
        f"versions: {installed}",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ]


def machine(device: str) -> str:
    """The name of the processor that computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.processor()}, {capability}"


def save(folder: Path, name: str, lines: Sequence[str], tables: Sequence[Table]) -> list[Path]:
    """Write <name>.md, .csv and .png to the folder, replacing existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    page, cells, picture = (folder / f"{name}{suffix}" for suffix in (".md", ".csv", ".png"))
    parts = [f"# {name}", "\n".join(f"- {line}" for line in lines)]
    parts += [f"## {table.caption}\n\n{table}" for table in tables]
    page.write_text("\n\n".join(parts) + "\n", "utf-8")
    with cells.open("w", encoding="utf-8", newline="") as file:
        columns = _columns(row for table in tables for row in table.rows)
        writer = csv.DictWriter(file, ["table", *columns])
        writer.writeheader()
        for table in tables:
            writer.writerows({"table": table.title} | row for row in table.rows)
    heights = [1.2 + 0.3 * len(t.rows) if t.over is None else 4 for t in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    every_axes = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    for axes, table in zip(every_axes, tables, strict=True):
        table.draw(axes)
    figure.savefig(picture, dpi=100)
    return [page, cells, picture]
