"""BP2: why the error vanishes on its way back, and which factor makes it vanish.

    python -m experiments.vanishing

sends the error of a batch of digits back through networks of 2 to 30 layers that have learned
nothing yet, and splits what each layer does to ‖δ‖ into the factors of BP2: wᵀ and ⊙ σ'. Networks
differ in their activation and in how their weights start: as PyTorch starts them, or scaled to
their activation.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.vanishing").main())

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import nn

from experiments.command_line import parse, require_seed
from experiments.curves import Row
from experiments.data import Data, load
from experiments.findings import Findings, Options, require_range
from experiments.networks import activations, build_cost, build_net
from manual_bp import Linear, Trace, backprop

PROGRAM = "python -m experiments.vanishing"

COST = "softmax-cross-entropy"
ACTIVATIONS = ("sigmoid", "tanh", "relu")
STARTS = {"pytorch": "PyTorch's start", "scaled": "scaled start"}
SHORT = {"pytorch": "PyTorch", "scaled": "scaled"}
FADED = 0.1  # if less of the error arrives, it is said to fade
CHARTS = {
    "delta": "‖δ^l‖ of each layer l, relative to that of the output layer. Step: the layer l.",
    "by_w": "By BP2, what wᵀ does to the error of the layer above: ‖wᵀδ‖ / ‖δ‖. Step: the layer l.",
    "by_sigma_prime": "By BP2, what σ' does to it then: ‖wᵀδ ⊙ σ'(z)‖ / ‖wᵀδ‖. Step: the layer l.",
}


@dataclass(frozen=True)
class Config(Options):
    """See the error vanish from layer to layer, and whether wᵀ or σ' makes it vanish."""

    layers: tuple[int, ...] = (2, 5, 10, 20, 30)
    """How many layers the networks have, each at least 2."""
    width: int = 64
    """Neurons in each hidden layer."""
    samples: int = 128
    """Digits in the batch."""
    seed: int = 0
    """Determines the initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 2, 200, "layers")
        require_range(self, 1, 512, "width")
        require_range(self, 1, 1000, "samples")
        require_seed(self.seed)


def gain(activation: str) -> float:
    """What the weights are scaled by, so that ⊙ σ' near z = 0 and wᵀ cancel: 4 for the sigmoid."""
    near_0 = torch.tensor([-1e-6, 1e-6], dtype=torch.float64)
    mean_square = activations()[activation]().sigma_prime_from_z(near_0).square().mean()
    return mean_square.rsqrt().item()


def trace_of(config: Config, data: Data, layers: int, activation: str, start: str) -> Trace:
    """One pass through a new network of that many layers."""
    torch.manual_seed(config.seed)
    sizes = (data.features, *[config.width] * (layers - 1), data.classes)
    net = build_net(sizes, activation, COST).double()
    for layer in net:
        if start == "scaled" and isinstance(layer, Linear):
            nn.init.normal_(layer.weight, std=gain(activation) / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    x, labels = data.x_train[: config.samples].double(), data.label_train[: config.samples]
    return backprop(net, x, labels, build_cost(COST))


def measure(config: Config) -> Iterator[Row]:
    """For each network and layer ‖δ^l‖ over ‖δ^L‖, and the factors of BP2; nan in the last."""
    data = load("digits")
    for activation in ACTIVATIONS:
        for start in STARTS:
            for layers in sorted(set(config.layers)):
                found = trace_of(config, data, layers, activation, start).diagnostics().layers
                for place, layer in enumerate(found, start=1):
                    yield {
                        "activation": activation,
                        "start": start,
                        "layers": layers,
                        "layer": place,
                        "delta": layer.delta_norm / found[-1].delta_norm,
                        "by_w": layer.by_w or math.nan,
                        "by_sigma_prime": layer.by_sigma_prime or math.nan,
                    }


def deepest(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of the deepest networks, by activation and start."""
    most = max(row["layers"] for row in rows)
    return {
        (activation, start): [
            row
            for row in rows
            if (row["activation"], row["start"], row["layers"]) == (activation, start, most)
        ]
        for activation in ACTIVATIONS
        for start in STARTS
    }


def typical(rows: Sequence[Row], column: str) -> float:
    """The geometric mean of a factor over all layers but the last; nan if it is unknown."""
    return math.exp(math.fsum(math.log(row[column]) for row in rows[:-1]) / (len(rows) - 1))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """‖δ^l‖ over layers in the deepest networks, and the factors of BP2 as bars."""
    figure.suptitle("Why do the first layers of a deep network hardly learn?")
    errors, factors = figure.subplots(1, 2, width_ratios=(1, 1.15))
    series = deepest(rows)
    colours = dict(zip(ACTIVATIONS, ("C3", "C0", "C2"), strict=True))
    for (activation, start), those in series.items():
        errors.plot(
            [row["layer"] for row in those],
            [row["delta"] for row in those],
            colours[activation],
            ls="-" if start == "scaled" else "--",
            label=f"{activation}, {STARTS[start]}",
        )
    errors.set(yscale="log", xlabel="layer l", ylabel="‖δ of layer l‖ / ‖δ of the last layer‖")
    errors.set(title=f"the error in networks of {len(those)} layers")
    errors.xaxis.set_major_locator(MaxNLocator(integer=True))
    errors.legend()
    for shift, column, colour, label in (
        (-0.2, "by_w", "C4", "wᵀ: ‖wᵀδ‖ / ‖δ‖"),
        (0.2, "by_sigma_prime", "C1", "σ': ‖wᵀδ ⊙ σ'‖ / ‖wᵀδ‖"),
    ):
        heights = [typical(those, column) for those in series.values()]
        places = [place + shift for place in range(len(series))]
        from_1 = [height - 1 for height in heights]
        bars = factors.bar(places, from_1, 0.38, bottom=1, color=colour, label=label)
        factors.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=10, padding=2)
    factors.axhline(1, color="black", lw=1)
    factors.set(yscale="log", ylabel="factor (log scale)")
    factors.set(title="what each layer does to it: the two factors of BP2")
    factors.yaxis.set_major_formatter("{x:g}")
    factors.yaxis.set_minor_formatter(NullFormatter())
    factors.set_xticks(range(len(series)), [f"{one}\n{SHORT[start]}" for one, start in series])
    factors.legend()
    factors.margins(y=0.15)


def conclusion(rows: Sequence[Row]) -> list[str]:
    """For each activation and start, how much of the error arrives, and which factor took it."""
    depths = sorted({row["layers"] for row in rows})
    lines = [
        "‖δ‖ of the first layer over that of the last, in networks of "
        f"{_listed(str(depth) for depth in depths)} layers:"
    ]
    for (activation, start), those in deepest(rows).items():
        arrived = [
            row["delta"]
            for row in rows
            if (row["activation"], row["start"], row["layer"]) == (activation, start, 1)
        ]
        lines += [
            f"{activation}, {STARTS[start]}: {_listed(f'{value:.2g}' for value in arrived)}",
            f"    {_fate(those)}",
        ]
    return lines


def _listed(values: Iterable[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} and {last}" if others else last


def _fate(those: Sequence[Row]) -> str:
    arrived = those[0]["delta"]
    if arrived == 0:
        return "None of it arrives."
    by_w, by_sigma_prime = (typical(those, name) for name in ("by_w", "by_sigma_prime"))
    cause = "wᵀ" if by_w < by_sigma_prime else "σ'"
    fate = f"it fades, mostly because of {cause}" if arrived < FADED else "it arrives"
    if arrived > 1 / FADED:
        fate = "it grows, because of wᵀ"  # no σ' here is more than 1
    return (
        f"In a layer, wᵀ multiplies the error by {by_w:.2f} and σ' by {by_sigma_prime:.2f}, "
        f"together {by_w * by_sigma_prime:.2f}: {fate}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    total = len(ACTIVATIONS) * len(STARTS) * sum(set(config.layers))
    rows = findings.add_rows(measure(config), total)
    most = max(config.layers)
    findings.add_curves([row for row in rows if row["layers"] == most], over="layer", charts=CHARTS)
    findings.add_picture(partial(draw, rows))
    return findings.conclude(conclusion(rows))
