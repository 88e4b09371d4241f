"""What a run reports: its metrics, the verdict on each layer, and what went wrong."""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from experiments.training import Training
from manual_bp import Diagnostics, Trace


def line(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    return (
        f"cost {metrics['train_cost']:.4f} train, {metrics['test_cost']:.4f} test;  "
        f"accuracy {metrics['train_accuracy']:.2%} train, {metrics['test_accuracy']:.2%} test"
    )


def verdicts(trace: Trace, learning_rate: float) -> list[str]:
    """The verdicts on the layers, one line for all layers with the same verdict."""
    names: dict[str, list[str]] = {}
    for layer in trace.diagnostics(learning_rate):
        names.setdefault(layer.verdict, []).append(_spelled_out(trace.labels[layer.name]))
    return [f"{', '.join(those)}: {verdict}" for verdict, those in names.items()]


def table(trace: Trace, learning_rate: float) -> Diagnostics:
    """The diagnostics, with the layers numbered as in the verdicts."""
    found, labels = trace.diagnostics(learning_rate), trace.labels
    return replace(found, layers=tuple(replace(each, name=labels[each.name]) for each in found))


def _spelled_out(label: str) -> str:
    """A label of `Trace.labels` within a sentence: "layer 1 (64→30 sigmoid)"."""
    place, _, shape = label.partition(": ")
    return f"layer {place} ({shape})"


def is_good(cost: float) -> bool:
    """Whether a cost is a number that one can train on."""
    return math.isfinite(cost)


def origin(training: Training, state: Mapping[str, Any], until: int) -> str:
    """Find the update in which numbers stopped being finite, by repeating updates; say where.

    Args:
        training: Repeats them.
        state: A `state_dict` of the training from before that.
        until: After how many updates a cost was not finite.
    """
    training.load_state_dict(state)
    if not training.is_finite():
        return f"it began before update {training.updates + 1}, in an earlier session"
    while training.updates < until:
        for x, y in training.epoch():
            where = _where(training.trace(x, y), training.updates)
            if where or training.updates == until:
                break
            training.update(x, y)
        if where:
            return where
    trace = training.trace(training.data.x_train, training.y_train)
    return _where(trace, until) or "it did not happen again when the updates were repeated"


def _where(trace: Trace, updates: int) -> str:
    """The first of the numbers of a pass that are not finite, as the pass computes them; or ""."""
    names = {name: _spelled_out(label) for name, label in trace.labels.items()}
    broken = [names[each.name] for each in trace.layers if not _are_finite(each.w, each.b)]
    if broken:
        layers = ", ".join(broken)
        return f"it began with update {updates}, which made weights of {layers} infinite or nan"
    forward = [(layer, kind) for layer in trace.layers for kind in ("z", "a")]
    backward = [(layer, "delta") for layer in reversed(trace.layers)]
    for layer, kind in forward + backward:
        if not _are_finite(getattr(layer, kind)):
            symbol = "δ" if kind == "delta" else kind
            return (
                f"it began in update {updates + 1}: {symbol} of {names[layer.name]} is not finite"
            )
    if not _are_finite(trace.cost):
        last = trace.layers[-1]
        largest = last.a.abs().max().item()
        return (
            f"it began in update {updates + 1}: the cost overflowed, because outputs of "
            f"{names[last.name]} are as large as {largest:.1e}"
        )
    return ""


def _are_finite(*tensors: Tensor | None) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)


def warn(
    training: Training,
    metrics: dict[str, float],
    cost: float,
    began: str = "",
    is_stopped: bool = True,
) -> int:
    """Say on stderr if something went wrong; return the exit code, 1 if a cost is not finite.

    Args:
        training: As it is now.
        metrics: The last metrics.
        cost: The cost of the last batch.
        began: Where a cost that is not finite comes from, if that is known.
        is_stopped: Whether training was stopped because of such a cost.
    """
    for value in (cost, metrics["train_cost"]):
        if not is_good(value):
            verb, where = "stopped" if is_stopped else "warning", f"{began}; " if began else ""
            reason = f"{verb}: the cost is {value}; {where}a smaller learning rate may help"
            print(reason, file=sys.stderr)
            return 1
    labels = training.data.label_train
    most = labels.bincount().max().item() / len(labels)
    # A net that learns nothing rarely exceeds this by chance: two standard errors above it.
    chance = most + 2 * math.sqrt(most * (1 - most) / len(labels))
    if metrics["train_accuracy"] <= chance:
        print(
            f"warning: nothing was learned: {metrics['train_accuracy']:.2%} of the training "
            f"samples are right, and always guessing the most frequent class gets {most:.2%}; try "
            "another learning rate, or more epochs",
            file=sys.stderr,
        )
    return 0
