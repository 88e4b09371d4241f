"""Traces in TensorBoard: the terms of the four equations, for every layer and step.

    writer = SummaryWriter("runs/mine")
    board = TraceBoard(writer)
    ...
    with manual_bp.record(model) as trace:
        cost(model(x), y).backward()
    board.log(trace, step, learning_rate=0.1)
    optimizer.step()

The writer is yours, and no other is created. This module needs TensorBoard, and matplotlib for the
heat map (the extra `board`); the rest of the package needs neither.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manual_bp.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import SummaryWriter

# One chart for each question, with all layers in it.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "the terms of the four equations": {
        "‖δ‖ of every layer (BP1, BP2)": ["Multiline", ["delta/.*"]],
        "fraction of saturated neurons (σ' ≈ 0)": ["Multiline", ["sat/.*"]],
        "‖∂C/∂w‖ of every layer (BP4)": ["Multiline", ["grad/.*"]],
        "update relative to weights": ["Multiline", ["update/.*"]],
    },
}

# The last bin of a TensorBoard histogram ends at 1e20, so larger numbers are treated as infinite.
HISTOGRAM_LIMIT = 1e20

# The most letters of a layer's name that are shown next to the heat map.
LABEL_LENGTH = 60


class TraceBoard:
    """Logs Traces with one SummaryWriter.

    Args:
        writer: Yours; it is neither opened nor closed here.
        layout: Further charts for the tab of custom scalars, in the form that
            `SummaryWriter.add_custom_scalars` takes, since a writer has only one layout.
        history: The `history` of a TraceBoard that logged earlier steps to the same folder, to go
            on with. The layout, which is in the folder already, is then not written again.

    Attributes:
        history: ‖δ‖ of every layer by its name, for each step that `log` was called with. It
            consists of plain numbers and strings, so it can be part of a checkpoint.
        seconds: The time that logging has taken so far.

    Raises:
        TypeError: writer is not a SummaryWriter.
    """

    def __init__(
        self,
        writer: "SummaryWriter",
        layout: Mapping[str, Mapping[str, list[Any]]] | None = None,
        history: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        if not hasattr(writer, "add_custom_scalars"):
            raise TypeError(f"writer must be a SummaryWriter; got {type(writer).__name__}")
        self._writer: Any = writer
        self.history = {step: dict(norms) for step, norms in (history or {}).items()}
        self.seconds = 0.0
        if history is None:
            self._writer.add_custom_scalars({**(layout or {}), **LAYOUT})

    def log(self, trace: Trace, step: int, learning_rate: float | None = None) -> None:
        """Log the numbers of one pass for every layer. Call it before the weights are updated.

        delta/ is ‖δ‖, sat/ the fraction of saturated neurons, grad/ ‖∂C/∂w‖, and update/, if
        learning_rate is given, the size of an update relative to the weights: see
        `LayerDiagnostics`. Numbers that are not known for a layer are left out.

        Raises:
            TypeError: trace is not a Trace.
            RuntimeError: The weights have been updated since the pass.
        """
        _require_trace(trace)
        with self._timed():
            found = trace.diagnostics(learning_rate)
            for layer in found.layers:
                numbers = {
                    "delta": layer.delta_norm,
                    "sat": layer.saturated,
                    "grad": layer.grad_norm,
                    "update": layer.update,
                }
                for kind, value in numbers.items():
                    if value is not None:
                        self._writer.add_scalar(_tag(kind, layer.name), value, step)
            self.history[step] = {layer.name: layer.delta_norm for layer in found.layers}

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
                self._histogram(_tag("weights", layer.name), [layer.w], step)
                if layer.b is not None:
                    self._histogram(_tag("biases", layer.name), [layer.b], step)
                self._histogram(_tag("activations", layer.name), [c.a for c in layer.calls], step)
                self._histogram(_tag("errors", layer.name), [c.delta for c in layer.calls], step)

    def log_heat_map(self, step: int) -> None:
        """Log all ‖δ‖ so far as one picture: layers upwards, steps to the right.

        Raises:
            RuntimeError: `log` has not been called.
        """
        if not self.history:
            raise RuntimeError("log must have been called before log_heat_map; it was not")
        with self._timed():
            self._writer.add_figure("error_of_every_layer", self._heat_map(), step)

    def _heat_map(self) -> "Figure":
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(name for norms in self.history.values() for name in norms))
        steps = sorted(self.history)
        logs = [[_log(self.history[s].get(name)) for s in steps] for name in names]
        labels = [_label(name) for name in names]
        size = (8 + 0.1 * max(map(len, labels)), 1.5 + 0.3 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="layer", title="log₁₀ ‖δ‖")
        axes.set_facecolor("lightgrey")  # shows where ‖δ‖ is missing, 0 or not finite
        figure.colorbar(axes.pcolormesh(steps, range(len(names)), logs, shading="nearest"))
        axes.set_yticks(range(len(names)), labels, parse_math=False, usetex=False)
        return figure

    def _histogram(self, tag: str, tensors: list[Tensor], step: int) -> None:
        values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        shown = values[values.abs() < HISTOGRAM_LIMIT]
        left_out = values.numel() - shown.numel()
        if left_out:
            self._writer.add_scalar(f"nonfinite/{tag}", left_out, step)
        if shown.numel():
            self._writer.add_histogram(tag, shown, step)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def _require_trace(value: object) -> None:
    if not isinstance(value, Trace):
        raise TypeError(f"trace must be a Trace; got {type(value).__name__}")


def _tag(kind: str, name: str) -> str:
    """A tag that no other layer has, whatever the layers are called.

    TensorBoard replaces each character that is neither a letter, a digit nor one of - / . by _, so
    "a$" and "a_" would have the same tag. Here the character's code does: "a$" becomes "a-x24-".
    """
    return f"{kind}/" + re.sub(
        r"[^-/\w.]|-(?=x[0-9a-f]+-)", lambda found: f"-x{ord(found[0]):x}-", name
    )


def _label(name: str) -> str:
    """The name, with characters that the font lacks escaped, shortened to LABEL_LENGTH."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    label = "".join(
        c if c.isprintable() and font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in name
    )
    half = (LABEL_LENGTH - 1) // 2
    return label if len(label) <= LABEL_LENGTH else f"{label[:half]}…{label[-half:]}"


def _log(norm: float | None) -> float:
    return math.log10(norm) if norm and math.isfinite(norm) else math.nan
