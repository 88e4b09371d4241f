from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.board import Board
from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop
from tests.helpers import logged_in


@pytest.fixture
def trace() -> Trace:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2), Sigmoid())
    return backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())


def test_traces_and_metrics_become_scalars(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.traces.log(trace, 7)
        board.log_metrics({"train_cost": 0.5, "test_accuracy": 0.75}, 7)
    logged = logged_in(tmp_path)
    tags = set(logged.Tags()["scalars"])
    assert {"delta/0", "delta/2", "sat/0", "grad/2", "cost/train", "accuracy/test"} <= tags
    assert logged.Scalars("accuracy/test")[0].value == 0.75


def test_everything_is_in_one_folder_and_one_file(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.traces.log(trace, 0)
        board.log_config({"hidden": (4,), "learning_rate": 3.0, "fast": True}, {"test_cost": 0.1})
    assert [path.is_file() for path in tmp_path.rglob("*")] == [True]
    tags = logged_in(tmp_path).Tags()
    assert "final/test_cost" in tags["scalars"]
    assert "custom_scalars__config__" in tags["tensors"]


def test_weights_and_confusion_become_images(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.log_weight_images(torch.randn(7, 6), (2, 3), 0)
        board.log_weight_images(torch.zeros(7, 6), (2, 3), 1)
        board.log_weight_images(torch.full((7, 6), torch.nan), (2, 3), 2)
        labels = torch.tensor([0, 1, 1])
        board.log_confusion(labels, labels.flip(0), ("no", "maybe", "yes"), 0)
    logged = logged_in(tmp_path)
    assert [image.step for image in logged.Images("first_layer")] == [0, 1, 2]
    assert len(logged.Images("confusion")) == 1


def test_the_confusion_is_also_written_as_a_picture(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        labels = torch.tensor([0, 1, 1])
        board.log_confusion(labels, labels, ("no", "yes"), 0)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
