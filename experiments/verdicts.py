"""What a run reports: its metrics, the verdict on each layer, and what went wrong."""

import math
import sys

from experiments.training import Training
from manual_bp import Diagnostics


def line(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    return (
        f"cost {metrics['train_cost']:.4f} train, {metrics['test_cost']:.4f} test;  "
        f"accuracy {metrics['train_accuracy']:.2%} train, {metrics['test_accuracy']:.2%} test"
    )


def print_verdicts(diagnostics: Diagnostics) -> None:
    """Print the verdicts without the numbers, one line for all layers with the same verdict."""
    names: dict[str, list[str]] = {}
    for layer in diagnostics:
        names.setdefault(layer.verdict, []).append(layer.name)
    for verdict, those in names.items():
        print(f"verdict on layer{'s' if len(those) > 1 else ''} {', '.join(those)}: {verdict}")


def warn(training: Training, metrics: dict[str, float], cost: float) -> int:
    """Say on stderr if something went wrong; return the exit code, 1 if a cost is not finite."""
    for value in (cost, metrics["train_cost"]):
        if not math.isfinite(value):
            reason = f"stopped: the cost is {value}; a smaller learning rate may help"
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
