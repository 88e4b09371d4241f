"""What a run logs to TensorBoard in addition to its Traces."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to files, with or without a screen

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from experiments import checkpoint
from manual_bp.board import TraceBoard

IMAGE_SCALE = 8

_EVENTS = "events.out.tfevents."  # how TensorBoard recognises its files

# Training and test in one chart.
LAYOUT = {
    "learning": {
        "cost": ["Multiline", ["cost/train", "cost/test"]],
        "accuracy": ["Multiline", ["accuracy/train", "accuracy/test"]],
    },
}


class Board:
    """A TensorBoard writer in the folder of the run; a context manager that flushes at the end.

    The step of everything logged is the number of updates so far.

    Args:
        folder: The folder of the run.
        step: From which step on to log. If it is not 0, the folder already has what an earlier
            Board logged before that step, and nothing else (see `keep_events`).
        history: The `traces.history` of the earlier Board at that step.

    Attributes:
        traces: Logs the Traces.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        history: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        self._folder = folder
        if step:
            _sort_before_now(folder)
        # For a TensorBoard that shows the run already, and has read what was dropped since. The
        # first purge_step that it reads does not count as a restart, hence one at step 0, too.
        self._writer = SummaryWriter(str(folder), purge_step=step)
        self.traces = TraceBoard(self._writer, LAYOUT, history)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def size(self) -> int:
        """The bytes of all event files so far; all of them are then in the files."""
        self._writer.flush()
        return sum(path.stat().st_size for path in _event_files(self._folder))

    def sync(self) -> None:
        """Wait until the event files are on the disk, as far as `size` has counted them."""
        for path in _event_files(self._folder):
            checkpoint.sync(path)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log cost and accuracy on training and test set: "train_cost" becomes cost/train."""
        for name, value in metrics.items():
            split, quantity = name.split("_")
            self._writer.add_scalar(f"{quantity}/{split}", value, step)

    def log_weight_images(self, w: Tensor, image_shape: tuple[int, int], step: int) -> None:
        """Log the weights of each neuron of the first layer as an image; grey is 0."""
        w = w.detach().float().nan_to_num(0, 0, 0)
        images = 0.5 + w.reshape(-1, 1, *image_shape) / (2 * w.abs().max()).clamp(min=1e-30)
        framed = F.pad(images, (1, 1, 1, 1), value=1)
        self._writer.add_images(
            "first_layer", F.interpolate(framed, scale_factor=IMAGE_SCALE), step
        )

    def log_confusion(
        self, labels: Tensor, predictions: Tensor, class_names: tuple[str, ...], step: int
    ) -> None:
        """Log the confusion matrix of the test set, and write it as confusion.png."""
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.add_subplot()
        ConfusionMatrixDisplay.from_predictions(
            labels.cpu().numpy(),
            predictions.cpu().numpy(),
            labels=range(len(class_names)),
            display_labels=class_names,
            xticks_rotation=45 if max(map(len, class_names)) > 2 else 0,
            colorbar=False,
            cmap="Blues",
            ax=axes,
        )
        axes.set(title="Which classes are confused, on the test set?")
        self.log_figure("confusion", figure, step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure, and write it as a PNG of that name."""
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()  # once for both
        pixels = np.asarray(canvas.buffer_rgba())
        imsave(self._folder / f"{name}.png", pixels)
        self._writer.add_image(name, pixels[..., :3], step, dataformats="HWC")

    def log_config(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log the settings and the final metrics, for the HPARAMS tab."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.items()
        }
        final = {f"final/{name}": value for name, value in metrics.items()}
        # SummaryWriter.add_hparams would create a second run inside this one.
        file_writer: Any = self._writer.file_writer
        for summary in hparams(plain, final):  # type: ignore[no-untyped-call]
            file_writer.add_summary(summary)
        for name, value in final.items():
            self._writer.add_scalar(name, value)


def keep_events(folder: Path, size: int) -> bool:
    """Keep the first bytes of the event files of a run, in order; return whether there were enough.

    Killed at any moment and called again, it has the same result.
    """
    for path in _event_files(folder):
        kept = min(size, path.stat().st_size)
        size -= kept
        if kept:
            os.truncate(path, kept)
        else:
            path.unlink()
    return size == 0


def _event_files(folder: Path) -> list[Path]:
    """The event files in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{_EVENTS}*"))


def _sort_before_now(folder: Path) -> None:
    """Rename event files, in the same order, if one that is made now would not be the last.

    Their names begin with the second in which they were made: the clock may have been set back.
    """
    files = _event_files(folder)
    if files and files[-1].name >= f"{_EVENTS}{int(time.time()):010}":
        for number, path in enumerate(files):
            path.rename(folder / f"{_EVENTS}{0:010}.{number:06}")
