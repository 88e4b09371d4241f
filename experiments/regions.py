"""What a network answers all over the plane, for samples with two features."""

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import nn

from experiments.data import Data

_STEPS = 300  # in each direction
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9")


@torch.no_grad()
def draw_regions(net: nn.Module, data: Data) -> Figure:
    """The class that a network gives each point of the plane, and the samples on top of it.

    Args:
        net: Takes (N, 2), and returns (N, classes).
        data: Has two features, and at most ten classes.
    """
    along = torch.linspace(-0.1, 1.1, _STEPS, device=data.x_train.device)
    grid = torch.cartesian_prod(along, along)  # the training samples are within 0 to 1
    classes = net(grid).argmax(-1).reshape(_STEPS, _STEPS)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        classes.T.cpu().numpy(),
        cmap=ListedColormap(_COLOURS[: data.classes]),
        vmin=-0.5,
        vmax=data.classes - 0.5,
        origin="lower",
        extent=(-0.1, 1.1, -0.1, 1.1),
        alpha=0.35,
    )
    for index, name in enumerate(data.class_names):
        train = data.x_train[data.label_train == index].cpu().numpy()
        test = data.x_test[data.label_test == index].cpu().numpy()
        colour = _COLOURS[index]
        axes.scatter(train[:, 0], train[:, 1], 10, colour, label=f"{name}, training")
        axes.scatter(test[:, 0], test[:, 1], 30, colour, edgecolor="black", label=f"{name}, test")
    axes.set(title="Which class is where?", xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2)
    return figure
