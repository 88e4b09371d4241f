"""Traces in TensorBoard: the terms of the four equations, for every layer and step.

TensorBoard gives each run, which is a folder, a colour. So each layer has a folder of its own, in
that of the writer, and every chart shows all layers, each in its colour.

This module needs TensorBoard, and matplotlib for the heat map (the extra `board`); the rest of the
package needs neither.
"""

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manual_bp.trace import LayerDiagnostics, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

# What each chart is called, and what TensorBoard says about it (Markdown). A name has ∕ and not /,
# which would end the name of a group.
CHARTS = {
    "delta": (
        "2. layers/log₁₀ ‖δ‖",
        "**‖δ^l‖**, where δ^l = ∂C/∂z^l is the error of the layer, for the whole batch "
        "(BP1: δ^L = ∇_a C ⊙ σ'(z^L); BP2: δ^l = (w^(l+1))ᵀ δ^(l+1) ⊙ σ'(z^l)). −3 means 0.001. "
        "If it falls by a step from each layer to the one below, the error vanishes on its way "
        "back, and the lower layers learn slowly.",
    ),
    "grad": (
        "2. layers/log₁₀ ‖∂C∕∂w‖",
        "**‖∂C/∂w^l‖**, by BP4: ∂C/∂w^l = δ^l (a^(l−1))ᵀ. −3 means 0.001. It is small where the "
        "error δ^l is, or where the activations a^(l−1) that feed the weights are.",
    ),
    "saturated": (
        "2. layers/saturated share",
        "The share of neurons, over all samples of the batch, with **σ'(z) below 5 % of its "
        "largest value** (and above 0). BP1 and BP2 multiply by σ'(z), so they pass on almost no "
        "error: a share near 1 in a hidden layer means that it and those below learn slowly. In "
        "the last layer a large share is good where the outputs are right.",
    ),
    "update": (
        "2. layers/log₁₀ update÷weights",
        "**η ‖∂C/∂w^l‖ / ‖w^l‖**: by how much a step of gradient descent changes the weights. "
        "−3 means by 0.1 %. Far below that a layer hardly learns; near 0, the weights leap.",
    ),
    "weights": ("3. distributions/weights w", "The weights w^l of the layer."),
    "biases": ("3. distributions/biases b", "The biases b^l of the layer."),
    "activations": (
        "3. distributions/activations a",
        "The activations a^l = σ(z^l) of the layer, over all samples of the batch. A sigmoid is "
        "saturated where they are near 0 or 1.",
    ),
    "errors": (
        "3. distributions/errors δ",
        "The errors δ^l = ∂C/∂z^l of the layer, one for each neuron and sample of the batch.",
    ),
}
_LOGARITHMIC = ("delta", "grad", "update")
HEAT_MAP = (
    "4. pictures/log₁₀ ‖δ‖ of every layer",
    "The size of the error of every layer at every step: the first layer is at the bottom. A "
    "picture that is dark at the bottom shows an error that vanishes on its way back (BP2).",
)

# The charts that each writer has described.
_DESCRIBED: "WeakKeyDictionary[FileWriter, set[str]]" = WeakKeyDictionary()

# The last bin of a TensorBoard histogram ends at 1e20, so larger numbers are treated as infinite.
HISTOGRAM_LIMIT = 1e20

# The most letters of a layer's label that are shown.
LABEL_LENGTH = 60


class TraceBoard:
    """Logs Traces with one SummaryWriter.

    Args:
        writer: Yours; it is neither opened nor closed here. Each layer gets a folder in that of the
            writer, which flushes and closes the files there with its own.
        history: The `history` of a TraceBoard that logged earlier steps to the same folder, to go
            on with.
        purge_step: From which step on earlier logs in the folder do not count, as for
            `SummaryWriter`.

    Attributes:
        history: ‖δ‖ of every layer by its label, for each step that `log` was called with. It
            consists of plain numbers and strings, so it can be part of a checkpoint.
        seconds: The time that logging has taken so far.

    Raises:
        TypeError: writer is not a SummaryWriter.

    Examples:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> with record(model) as trace:
        ...     model(torch.rand(5, 3)).square().mean().backward()
        >>> with SummaryWriter("runs/mine") as writer:
        ...     TraceBoard(writer).log(trace, step=0, learning_rate=0.1)
    """

    def __init__(
        self,
        writer: "SummaryWriter",
        history: Mapping[int, Mapping[str, float]] | None = None,
        purge_step: int | None = None,
    ) -> None:
        if not hasattr(writer, "add_custom_scalars"):
            raise TypeError(f"writer must be a SummaryWriter; got {type(writer).__name__}")
        self._writer: Any = writer
        self._purge_step = purge_step
        self.history = {step: dict(norms) for step, norms in (history or {}).items()}
        self.seconds = 0.0

    def run(self, name: str) -> "FileWriter":
        """What writes to the folder of that name in that of `writer`; made when first asked for.

        Characters that a file name may not have everywhere are replaced by their codes.

        Raises:
            ValueError: The writer was closed.
        """
        from torch.utils.tensorboard.writer import FileWriter

        if self._writer.all_writers is None:
            raise ValueError("writer must be open; it was closed")
        folder = str(Path(self._writer.log_dir, _as_file_name(name.replace(": ", " ", 1))))
        if folder not in self._writer.all_writers:
            writer = FileWriter(folder)
            if self._purge_step is not None:
                _purge(writer, self._purge_step)
            self._writer.all_writers[folder] = writer
        found: FileWriter = self._writer.all_writers[folder]
        return found

    def log(self, trace: Trace, step: int, learning_rate: float | None = None) -> None:
        """Log the numbers of one pass for every layer. Call it before the weights are updated.

        These are log₁₀ ‖δ‖, the share of saturated neurons, log₁₀ ‖∂C/∂w‖ and, if learning_rate
        is given, the logarithm of the size of an update relative to the weights: see
        `LayerDiagnostics`. Numbers that are not known for a layer, and logarithms of 0, are left
        out.

        Raises:
            TypeError: trace is not a Trace.
            RuntimeError: The weights have been updated since the pass.
        """
        _require_trace(trace)
        with self._timed():
            labels, found = trace.labels, trace.diagnostics(learning_rate).layers
            for layer in found:
                self._log_layer(self.run(labels[layer.name]), layer, step)
            self.history[step] = {labels[layer.name]: layer.delta_norm for layer in found}

    def _log_layer(self, writer: "FileWriter", layer: LayerDiagnostics, step: int) -> None:
        numbers = {
            "delta": layer.delta_norm,
            "grad": layer.grad_norm,
            "saturated": layer.saturated,
            "update": layer.update,
        }
        for kind, number in numbers.items():
            value = _log(number) if kind in _LOGARITHMIC else number
            if value is not None and math.isfinite(value):
                add(writer, CHARTS[kind], step, simple_value=value)

    def log_histograms(self, trace: Trace, step: int) -> None:
        """Log histograms of the weights, biases, activations and errors of every layer.

        Numbers that are not finite are left out, and their count is logged under nonfinite/.
        Raises the same errors as `log`.
        """
        _require_trace(trace)
        for layer in trace.layers:
            layer.require_unchanged()
        with self._timed():
            for layer in trace.layers:
                writer, bins = self.run(trace.labels[layer.name]), self._writer.default_bins
                _add_histogram(writer, "weights", [layer.w], bins, step)
                if layer.b is not None:
                    _add_histogram(writer, "biases", [layer.b], bins, step)
                _add_histogram(writer, "activations", [c.a for c in layer.calls], bins, step)
                _add_histogram(writer, "errors", [c.delta for c in layer.calls], bins, step)

    def log_heat_map(self, step: int) -> None:
        """Log all ‖δ‖ so far as one picture: layers upwards, steps to the right.

        Raises:
            RuntimeError: `log` has not been called.
        """
        if not self.history:
            raise RuntimeError("log must have been called before log_heat_map; it was not")
        with self._timed():
            add(self._writer.file_writer, HEAT_MAP, step, image=figure_image(self._heat_map()))

    def _heat_map(self) -> "Figure":
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(name for norms in self.history.values() for name in norms))
        steps = sorted(self.history)
        logs = [[_log(self.history[s].get(name)) for s in steps] for name in names]
        labels = [_shown(name) for name in names]
        size = (7 + 0.1 * max(map(len, labels)), 3 + 0.4 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="layer", title="log₁₀ ‖δ‖")
        axes.set_facecolor("lightgrey")  # shows where ‖δ‖ is missing, 0 or not finite
        figure.colorbar(axes.pcolormesh(steps, range(len(names)), logs, shading="nearest"))
        axes.set_yticks(range(len(names)), labels, parse_math=False, usetex=False)
        return figure

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def add(writer: "FileWriter", chart: tuple[str, str], step: int, **value: Any) -> None:
    """Log a value as a part of a chart, which has a name and a description.

    The methods of SummaryWriter take no description, and replace letters such as δ in the name.
    TensorBoard reads the description of the first value; with later ones, it would only make the
    file several times as long.

    writer: That of a SummaryWriter (`file_writer`), or of `TraceBoard.run`.
    value: A simple_value, histo or image of TensorBoard's `Summary.Value`.
    """
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.histogram import metadata as histogram
    from tensorboard.plugins.image import metadata as image
    from tensorboard.plugins.scalar import metadata as scalar

    tag, description = chart
    (kind,) = value
    summary = summary_pb2.Summary.Value(tag=tag, **value)
    described = _DESCRIBED.setdefault(writer, set())
    if tag not in described:
        described.add(tag)
        plugin, data_class = {
            "simple_value": (scalar, summary_pb2.DATA_CLASS_SCALAR),
            "histo": (histogram, summary_pb2.DATA_CLASS_TENSOR),
            "image": (image, summary_pb2.DATA_CLASS_BLOB_SEQUENCE),
        }[kind]
        summary.metadata.CopyFrom(plugin.create_summary_metadata(tag, description))
        # Without it, TensorBoard's fast loader drops the description.
        summary.metadata.data_class = data_class
    add_summary: Any = writer.add_summary
    add_summary(summary_pb2.Summary(value=[summary]), step)


def figure_image(figure: "Figure") -> Any:
    """A matplotlib figure as an image for `add`."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=100)
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return _as_image(png, width, height)


def grey_image(array: Any) -> Any:
    """An array (height, width) of numbers from -1, black, to 1, white, as an image for `add`."""
    from matplotlib.image import imsave

    png = BytesIO()
    imsave(png, array, format="png", cmap="gray", vmin=-1, vmax=1)
    height, width = array.shape
    return _as_image(png, width, height)


def _as_image(png: BytesIO, width: int, height: int) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Image(
        encoded_image_string=png.getvalue(), width=width, height=height, colorspace=4
    )


def _add_histogram(
    writer: "FileWriter", kind: str, tensors: list[Tensor], bins: Any, step: int
) -> None:
    from torch.utils.tensorboard.summary import make_histogram

    values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    shown = values[values.abs() < HISTOGRAM_LIMIT]
    left_out = values.numel() - shown.numel()
    if left_out:
        chart = f"nonfinite/{kind}", f"How many of the {kind} are nan, infinite or above 1e20."
        add(writer, chart, step, simple_value=left_out)
    if shown.numel():
        make: Any = make_histogram
        histogram = make(shown.cpu().numpy().astype(float), bins)
        add(writer, CHARTS[kind], step, histo=histogram)


def _purge(writer: "FileWriter", step: int) -> None:
    """Drop what was logged from a step on, as `SummaryWriter(purge_step=step)` does."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    log = SessionLog(status=SessionLog.START)
    add_event: Any = writer.add_event
    for event in (Event(file_version="brain.Event:2"), Event(session_log=log)):
        add_event(event, step)


def _require_trace(value: object) -> None:
    if not isinstance(value, Trace):
        raise TypeError(f"trace must be a Trace; got {type(value).__name__}")


def _as_file_name(name: str) -> str:
    """A name that a folder may have everywhere, and that no other name becomes."""
    escaped = re.sub(
        r"[^-\w. →]|^[. ]|[. ]$|-(?=x[0-9a-f]+-)", lambda found: f"-x{ord(found[0]):x}-", name
    )
    if len(escaped) <= LABEL_LENGTH:
        return escaped
    code = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{escaped[: LABEL_LENGTH - 9]}-{code}"


def _shown(label: str) -> str:
    """The label, with characters that the font lacks escaped, shortened to LABEL_LENGTH."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    shown = "".join(
        c if c.isprintable() and font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in label
    )
    half = (LABEL_LENGTH - 1) // 2
    return shown if len(label) <= LABEL_LENGTH else f"{shown[:half]}…{shown[-half:]}"


def _log(norm: float | None) -> float:
    return math.log10(norm) if norm and math.isfinite(norm) else math.nan
