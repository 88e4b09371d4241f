"""BP1: why a saturated neuron learns slowly, and what cross-entropy changes.

    python -m experiments.slow_learning

trains one sigmoid neuron to answer the input 1 with 0, as in chapter 3 of the notes. It starts
badly wrong: w = b = 2. Under the quadratic cost δ = (a − y) σ'(z), and σ'(z) is small there; under
the cross-entropy δ = a − y.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.slow_learning").main())

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

from experiments.command_line import parse
from experiments.curves import Row
from experiments.findings import Findings, Options, require_range
from experiments.networks import build_cost, build_net
from manual_bp import Sigmoid, Trace, backprop

PROGRAM = "python -m experiments.slow_learning"

COSTS = {"quadratic": "quadratic", "sigmoid-cross-entropy": "cross-entropy"}
HALF = 0.5  # below it the output is nearer to 0 than to 1
CHARTS = {
    "output": "The output a of the neuron, which should fall to 0. Step: the epoch.",
    "delta": "|δ| = |∇_a C| σ'(z), by BP1: how fast the bias learns. Step: the epoch.",
    "grad_a": "|∇_a C|, the first factor of |δ| by BP1. Step: the epoch.",
    "sigma_prime": "σ'(z), the second factor of |δ| by BP1; small where the neuron is saturated. "
    "Step: the epoch.",
}


@dataclass(frozen=True)
class Config(Options):
    """See why a saturated neuron learns slowly under the quadratic cost."""

    weight: float = 2.0
    """The initial weight."""
    bias: float = 2.0
    """The initial bias."""
    learning_rate: float = 0.15
    """The step size of gradient descent, the same under both costs."""
    epochs: int = 300
    """How many steps to take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, -15, 15, "weight", "bias")  # beyond, float64 rounds σ' to 0
        require_range(self, 1, 100_000, "epochs")
        require_range(self, 1e-6, 1e6, "learning_rate")


def traces(config: Config, cost_name: str) -> Iterator[Trace]:
    """The pass before every step, and the one after the last."""
    net = build_net((1, 1), "sigmoid", cost_name).double()
    for name, value in (("0.weight", config.weight), ("0.bias", config.bias)):
        nn.init.constant_(net.get_parameter(name), value)
    optimizer = torch.optim.SGD(net.parameters(), config.learning_rate)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(config.epochs + 1):
        trace = backprop(net, x, y, build_cost(cost_name))
        yield trace
        optimizer.zero_grad()
        trace.assign_grads()
        optimizer.step()


def measure(config: Config) -> Iterator[Row]:
    """For each cost and epoch the output a, and the factors of BP1: |δ| = |∇_a C| σ'(z)."""
    neuron = Sigmoid()
    for cost_name, shown in COSTS.items():
        for epoch, trace in enumerate(traces(config, cost_name)):
            layer = trace.layers[0]
            delta = layer.delta.abs().item()
            sigma_prime = neuron.sigma_prime_from_z(layer.z).item()
            yield {
                "cost": shown,
                "epoch": epoch,
                "output": neuron(layer.z).item(),
                "delta": delta,
                "grad_a": delta / sigma_prime,
                "sigma_prime": sigma_prime,
            }


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """The output over epochs, and the factors of BP1 over epochs."""
    figure.suptitle("Why does a neuron that is badly wrong learn slowly?")
    output, factors = figure.subplots(1, 2)
    for (shown, those), colour in zip(by_cost(rows).items(), ("C3", "C0"), strict=True):
        epochs = [row["epoch"] for row in those]
        output.plot(epochs, [row["output"] for row in those], colour, label=f"{shown} cost")
        delta = [row["delta"] for row in those]
        factors.plot(epochs, delta, colour, label=f"|δ|, {shown} cost")
        if shown == "quadratic":
            for column, style, label in (
                ("grad_a", "--", "its first factor, |a − y|"),
                ("sigma_prime", ":", "its second factor, σ'(z)"),
            ):
                factors.plot(epochs, [row[column] for row in those], colour, ls=style, label=label)
    output.set(title="the output, which should fall to 0", ylabel="output a", ylim=(0, 1))
    factors.set(title="the factors of BP1", ylabel="size (log scale)", yscale="log")
    for axes in (output, factors):
        axes.set(xlabel="epoch (one step of gradient descent)", xlim=(0, None))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def by_cost(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each cost: the quadratic one, then the cross-entropy."""
    return {shown: [row for row in rows if row["cost"] == shown] for shown in COSTS.values()}


def conclusion(config: Config, rows: Sequence[Row]) -> list[str]:
    """How long both costs take, and the factors of BP1 at the start."""
    quadratic, entropy = by_cost(rows).values()
    first, other = quadratic[0], entropy[0]
    diagnosis = next(traces(config, "quadratic")).diagnostics()["0"]
    lines = [
        f"The output is {first['output']:.3g} at the start, and should be 0.",
        *(f"{cost.capitalize()} cost: {_arrival(of)}." for cost, of in by_cost(rows).items()),
        f"BP1 at the start, quadratic cost: |δ| = |a − y| σ'(z) = {first['grad_a']:.3g} × "
        f"{first['sigma_prime']:.3g} = {first['delta']:.3g}.",
        f"Cross-entropy cost: σ'(z) cancels, and |δ| = |a − y| = {other['delta']:.3g}, "
        f"{other['delta'] / first['delta']:.3g} times as large.",
    ]
    if diagnosis.passed is not None:
        counts = "counts" if diagnosis.saturated else "does not yet count"
        lines.append(
            f"The diagnostics, quadratic cost: σ'(z) is {diagnosis.passed:.2%} of its largest "
            f"value, which {counts} as saturated; verdict: {diagnosis.verdict}."
        )
    return lines


def _arrival(rows: Sequence[Row]) -> str:
    if rows[0]["output"] < HALF:
        return f"below {HALF} from the start, so there is little to learn"
    for row in rows:
        if row["output"] < HALF:
            return f"below {HALF} after {row['epoch']} epochs"
    return f"not below {HALF} within {rows[-1]['epoch']} epochs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    rows = findings.add_rows(measure(config), total=len(COSTS) * (config.epochs + 1))
    findings.add_curves(rows, over="epoch", charts=CHARTS)
    findings.add_picture(partial(draw, rows))
    return findings.conclude(conclusion(config, rows))
