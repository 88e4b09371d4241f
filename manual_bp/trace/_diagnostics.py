"""What the diagnostics of a trace found: numbers and a verdict for each layer; print as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerDiagnostics:
    """The numbers of one layer. Norms are Frobenius norms, and δ is that of the reduced cost.

    name              the layer's name
    delta_norm        ‖δ^l‖
    ratio             ‖δ^l‖ / ‖δ^(l+1)‖; l+1 is the layer that reads a^l, or else the next layer
    by_w              ‖wᵀδ^(l+1)‖ / ‖δ^(l+1)‖, the first factor of that ratio in BP2
    by_sigma_prime    ‖δ^l‖ / ‖wᵀδ^(l+1)‖, the second factor, the effect of ⊙ σ'
    mean_sigma_prime  the mean of σ'(z) over the batch
    saturated         the fraction of neurons, for each sample, with 0 < σ' < 5 % of the largest σ'
    passed            ‖δ^l‖ / ‖∂C/∂a^l‖ relative to the largest σ', where σ' is not 0: how much
                      of the error passes ⊙ σ'
    off               the fraction of neurons whose σ' is 0 for every sample: dead ReLUs
    zeros             the fraction of δ that is exactly 0, of which
    zeros_rounded       σ'(z) > 0, but it or its product with the error was rounded to 0;
    zeros_from_above    no error came from above;
    zeros_off           σ'(z) is 0: a ReLU that is off
    nonfinite         how many numbers in w, z, a and δ are nan or infinite, by name, if any
    grad_norm         ‖∂C/∂w‖
    update            learning rate · ‖∂C/∂w‖ / ‖w‖
    dead_inputs       the fraction of inputs that are near 0 in the whole batch
    verdict           a summary in one line

    A number is None if it is not known: the ratio of the last layer; by_w and by_sigma_prime if BP2
    does not hold, because a does not go directly into another layer, or not only there; what needs
    σ', if no known activation follows; grad_norm if w is frozen; update if no learning rate is
    given; dead_inputs if the inputs were overwritten. The largest σ' is the largest possible.

    Examples:
        >>> net, x, y = nn.Sequential(Linear(3, 2), Sigmoid()), torch.rand(5, 3), torch.rand(5, 2)
        >>> layer = backprop(net, x, y, QuadraticCost()).diagnostics()["0"]
        >>> layer.verdict, layer.zeros
        ('learns', 0.0)
    """

    name: str
    delta_norm: float
    ratio: float | None
    by_w: float | None
    by_sigma_prime: float | None
    mean_sigma_prime: float | None
    saturated: float | None
    passed: float | None
    off: float | None
    zeros: float
    zeros_rounded: float
    zeros_from_above: float
    zeros_off: float
    nonfinite: Mapping[str, int]
    grad_norm: float | None
    update: float | None
    dead_inputs: float | None
    verdict: str


@dataclass(frozen=True)
class Diagnostics:
    """The numbers and the verdict of every layer; `print` shows them as a table.

    The table leaves out columns that are empty or 0 in all layers.

    Attributes:
        elsewhere: The names of parameters whose gradient comes from elsewhere than these layers.

    Examples:
        >>> net, x, y = nn.Sequential(Linear(3, 2), Sigmoid()), torch.rand(5, 3), torch.rand(5, 2)
        >>> diagnostics = backprop(net, x, y, QuadraticCost()).diagnostics()
        >>> [layer.name for layer in diagnostics]  # print(diagnostics) shows a table
        ['0']
    """

    layers: tuple[LayerDiagnostics, ...]
    elsewhere: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LayerDiagnostics]:
        """The layers."""
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerDiagnostics:
        """The layer of that name.

        Raises:
            KeyError: No layer has that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def __str__(self) -> str:
        from tabulate import tabulate  # a tenth of what the package takes to import

        rows = [_row(layer) for layer in self.layers]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        always = ("layer", "‖δ‖", "‖∂C/∂w‖")
        shown = {n: c for n, c in columns.items() if n in always or set(c) - {"", "0", "0%"}}
        table = tabulate(shown, "keys", stralign="right", disable_numparse=True)
        verdicts = tabulate(
            [(layer.name, layer.verdict) for layer in self.layers],
            tablefmt="plain",
            colalign=("right", "left"),
            disable_numparse=True,
        )
        return f"{table}\n\n{verdicts}{self._elsewhere()}"

    def _elsewhere(self) -> str:
        count = len(self.elsewhere)
        names = ", ".join(self.elsewhere[:3]) + (", ..." if count > 3 else "")
        text = f"\n\nnot in this table: {count} parameters with gradients from elsewhere ({names})"
        return text if count else ""


def _row(layer: LayerDiagnostics) -> dict[str, str]:
    return {
        "layer": layer.name,
        "‖δ‖": number(layer.delta_norm),
        "to next": number(layer.ratio),
        "by wᵀ": number(layer.by_w),
        "by σ'": number(layer.by_sigma_prime),
        "mean σ'": number(layer.mean_sigma_prime),
        "saturated": percent(layer.saturated),
        "off": percent(layer.off),
        "δ = 0": percent(layer.zeros),
        "rounded": percent(layer.zeros_rounded),
        "from above": percent(layer.zeros_from_above),
        "not finite": str(sum(layer.nonfinite.values())),
        "‖∂C/∂w‖": number(layer.grad_norm),
        "update": number(layer.update),
        "dead inputs": percent(layer.dead_inputs),
    }


def number(value: float | None) -> str:
    """The number with three digits; None is empty."""
    return "" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    """The number as a percentage without decimals; None is empty."""
    return "" if value is None else f"{value:.0%}"


def quotient(above: float | None, below: float | None) -> float | None:
    """The quotient of two numbers; None if either is None, or the second is 0."""
    return None if above is None or not below else above / below
