"""What the experiments on the claims of the notes share: where they put what they find."""

import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.command_line import refuse
from experiments.curves import Row, log_curves
from experiments.run_folder import RunFolder, can_be_made, run_path

# Large enough to be read from the back of a lecture hall.
STYLE: Any = {
    "font.size": 13,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 13,
    "figure.titlesize": 16,
    "grid.alpha": 0.3,
    "legend.fontsize": 11,
    "lines.linewidth": 2.2,
}
SIZE = (11, 5.2)  # inches
DPI = 100
WIDTH = 100  # of what is printed


@dataclass(frozen=True)
class Options:
    """What every experiment lets one choose."""

    run_folder: Path = Path("runs")
    """Where the folder of the run is created."""

    def __post_init__(self) -> None:
        if not can_be_made(self.run_folder):
            raise ValueError(
                f"--run-folder must be a place to write to; got {str(self.run_folder)!r}"
            )


def require_range(options: Options, least: float, most: float, *names: str) -> None:
    """Check that options, or all numbers of those that have several, are in a range.

    Raises:
        ValueError: One of them is not.
    """
    for name in names:
        value = getattr(options, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not all(least <= number <= most for number in numbers):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be from {least:g} to {most:g}; got {value}")


class Findings:
    """The run folder of an experiment: its numbers, curves for TensorBoard, and a picture.

    Args:
        program: The command, which ends with the name of the experiment.
        options: The settings of the run.

    Raises:
        SystemExit: The folder cannot be created.
    """

    def __init__(self, program: str, options: Options) -> None:
        self._name = program.rpartition(".")[2]
        path = run_path(options.run_folder, self._name)
        try:
            self._folder = RunFolder(path, asdict(options))
        except OSError as error:
            refuse(program, f"--run-folder must be a place to write to: {error}")
        print(f"run folder: {self._folder.path}", flush=True)

    def add_rows(self, rows: Iterable[Row], total: int) -> list[Row]:
        """Write rows to metrics.csv, each as soon as it is there; return all of them.

        Shows a progress bar on a terminal.
        """
        found = []
        hidden = not (sys.stderr and sys.stderr.isatty())
        for row in tqdm(rows, total=total, unit=" rows", leave=False, disable=hidden):
            self._folder.add_metrics(row)
            found.append(row)
        return found

    def add_curves(self, rows: Iterable[Row], over: str, charts: Mapping[str, str]) -> None:
        """Log rows to TensorBoard: see `log_curves`."""
        log_curves(self._folder.path, rows, over, charts)

    def add_picture(self, draw: Callable[[Figure], None]) -> None:
        """Draw the picture of the experiment, and write it as a PNG."""
        with rc_context(STYLE):
            figure = Figure(figsize=SIZE, layout="constrained")
            draw(figure)
            figure.savefig(self._picture, dpi=DPI)

    def conclude(self, lines: Sequence[str]) -> int:
        """Print what was found, and where the picture and the curves are; return the exit code."""
        for line in lines:
            print(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False))
        print(f"picture:    {self._picture}")
        print(f"to see it:  tensorboard --logdir {shlex.quote(str(self._folder.path))}")
        return 0

    @property
    def _picture(self) -> Path:
        return self._folder.path / f"{self._name}.png"


def middle(values: Sequence[int]) -> int:
    """The middle one of some numbers; of an even number of them, the larger one."""
    return sorted(values)[len(values) // 2]
