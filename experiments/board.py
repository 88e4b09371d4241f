"""What a run shows in TensorBoard besides its Traces, and how TensorBoard wants it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures are drawn to files, with or without a screen

from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from manual_bp.board import TraceBoard

IMAGE_SCALE = 8

# Both splits in one chart.
LAYOUT = {
    "learning": {
        "cost": ["Multiline", ["cost/train", "cost/test"]],
        "accuracy": ["Multiline", ["accuracy/train", "accuracy/test"]],
    },
}


class Board:
    """One TensorBoard writer, in the run's own folder. A context manager: closing writes it out.

    The step of everything logged is the number of updates made so far.

    Attributes:
        traces: What logs the Traces.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))
        self.traces = TraceBoard(self._writer, LAYOUT)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Cost and accuracy, on train and test: "train_cost" is shown as cost/train."""
        for name, value in metrics.items():
            split, quantity = name.split("_")
            self._writer.add_scalar(f"{quantity}/{split}", value, step)

    def log_weight_images(self, w: Tensor, image_shape: tuple[int, int], step: int) -> None:
        """What each neuron of the first layer looks for: its weights as an image, grey for 0."""
        w = w.detach().float().nan_to_num(0, 0, 0)
        images = 0.5 + w.reshape(-1, 1, *image_shape) / (2 * w.abs().max()).clamp(min=1e-30)
        framed = F.pad(images, (1, 1, 1, 1), value=1)
        self._writer.add_images(
            "first_layer", F.interpolate(framed, scale_factor=IMAGE_SCALE), step
        )

    def log_confusion(
        self, labels: Tensor, predictions: Tensor, class_names: tuple[str, ...], step: int
    ) -> None:
        """How often each class of the test set was taken for which."""
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
        self._writer.add_figure("confusion", figure, step)

    def log_config(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The settings with what came of them, for the HPARAMS tab."""
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.items()
        }
        final = {f"final/{name}": value for name, value in metrics.items()}
        # Not SummaryWriter.add_hparams, which opens a second run below this one.
        file_writer: Any = self._writer.file_writer
        for summary in hparams(plain, final):  # type: ignore[no-untyped-call]
            file_writer.add_summary(summary)
        for name, value in final.items():
            self._writer.add_scalar(name, value)
