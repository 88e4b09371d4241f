"""BP4: why weights that are fed by small activations learn slowly.

    python -m experiments.small_activations

trains a network on handwritten digits for one epoch, and then, from the same start, on the same
digits with their right half dimmed. BP4 says that ∂C/∂w is δ times the activation that feeds w. So
pixels that are always 0 teach their weights nothing, and dimmed ones teach theirs in slow motion.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.small_activations").main())

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.command_line import parse, require_seed
from experiments.curves import Row
from experiments.data import load
from experiments.findings import Findings, Options, require_range
from experiments.networks import build_cost, build_net, targets
from experiments.training import batches
from manual_bp import backprop

PROGRAM = "python -m experiments.small_activations"

COST = "quadratic"
INPUTS = ("original", "dimmed")
CHARTS = {
    "moved": "How far the weights that read this half of the pixels have moved from their start: "
    "the norm over all of them. Step: the update.",
}


@dataclass(frozen=True)
class Config(Options):
    """See how far weights move that are fed by bright, dim and dark pixels."""

    dim: float = 0.1
    """What the right half of each digit is multiplied by."""
    hidden: int = 30
    """Neurons in the hidden layer."""
    learning_rate: float = 3.0
    """The step size of gradient descent on the mean cost of a batch."""
    batch_size: int = 10
    """Samples in a batch; the last one of an epoch may be smaller."""
    epochs: int = 1
    """How many times every training sample is used."""
    seed: int = 0
    """Determines the initial weights and the order of the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 0.99, "dim")
        require_range(self, 1, 1000, "hidden", "batch_size", "epochs")
        require_range(self, 1e-6, 1e6, "learning_rate")
        require_seed(self.seed)


@dataclass(frozen=True)
class Digits:
    """The digits, and the share of its brightness that each pixel keeps, (64,)."""

    x: Tensor
    y: Tensor
    keeps: Tensor
    shape: tuple[int, int]


def digits(config: Config, inputs: str) -> Digits:
    """All training samples, original or dimmed."""
    data = load("digits")
    assert data.image_shape is not None
    keeps = torch.ones(data.image_shape)
    if inputs == "dimmed":
        keeps[:, data.image_shape[1] // 2 :] = config.dim
    y = targets(data.label_train, data.classes, build_cost(COST))
    return Digits(data.x_train * keeps.flatten(), y, keeps.flatten(), data.image_shape)


def learn(config: Config, data: Digits) -> Iterator[Tensor]:
    """After every update, how far the weights fed by each pixel are from their start: (64,)."""
    torch.manual_seed(config.seed)
    net = build_net((data.x.shape[1], config.hidden, data.y.shape[1]), "sigmoid", COST)
    optimizer = torch.optim.SGD(net.parameters(), config.learning_rate)
    order = torch.Generator().manual_seed(config.seed)
    w = net.get_parameter("0.weight")
    start = w.detach().clone()
    for _ in range(config.epochs):
        for some in batches(len(data.x), config.batch_size, order):
            optimizer.zero_grad()
            backprop(net, data.x[some], data.y[some], build_cost(COST)).assign_grads()
            optimizer.step()
            yield (w.detach() - start).norm(dim=0)


def measure(config: Config) -> Iterator[tuple[list[Row], list[Row]]]:
    """For each pixel its size and how far its weights moved; and how far each half did, over time.

    The size of a pixel is its root mean square over all samples.
    """
    for inputs in INPUTS:
        data = digits(config, inputs)
        moved = torch.stack(list(learn(config, data)))
        is_right = digits(config, "dimmed").keeps < 1
        size = data.x.square().mean(0).sqrt()
        pixels = [
            {"inputs": inputs, "pixel": k, "activation": size[k].item(), "moved": end.item()}
            for k, end in enumerate(moved[-1])
        ]
        curves = [
            {"inputs": inputs, "half": half, "update": update, "moved": those.norm().item()}
            for half, chosen in (("left", ~is_right), ("right", is_right))
            for update, those in enumerate(moved[:, chosen], start=1)
        ]
        yield pixels, curves


def columns(rows: Sequence[Row], inputs: str) -> tuple[np.ndarray, np.ndarray]:
    """The sizes of the activations, and how far the weights that they feed moved: (64,) each."""
    those = [row for row in rows if row["inputs"] == inputs]
    size, moved = (np.array([row[name] for row in those]) for name in ("activation", "moved"))
    return size, moved


def draw(rows: Sequence[Row], shape: tuple[int, int], figure: Figure) -> None:
    """Pixels, and how far their weights moved: as pictures, and against each other."""
    figure.suptitle("Which weights of the first layer learn?")
    axes = figure.subplot_mosaic(
        [["a original", "w original", "all"], ["a dimmed", "w dimmed", "all"]],
        width_ratios=(1, 1, 2.6),
    )
    brightest, furthest = (max(row[name] for row in rows) for name in ("activation", "moved"))
    for inputs, colour in zip(INPUTS, ("C0", "C3"), strict=True):
        size, moved = columns(rows, inputs)
        for letter, values, most in (("a", size, brightest), ("w", moved, furthest)):
            picture = axes[f"{letter} {inputs}"]
            picture.imshow(values.reshape(shape), cmap="inferno", vmin=0, vmax=most)
            picture.set(xticks=[], yticks=[])
            picture.grid(visible=False)
        axes[f"a {inputs}"].set_ylabel(f"{inputs} digits")
        axes["all"].scatter(size, moved, 45, colour, alpha=0.75, label=f"{inputs} digits")
    for name, title in (("a", "a: size of pixels"), ("w", "how far w moved")):
        axes[f"{name} original"].set_title(title)
        axes[f"{name} dimmed"].set_xlabel("bright is large", fontsize=11)
    steps = zip(*(zip(*columns(rows, inputs), strict=True) for inputs in INPUTS), strict=True)
    for place, ends in enumerate(steps):
        label = "_" * bool(place) + "the same pixel"  # in the legend once
        axes["all"].plot(*zip(*ends, strict=True), "grey", lw=0.7, alpha=0.5, zorder=0, label=label)
    axes["all"].set(
        title="BP4: ∂C/∂w = δ a", xlabel="size of the pixel a (root mean square, 0 to 1)"
    )
    axes["all"].set(ylabel="‖Δw‖ of the weights that it feeds")
    axes["all"].legend()


def conclusion(config: Config, rows: Sequence[Row]) -> list[str]:
    """How closely movement follows activation, and what dimming did."""
    size, moved = columns(rows, "original")
    dim_size, dim_moved = columns(rows, "dimmed")
    is_dark = size == 0
    is_right = (dim_size < size) & ~is_dark
    slower = np.linalg.norm(dim_moved[is_right]) / np.linalg.norm(moved[is_right])
    kept = is_dark | is_right
    other = np.linalg.norm(dim_moved[~kept]) / np.linalg.norm(moved[~kept])
    return [
        f"{is_dark.sum()} of {len(size)} pixels are 0 in every digit: their weights moved by "
        f"{moved[is_dark].max(initial=0):.3g}.",
        f"Over all pixels, the correlation of size and movement is "
        f"{np.corrcoef(size, moved)[0, 1]:.2f}.",
        f"The {is_right.sum()} pixels dimmed to {config.dim:.3g}: their weights moved "
        f"{slower:.3g} times as far as before; those of the other pixels {other:.3g} times.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    measured = list(measure(config))
    pixels = [row for found, _ in measured for row in found]
    rows = findings.add_rows(pixels, len(pixels))
    findings.add_curves(
        [row for _, found in measured for row in found], over="update", charts=CHARTS
    )
    findings.add_picture(partial(draw, rows, digits(config, "original").shape))
    return findings.conclude(conclusion(config, rows))
