"""What the diagnostics of a trace found: the numbers and the verdict of every layer, as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class LayerDiagnostics:
    """The numbers of one layer; all norms are Frobenius norms, of the reduced cost.

    name            the layer's
    delta_norm      ‖δ^l‖
    ratio           ‖δ^l‖ / ‖δ^(l+1)‖, to the layer that reads this one's a, else to the next one
    by_w            ‖wᵀδ^(l+1)‖ / ‖δ^(l+1)‖, the first factor of that ratio by BP2
    by_sigma        ‖δ^l‖ / ‖wᵀδ^(l+1)‖, the second one: what ⊙ σ' did
    mean_prime      the mean of σ'(z) over the batch
    saturated       the share of neurons, counted for each sample, whose σ' is under 5 % of the
                    largest possible, though not 0
    passed          ‖δ^l‖ / ‖∂C/∂a^l‖ beside the largest possible σ', where σ' is not 0: how much of
                    the error passes ⊙ σ'
    off             the share of neurons whose σ' is 0 for every sample: dead ReLUs
    zeros           the share of δ that is exactly 0, and is so because
    zeros_rounded     σ'(z) > 0, or what it was multiplied with, got lost by rounding;
    zeros_from_above  nothing came from above;
    zeros_off         σ'(z) is 0: a ReLU that is off
    nonfinite       how many numbers of w, z, a and δ, by name, are nan or infinite, if any
    grad_norm       ‖∂C/∂w‖
    update          learning rate · ‖∂C/∂w‖ / ‖w‖
    dead_inputs     the share of inputs that are near 0 in the whole batch
    verdict         all that in a line

    None stands for what there is not: a ratio for the last layer; its factors where BP2 does not
    hold, because a does not go straight into another layer, or not only there; σ' where no known
    activation follows; a gradient where w is frozen; an update without a learning rate; dead inputs
    where they were written over.
    """

    name: str
    delta_norm: float
    ratio: float | None
    by_w: float | None
    by_sigma: float | None
    mean_prime: float | None
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
    """Every layer's numbers and verdict; `print` shows them as a table.

    The table leaves out what there is nothing to say of in any layer: columns of nothing but 0.
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
        rows = [
            {
                "layer": layer.name,
                "‖δ‖": _number(layer.delta_norm),
                "to next": _number(layer.ratio),
                "by wᵀ": _number(layer.by_w),
                "by σ'": _number(layer.by_sigma),
                "mean σ'": _number(layer.mean_prime),
                "saturated": _share(layer.saturated),
                "off": _share(layer.off),
                "δ = 0": _share(layer.zeros),
                "rounded": _share(layer.zeros_rounded),
                "from above": _share(layer.zeros_from_above),
                "not finite": str(sum(layer.nonfinite.values())),
                "‖∂C/∂w‖": _number(layer.grad_norm),
                "update": _number(layer.update),
                "dead inputs": _share(layer.dead_inputs),
            }
            for layer in self.layers
        ]
        always = ("layer", "‖δ‖", "‖∂C/∂w‖")
        telling = [
            key
            for key in rows[0]
            if key in always or any(row[key] not in ("", "0", "0%") for row in rows)
        ]
        columns = {key: [row[key] for row in rows] for key in telling}
        table = tabulate(columns, "keys", stralign="right", disable_numparse=True)
        verdicts = tabulate(
            [(layer.name, layer.verdict) for layer in self.layers],
            tablefmt="plain",
            colalign=("right", "left"),
            disable_numparse=True,
        )
        return f"{table}\n\n{verdicts}{self._rest()}"

    def _rest(self) -> str:
        if not self.elsewhere:
            return ""
        names = ", ".join(self.elsewhere[:3]) + (", ..." if len(self.elsewhere) > 3 else "")
        return f"\n\nnot in this table: {len(self.elsewhere)} parameters elsewhere ({names})"


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
