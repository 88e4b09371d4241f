"""What a run left in its folder, for comparison with another run."""

from pathlib import Path
from typing import Any

from experiments import checkpoint
from tests.helpers import logged_in

QUICK = ["--hidden", "8", "--epochs", "3", "--batch-size", "100", "--log-every", "4"]
# 15 updates in an epoch, so 45 in all.
TOTAL = 45


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


def curves_in(run: Path) -> dict[str, Any]:
    """All points, histograms and pictures, by their tags, with their steps."""
    logged = logged_in(run)
    tags = logged.Tags()
    curves: dict[str, Any] = {}
    for tag in tags["scalars"]:
        curves[f"scalar {tag}"] = [(p.step, p.value) for p in logged.Scalars(tag)]
    for tag in tags["histograms"]:
        curves[f"histogram {tag}"] = [(p.step, p.histogram_value) for p in logged.Histograms(tag)]
    for tag in tags["images"]:
        curves[f"image {tag}"] = [(p.step, p.encoded_image_string) for p in logged.Images(tag)]
    for tag in tags["tensors"]:
        tensors = [(p.step, p.tensor_proto.SerializeToString()) for p in logged.Tensors(tag)]
        curves[f"tensor {tag}"] = tensors
    return curves
