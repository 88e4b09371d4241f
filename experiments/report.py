"""Tables of a benchmark: on the terminal, and in a folder as Markdown, CSV and a picture."""

import csv
import datetime
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from experiments.run_folder import versions

Row = dict[str, str]

# What a figure may depend on, beside the machine.
LIBRARIES = ("torch", "numpy", "jax", "onnxruntime", "opacus", "backpack-for-pytorch")


@dataclass(frozen=True)
class Table:
    """What was found.

    rows: Cells as they are to be read, by the names of their columns.
    shows: The column that a picture shows.
    by: The column that tells what a row is of: one bar each.
    over: The column of numbers that it is drawn over, if any, in lines instead.
    rounds: How many ratios, or times, its medians are of, where they were measured round by round.
    """

    title: str
    rows: list[Row]
    shows: str
    by: str
    over: str | None = None
    rounds: int | None = None

    @property
    def caption(self) -> str:
        """What stands above it: the title, and how much was measured."""
        return self.title if self.rounds is None else f"{self.title}; rounds: {self.rounds}"

    def __str__(self) -> str:
        return tabulate(self.rows, "keys", tablefmt="github", disable_numparse=True)

    def draw(self, axes: Any) -> None:
        """The picture: as many times as much is as far, wherever on the scale."""
        axes.set_title(self.title, fontsize="medium", loc="left")
        if self.over is None:
            values = [float(row[self.shows]) for row in self.rows]
            axes.barh([row[self.by] for row in self.rows], values)
            axes.bar_label(axes.containers[0], [row[self.shows] for row in self.rows], padding=3)
            axes.invert_yaxis()
            axes.set_xlabel(self.shows)
            axes.margins(x=0.15)
            return
        for name in dict.fromkeys(row[self.by] for row in self.rows):
            rows = [row for row in self.rows if row[self.by] == name]
            points = [(float(row[self.over]), float(row[self.shows])) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=self.over, ylabel=self.shows, xlim=(0, None), ylim=(0, None))
        axes.legend()


def heading(command: Sequence[str], device: str) -> list[str]:
    """What the figures were taken with: command, machine, versions, date."""
    found = versions(LIBRARIES)
    installed = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    return [
        f"command: {shlex.join(command)}",
        f"machine: {machine(device)}",
        f"versions: {installed}",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ]


def machine(device: str) -> str:
    """The processor that computes, by its name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.processor()}, {capability}"


def save(folder: Path, name: str, lines: Sequence[str], tables: Sequence[Table]) -> list[Path]:
    """Write <name>.md, .csv and .png into the folder; what is there of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{suffix}" for suffix in (".md", ".csv", ".png")]
    parts = [f"# {name}", "\n".join(f"- {line}" for line in lines)]
    parts += [f"## {table.caption}\n\n{table}" for table in tables]
    paths[0].write_text("\n\n".join(parts) + "\n", "utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        columns = dict.fromkeys(column for table in tables for row in table.rows for column in row)
        writer = csv.DictWriter(file, ["table", *columns])
        writer.writeheader()
        for table in tables:
            writer.writerows({"table": table.title} | row for row in table.rows)
    heights = [1.2 + 0.3 * len(t.rows) if t.over is None else 4 for t in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    every_axes = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    for axes, table in zip(every_axes, tables, strict=True):
        table.draw(axes)
    figure.savefig(paths[2], dpi=100)
    return paths
