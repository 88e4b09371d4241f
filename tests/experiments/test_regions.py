"""The picture of what a network answers all over the plane."""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor, nn

from experiments.data import load
from experiments.regions import draw_regions
from experiments.train import main
from tests.experiments.runs import only
from tests.helpers import logged_in


class LeftOrRight(nn.Module):
    """The second class is where the first feature is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1)


def test_regions_are_where_the_network_says() -> None:
    data = load("moons")
    figure = draw_regions(LeftOrRight(), data)
    (axes,) = figure.axes
    (picture,) = axes.images
    shown = np.asarray(picture.get_array())
    assert picture.origin == "lower"
    rows, columns = shown.shape
    along = np.linspace(-0.1, 1.1, columns)
    assert np.array_equal(shown, np.tile(along > 0.5, (rows, 1)))
    texts = axes.get_legend_handles_labels()[1]
    assert texts == ["upper, training", "upper, test", "lower, training", "lower, test"]
    points = [len(np.asarray(each.get_offsets())) for each in axes.collections]
    assert sum(points) == len(data.x_train) + len(data.x_test)
    FigureCanvasAgg(figure).draw()


def test_a_run_in_the_plane_has_its_own_defaults_and_the_picture(tmp_path: Path) -> None:
    options = ["--dataset", "xor", "--epochs", "1", "--run-folder", str(tmp_path)]
    assert main(options) == 0
    folder = only(tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))["config"]
    assert (config["net"], config["learning_rate"], config["epochs"]) == ("2-4-2", 10.0, 1)
    logged = logged_in(folder).Images("4. pictures/what the network answers")
    with Image.open(folder / "regions.png") as picture:
        assert [(each.step, each.width) for each in logged] == [(40, picture.width)]
    assert main([*options, "--hidden", "3", "2", "--batch-size", "50"]) == 0
    assert {path.name.split("__")[1] for path in tmp_path.iterdir()} == {"2-4-2", "2-3-2-2"}
