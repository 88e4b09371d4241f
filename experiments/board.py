"""What a run logs to TensorBoard in addition to its Traces."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, with or without a screen

from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard.writer import SummaryWriter

from experiments import checkpoint
from manual_bp.board import CHARTS as TRACE_CHARTS
from manual_bp.board import HEAT_MAP, TraceBoard, add, figure_image, grey_image

TILE = 80  # pixels for a neuron in the picture of the first layer
_EVENTS = "events.out.tfevents."  # how TensorBoard recognises its files

_CHARTS = {
    "cost": (
        "1. learning/cost",
        "**C**, the mean cost over all training samples and over all test samples: "
        "C = (1/n) Σ_x C_x. If that of the test samples rises while the other falls, the network "
        "learns the training samples by heart.",
    ),
    "accuracy": (
        "1. learning/accuracy",
        "The share of samples for which the largest output is that of the right class.",
    ),
    "first_layer": (
        "4. pictures/weights of the first layer",
        "A tile for each neuron of the first layer: its weights, in the places of the pixels that "
        "they multiply. Grey is 0, white is positive, black is negative; all tiles have one scale.",
    ),
    "regions": (
        "4. pictures/what the network answers",
        "For two features: the answer of the network at every place, and the test samples.",
    ),
    "confusion": (
        "4. pictures/which classes are confused",
        "The confusion matrix of the test set: a row for each true class, a column for each "
        "answer.",
    ),
}

# All of them, in the order in which one reads them.
CHARTS = (
    *(_CHARTS[name] for name in ("cost", "accuracy")),
    *TRACE_CHARTS.values(),
    *(_CHARTS[name] for name in ("first_layer", "regions", "confusion")),
    HEAT_MAP,
)

# As it is in the tab TEXT.
_HOW_TO_READ = """\
Each line is a layer, such as `1 64→30 sigmoid`, or the samples of `train` or `test`: the list of
runs has their colours. The step is the number of updates so far.

**1. learning**: the cost C and the accuracy, on the training and on the test samples. Where the
two lines part, the network learns the training samples by heart.

**2. layers**: the terms of the four equations, for one batch.

- *log₁₀ ‖δ‖*: the size of the error δ^l = ∂C/∂z^l. By BP1, δ^L = ∇_a C ⊙ σ'(z^L); by BP2, δ^l =
  (w^(l+1))ᵀ δ^(l+1) ⊙ σ'(z^l). A layer far below the others hardly learns: its error has vanished
  on the way back.
- *log₁₀ ‖∂C∕∂w‖*: the size of the gradient. By BP4, ∂C/∂w^l = δ^l (a^(l−1))ᵀ, so a small error
  makes it small, and so do small activations in the layer below.
- *saturated share*: of neurons whose σ'(z) is near 0, so that BP1 and BP2 pass on almost nothing.
  Near 1 in a hidden layer, learning has stopped there and below.
- *log₁₀ update÷weights*: η ‖∂C/∂w‖ / ‖w‖. Around −3 a layer learns steadily; near 0 its weights
  leap.

**3. distributions**: all numbers in w, b, a and δ of a layer. By BP3, ∂C/∂b^l is the sum of δ^l
over the samples. Activations of a sigmoid that gather at 0 and 1 are saturated.

**4. pictures**: the weights of the first layer, the error of every layer over time, and which
classes are confused.
"""


class Board:
    """TensorBoard writers in the folder of the run; a context manager that flushes at the end.

    The step of everything logged is the number of updates so far. TensorBoard gives each folder
    with event files a colour: those of the layers and of the training and the test set are in that
    of the run.

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
        self._on_disk: dict[str, int] = {}  # what `sync` has made sure of
        if step:
            for each in event_files(folder):
                _sort_before_now(folder / each)
        # For a TensorBoard that shows the run already, and has read what was dropped since. The
        # first purge_step that it reads does not count as a restart, hence one at step 0, too.
        self._writer = SummaryWriter(str(folder), purge_step=step)
        self._main: Any = self._writer.file_writer
        self.traces = TraceBoard(self._writer, history, step)
        if not step:
            self._writer.add_text("how to read this run", _HOW_TO_READ, 0)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def sizes(self) -> dict[str, int]:
        """The bytes of the event files in each folder so far; all of them are then in the files.

        The folders are relative to that of the run.
        """
        self._writer.flush()
        return {name: _size(paths) for name, paths in event_files(self._folder).items()}

    def sync(self) -> None:
        """Wait until what `sizes` has counted is on the disk.

        Of each folder only the last file grows; those of earlier Boards are on the disk.
        """
        for name, paths in event_files(self._folder).items():
            size = _size(paths)
            if name not in self._on_disk:
                checkpoint.sync_names(self._folder / name)
            if size != self._on_disk.get(name):
                checkpoint.sync(paths[-1])
            self._on_disk[name] = size

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log cost and accuracy on training and test set: "train_cost" is train's cost."""
        for name, value in metrics.items():
            split, quantity = name.split("_")
            add(self.traces.run(split), _CHARTS[quantity], step, simple_value=value)

    def log_weight_image(self, w: Tensor, image_shape: tuple[int, int], step: int) -> None:
        """Log the weights of the neurons of the first layer as one image; grey is 0."""
        w = w.detach().float().cpu().nan_to_num(0, 0, 0)
        tiles = w.reshape(-1, *image_shape) / w.abs().max().clamp(min=1e-30)
        columns = math.ceil(math.sqrt(1.5 * len(tiles)))
        empty = -len(tiles) % columns
        scale = max(1, TILE // max(image_shape))
        tiles = tiles.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        tiles = F.pad(tiles, (2, 2, 2, 2, 0, empty), value=1)
        rows = tiles.reshape(-1, columns, *tiles.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
        add(self._main, _CHARTS["first_layer"], step, image=grey_image(rows.numpy()))

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
        """Log a figure as the chart of that name, and write it as a PNG."""
        image = figure_image(figure)
        (self._folder / f"{name}.png").write_bytes(image.encoded_image_string)
        add(self._main, _CHARTS[name], step, image=image)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the settings for the HPARAMS tab, where the last test metrics stand beside them."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.items()
        }
        metrics = [
            Metric(_CHARTS[name][0], display_name=f"test {name}") for name in ("accuracy", "cost")
        ]
        # TensorBoard finds metrics only in the folder that has the settings.
        add_summary: Any = self.traces.run("test").add_summary
        add_summary(hparams_config_pb([HParam(key) for key in plain], metrics))
        add_summary(hparams_pb(plain))


def keep_events(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Keep the first bytes of the event files in each folder; return whether there were enough.

    Killed at any moment and called again, it has the same result.
    """
    found = event_files(folder)
    kept = [_keep(found.get(name, []), sizes.get(name, 0)) for name in found.keys() | sizes]
    return all(kept)


def _keep(files: list[Path], size: int) -> bool:
    for path in files:
        found = path.stat().st_size
        kept = min(size, found)
        size -= kept
        if not kept:
            path.unlink()
        elif kept < found:
            os.truncate(path, kept)
            checkpoint.sync(path)  # `Board.sync` only looks after files that grow
    return size == 0


def _size(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def event_files(folder: Path) -> dict[str, list[Path]]:
    """The event files in each folder, in the order in which TensorBoard reads them."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob(f"{_EVENTS}*")):
        found.setdefault(str(path.parent.relative_to(folder)), []).append(path)
    return found


def _sort_before_now(folder: Path) -> None:
    """Rename event files, in the same order, if one that is made now would not be the last.

    Their names begin with the second in which they were made: the clock may have been set back.
    """
    files = sorted(folder.glob(f"{_EVENTS}*"))
    if files and files[-1].name >= f"{_EVENTS}{int(time.time()):010}":
        for number, path in enumerate(files):
            path.rename(folder / f"{_EVENTS}{0:010}.{number:06}")
