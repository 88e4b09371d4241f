"""What backward costs relative to forward: operations counted, times measured.

    python -m experiments.backward_cost

times both passes. The notes say that backward costs about as much as forward, since both multiply
by the same matrices. Counted exactly, a layer takes one product forward and two backward, those of
BP2 and BP4; but the first layer needs no wᵀδ, since no layer is below it.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.backward_cost").main())

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.benchmark.backward import autograd_passes, bare_passes, operations
from experiments.benchmark.contender import Contender
from experiments.benchmark.measure import Conditions, limited_to, measure
from experiments.benchmark.problem import Problem, problem
from experiments.command_line import parse
from experiments.curves import Row
from experiments.findings import Findings, Options, middle, require_range
from manual_bp import convert

PROGRAM = "python -m experiments.backward_cost"

ALIKE = 1.25  # a ratio below is about the same

SHOWN = {"products": "the matrix products alone", "layers": "all of it, in our layers"}
_STEP = "Step: the width of the layers, or their number."
CHARTS = {
    "forward_microseconds": f"The time of the forward pass, the median of all rounds. {_STEP}",
    "backward_microseconds": f"The time of the backward pass, the median of all rounds. {_STEP}",
    "times_forward": f"The time of backward over that of forward. {_STEP}",
    "counted": f"The operations of backward over those of forward, counted. {_STEP}",
}


@dataclass(frozen=True)
class Config(Options):
    """Compare the backward pass with the forward pass, over widths and over depths."""

    widths: tuple[int, ...] = (32, 128, 512, 1024)
    """Neurons in every layer, for networks with the middle one of the depths."""
    layers: tuple[int, ...] = (1, 2, 4, 8)
    """Depths, for networks with the middle one of the widths."""
    samples: int = 128
    """Samples in the batch."""
    rounds: int = 20
    """The most rounds to measure; figures are medians over rounds."""
    budget: float = 30.0
    """Seconds after which no further round starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, 2048, "widths")
        require_range(self, 1, 32, "layers")
        require_range(self, 1, 1000, "samples", "rounds")
        require_range(self, 0, 100_000, "budget")


def layer_passes(task: Problem) -> list[Contender]:
    """Forward and backward of our layers, whose backward methods PyTorch calls."""
    net = copy.deepcopy(task.net)
    convert(net)
    return autograd_passes(replace(task, net=net))


def timed(config: Config) -> Iterator[Row]:
    """For each network and way, the operations and the time of backward over those of forward."""
    torch.manual_seed(0)
    nets = [("width", width, middle(config.layers)) for width in config.widths]
    nets += [("layers", middle(config.widths), layers) for layers in config.layers]
    pairs = []
    for _, width, layers in nets:
        task = problem((width,) * (layers + 1), config.samples, "cpu")
        pairs.append({"products": bare_passes(task), "layers": layer_passes(task)})
    everyone = [contender for of_one in pairs for pair in of_one.values() for contender in pair]
    with limited_to(1):
        measure(everyone, Conditions(rounds=config.rounds, budget=config.budget))
    for (over, width, layers), of_one in zip(nets, pairs, strict=True):
        counted = [operations(contender) for contender in of_one["layers"]]
        for way, (forward, backward) in of_one.items():
            yield {
                "over": over,
                "way": way,
                "width": width,
                "layers": layers,
                "size": width if over == "width" else layers,
                "forward_microseconds": forward.micros,
                "backward_microseconds": backward.micros,
                "times_forward": float(np.median(np.divide(backward.seconds, forward.seconds))),
                "counted": counted[1] / counted[0],
            }


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Backward over forward, counted and timed, over widths and over depths."""
    figure.suptitle("How much more does backward cost than forward?")
    every = figure.subplots(1, 2, sharey=True)
    for axes, over in zip(every, ("width", "layers"), strict=True):
        those = sorted((row for row in rows if row["over"] == over), key=lambda row: row["size"])
        for way, colour in zip(SHOWN, ("C2", "C0"), strict=True):
            of_way = [row for row in those if row["way"] == way]
            sizes = [row["size"] for row in of_way]
            times = [row["times_forward"] for row in of_way]
            axes.plot(sizes, times, colour, marker="o", label=f"timed: {SHOWN[way]}")
        counted = [row["counted"] for row in of_way]
        axes.plot(sizes, counted, "black", ls="--", label="counted: operations")
        axes.axhline(1, color="C3", ls=":", label="the notes: as much as forward")
        axes.set(xscale="log", ylim=(0, None))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
    every[0].set(
        title=f"{those_of(rows, 'width')['layers']} layers", xlabel="neurons in each layer"
    )
    every[1].set(title=f"{those_of(rows, 'layers')['width']:,} neurons in each layer")
    every[1].set(xlabel="layers")
    every[0].set(ylabel="backward / forward")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def those_of(rows: Sequence[Row], over: str) -> Row:
    """The row of the largest network, all of it in our layers."""
    those = [row for row in rows if (row["over"], row["way"]) == (over, "layers")]
    return max(those, key=lambda row: row["size"])


def conclusion(rows: Sequence[Row]) -> list[str]:
    """What was counted and measured in the widest and the deepest network."""
    lines = []
    for over, which in (("width", "widest"), ("layers", "deepest")):
        row = those_of(rows, over)
        alone = next(
            other["times_forward"]
            for other in rows
            if (other["over"], other["way"], other["size"]) == (over, "products", row["size"])
        )
        lines.append(
            f"The {which} network, {row['layers']} layers of {row['width']:,} neurons: backward "
            f"takes {row['counted']:.2f} times the operations of forward, and "
            f"{row['times_forward']:.2f} times its time; the matrix products alone {alone:.2f} "
            f"times."
        )
    ratios = [row["times_forward"] for row in rows if row["way"] == "layers"]
    counted = max(row["counted"] for row in rows)
    lines.append(
        f"Over all networks, backward took {min(ratios):.2f} to {max(ratios):.2f} times as long as "
        f"forward. The notes call the two about the same: by operations that is "
        + ("right here." if counted < ALIKE else f"too low by a factor of up to {counted:.2f}.")
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    print(f"measuring for about {config.budget:.0f} s, on one core", flush=True)
    count = len(SHOWN) * (len(config.widths) + len(config.layers))
    rows = findings.add_rows(timed(config), count)
    findings.add_curves(rows, over="size", charts=CHARTS)
    findings.add_picture(partial(draw, rows))
    return findings.conclude(conclusion(rows))
