"""Short runs, what stops them, and what they leave in their folders."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpoint
from experiments.training import Training
from tests.helpers import logged_below

# 15 updates in an epoch, so 45 in all. Few classes are drawn faster.
QUICK = ["--dataset", "iris", "--hidden", "8", "--epochs", "3", "--batch-size", "8"]
QUICK += ["--log-every", "4"]
TOTAL = 45
# The same number of updates, and pictures of the weights.
IMAGES = [*QUICK, "--dataset", "digits", "--batch-size", "100"]


class PowerCutError(Exception):
    """What ends a run without a last checkpoint."""


def let_happen(patch: pytest.MonkeyPatch, number: int, event: Callable[[], None]) -> None:
    """Let something happen before the update of a number, counted from 1, once."""
    update = Training._update

    def patched(training: Training, *arguments: Any) -> Any:
        if training.updates + 1 == number:
            patch.setattr(Training, "_update", update)
            event()
        return update(training, *arguments)

    patch.setattr(Training, "_update", patched)


def cut() -> None:
    raise PowerCutError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only(folder: Path) -> Path:
    """The one folder in a folder."""
    (found,) = folder.iterdir()
    return found


def left_by(run: Path) -> dict[str, Any]:
    """The weights in both checkpoints, metrics.csv, and everything that TensorBoard shows."""
    left: dict[str, Any] = {"metrics": (run / "metrics.csv").read_bytes()}
    for name in ("last", "best"):
        training = checkpoint.read(run / f"{name}.pt")["training"]
        left[name] = (
            training["updates"],
            training["order"].tolist(),
            {key: w.numpy().tobytes() for key, w in training["net"].items()},
        )
    return left | curves_in(run)


def files_in(run: Path) -> dict[Path, bytes]:
    """The bytes of every file in the folder of a run."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def curves_in(run: Path) -> dict[str, Any]:
    """All points, histograms and pictures, by their folders and tags, with their steps."""
    curves: dict[str, Any] = {}
    for folder, logged in logged_below(run).items():
        tags = logged.Tags()
        for tag in tags["scalars"]:
            curves[f"{folder}: {tag}"] = [(p.step, p.value) for p in logged.Scalars(tag)]
        for tag in tags["histograms"]:
            found = [(p.step, p.histogram_value) for p in logged.Histograms(tag)]
            curves[f"{folder}: {tag}"] = found
        for tag in tags["images"]:
            found = [(p.step, p.encoded_image_string) for p in logged.Images(tag)]
            curves[f"{folder}: {tag}"] = found
        for tag in tags["tensors"]:
            tensors = [(p.step, p.tensor_proto.SerializeToString()) for p in logged.Tensors(tag)]
            curves[f"{folder}: {tag}"] = tensors
    return curves
