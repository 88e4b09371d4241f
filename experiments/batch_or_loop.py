"""Why backpropagation is fast: in matrices, in a loop over samples, by finite differences.

    python -m experiments.batch_or_loop

computes the same gradient in three ways, and times them in turns: backpropagation on the whole
batch, backpropagation on one sample after another, and a forward pass for every single parameter,
with that parameter changed a little.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.batch_or_loop").main())

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from experiments.benchmark.contender import Contender
from experiments.benchmark.measure import Conditions, limited_to, measure
from experiments.command_line import parse, require_seed
from experiments.curves import Row
from experiments.findings import Findings, Options, middle, require_range
from experiments.networks import build_net
from manual_bp import QuadraticCost, backprop

PROGRAM = "python -m experiments.batch_or_loop"

INPUTS, OUTPUTS = 64, 10
WAYS = ("batch", "loop", "differences")
SHOWN = {
    "batch": "backpropagation, batch in matrices",
    "loop": "backpropagation, loop over samples",
    "differences": "finite differences, no backpropagation",
}
STEP = 1e-6  # in float64, rounding and curvature are both small
_SIZE = "Step: the number of samples, or of parameters."
CHARTS = {
    "milliseconds": f"The time of one gradient, the median of all rounds. {_SIZE}",
    "times_batch": f"The same over the time of the batch in matrices. {_SIZE}",
    "error": f"The norm of the difference from the batch in matrices, relative. {_SIZE}",
}
COST = QuadraticCost()


@dataclass(frozen=True)
class Config(Options):
    """Compare the time of three ways to the same gradient."""

    samples: tuple[int, ...] = (1, 10, 100, 1000)
    """Batch sizes, for a network with the middle one of the hidden layers."""
    hidden: tuple[int, ...] = (3, 10, 30, 100)
    """Sizes of the hidden layer, for the middle one of the batch sizes."""
    rounds: int = 10
    """The most rounds to measure; figures are medians over rounds."""
    budget: float = 30.0
    """Seconds after which no further round starts."""
    seed: int = 0
    """Determines the weights and the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, 10_000, "samples")
        require_range(self, 1, 1000, "hidden", "rounds")
        require_range(self, 0, 100_000, "budget")
        require_seed(self.seed)


@torch.no_grad()
def differences(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """(C(p + h) − C(p)) / h for every parameter p: one forward pass each, and one more."""
    base = COST(net(x), y)
    grads = []
    for parameter in net.parameters():
        numbers, grad = parameter.view(-1), torch.empty_like(parameter)
        for index in range(len(numbers)):
            number = numbers[index].item()
            numbers[index] = number + STEP
            grad.view(-1)[index] = (COST(net(x), y) - base) / STEP
            numbers[index] = number
        grads.append(grad)
    return grads


def batch(net: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """The four equations on the whole batch at once."""
    layers = backprop(net, x, y, COST).layers
    return [grad for layer in layers for grad in (layer.grad_w, layer.grad_b) if grad is not None]


def loop(net: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """The four equations on one sample after another; the mean of their gradients."""
    each = [batch(net, *sample) for sample in zip(x, y, strict=True)]
    return [torch.stack(grads).mean(0) for grads in zip(*each, strict=True)]


def error(grads: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The norm of the difference of two gradients, relative to the norm of the right one."""
    found, wanted = (torch.cat([grad.flatten() for grad in each]) for each in (grads, right))
    return float((found - wanted).norm() / wanted.norm())


@dataclass
class Size:
    """A network and a batch, and what the three ways take there.

    over: What is varied: samples or parameters.
    """

    over: str
    samples: int
    parameters: int
    ways: dict[str, Contender]
    errors: dict[str, float]


def prepare(config: Config, over: str, hidden: int, samples: int) -> Size:
    """Make the network and the batch, and compare the three gradients."""
    torch.manual_seed(config.seed)
    net = build_net((INPUTS, hidden, OUTPUTS), "sigmoid", "quadratic").double()
    x, y = (torch.rand(samples, size, dtype=torch.float64) for size in (INPUTS, OUTPUTS))
    calls = {
        "batch": partial(batch, net, x, y),
        "loop": partial(loop, net, x, y),
        "differences": partial(differences, net, x, y),
    }
    right = calls["batch"]()
    errors = {way: error(call(), right) for way, call in calls.items()}
    ways = {way: Contender(way, call) for way, call in calls.items()}
    return Size(over, samples, sum(p.numel() for p in net.parameters()), ways, errors)


def timed(config: Config) -> Iterator[Row]:
    """For each size and way the time, also relative to the batch, and the error."""
    sizes = [
        prepare(config, "samples", middle(config.hidden), samples) for samples in config.samples
    ] + [prepare(config, "parameters", hidden, middle(config.samples)) for hidden in config.hidden]
    everyone = [contender for size in sizes for contender in size.ways.values()]
    with limited_to(1):
        measure(everyone, Conditions(rounds=config.rounds, budget=config.budget))
    for size in sizes:
        base = size.ways["batch"].seconds
        for way, contender in size.ways.items():
            yield {
                "over": size.over,
                "way": way,
                "samples": size.samples,
                "parameters": size.parameters,
                "size": size.samples if size.over == "samples" else size.parameters,
                "milliseconds": contender.micros / 1000,
                "times_batch": float(np.median(np.divide(contender.seconds, base))),
                "error": size.errors[way],
            }


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """The time of the three ways over samples, and over parameters."""
    figure.suptitle("Why is backpropagation fast?")
    every = figure.subplots(1, 2, sharey=True)
    for axes, over, fixed in zip(
        every, ("samples", "parameters"), ("parameters", "samples"), strict=True
    ):
        those = [row for row in rows if row["over"] == over]
        for way, colour in zip(WAYS, ("C2", "C0", "C3"), strict=True):
            points = [(row["size"], row["milliseconds"]) for row in those if row["way"] == way]
            sizes, times = zip(*sorted(points), strict=True)
            axes.plot(sizes, times, colour, marker="o", label=SHOWN[way])
        axes.set(xscale="log", yscale="log", title=f"{those[0][fixed]:,} {fixed}")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
    every[0].set(xlabel="samples in the batch", ylabel="time of one gradient, ms")
    every[1].set(xlabel="weights and biases of the network")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def conclusion(rows: Sequence[Row]) -> list[str]:
    """The ratios at the largest sizes, and what they should be by counting."""

    def largest(over: str, way: str) -> Row:
        those = [row for row in rows if (row["over"], row["way"]) == (over, way)]
        return max(those, key=lambda row: row["size"])

    loop_row, slow = largest("samples", "loop"), largest("parameters", "differences")
    exact = max(row["error"] for row in rows if row["way"] == "loop")
    inexact = max(row["error"] for row in rows if row["way"] == "differences")
    return [
        f"{loop_row['samples']:,} samples, one after another, took {loop_row['times_batch']:.3g} "
        f"times as long as all of them in matrices; the gradients differ by {exact:.1g} at most, "
        f"relative to their norm.",
        f"Finite differences need a forward pass for each of {slow['parameters']:,} parameters, "
        f"and took {slow['times_batch']:,.0f} times as long as backpropagation, which needs "
        f"only one forward and one backward pass; with a relative error of up to {inexact:.1g}.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    print(f"measuring for about {config.budget:.0f} s, on one core", flush=True)
    count = len(WAYS) * (len(config.samples) + len(config.hidden))
    rows = findings.add_rows(timed(config), count)
    findings.add_curves(rows, over="size", charts=CHARTS)
    findings.add_picture(partial(draw, rows))
    return findings.conclude(conclusion(rows))
