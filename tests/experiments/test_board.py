from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from experiments.board import Board
from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop


def read(folder: Path) -> Any:
    everything = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


@pytest.fixture
def trace() -> Trace:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2), Sigmoid())
    return backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())


def test_scalars_are_the_norms_of_the_trace(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.log_trace(trace, 7)
        board.log_metrics({"train_cost": 0.5, "test_accuracy": 0.75}, 7)
    logged = read(tmp_path)
    assert set(logged.Tags()["scalars"]) == {
        "delta/0",
        "delta/2",
        "grad_w/0",
        "grad_w/2",
        "cost/train",
        "accuracy/test",
    }
    for layer in trace.layers:
        (point,) = logged.Scalars(f"delta/{layer.name}")
        assert point.step == 7
        assert point.value == pytest.approx(layer.delta.square().sum().sqrt().item(), rel=1e-6)
        (point,) = logged.Scalars(f"grad_w/{layer.name}")
        assert layer.grad_w is not None
        assert point.value == pytest.approx(layer.grad_w.square().sum().sqrt().item(), rel=1e-6)
    assert logged.Scalars("accuracy/test")[0].value == 0.75


def test_everything_is_in_one_folder_and_one_file(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.log_trace(trace, 0)
        board.log_config({"hidden": (4,), "learning_rate": 3.0, "fast": True}, {"test_cost": 0.1})
    assert [path.is_file() for path in tmp_path.rglob("*")] == [True]
    tags = read(tmp_path).Tags()
    assert "final/test_cost" in tags["scalars"]
    assert "custom_scalars__config__" in tags["tensors"]


def test_histograms_leave_out_what_is_not_finite_and_count_it(tmp_path: Path, trace: Trace) -> None:
    with torch.no_grad():
        trace["0"].w[0, :2] = torch.nan
        trace["2"].w[:] = torch.inf
    with Board(tmp_path) as board:
        board.log_histograms(trace, 1)
    logged = read(tmp_path)
    names = {"weights/0", "biases/0", "activations/0", "biases/2", "activations/2"}
    assert set(logged.Tags()["histograms"]) == names
    assert logged.Histograms("weights/0")[0].histogram_value.num == 4 * 6 - 2
    assert logged.Histograms("activations/0")[0].histogram_value.num == 5 * 4
    assert logged.Scalars("nonfinite/weights/0")[0].value == 2
    assert logged.Scalars("nonfinite/weights/2")[0].value == 2 * 4


def test_images(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.log_weight_images(torch.randn(7, 6), (2, 3), 0)
        board.log_weight_images(torch.zeros(7, 6), (2, 3), 1)
        board.log_weight_images(torch.full((7, 6), torch.nan), (2, 3), 2)
        labels = torch.tensor([0, 1, 1])
        board.log_confusion(labels, labels.flip(0), ("no", "maybe", "yes"), 0)
    logged = read(tmp_path)
    assert [image.step for image in logged.Images("first_layer")] == [0, 1, 2]
    assert len(logged.Images("confusion")) == 1
