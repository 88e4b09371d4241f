"""How well each layer learns, read off its pairs (a, δ), and why not.

The equations name what can go wrong. BP2 makes δ^l of δ^(l+1) in two steps, ·w and ⊙ σ'; each has
its share in how fast an error fades or grows on its way down. σ' ≈ 0 is a saturated neuron. BP4
multiplies δ with a^(l-1): where that is near 0, weights hardly move.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from manual_bp import _require
from manual_bp._autocast import without_autocast
from manual_bp.layers._activation import Activation
from manual_bp.layers._affine import as_rows
from manual_bp.trace._call import Call, wide
from manual_bp.trace._layer import LayerTrace
from manual_bp.trace._per_sample import norm_of

# A neuron is saturated, for a sample, if its σ' is less than this share of the largest possible.
SATURATED = 0.05
# The share of a layer's neurons from which on the verdict is about saturation. Of 250 small nets on
# scikit-learn's datasets, those that had learned well had hidden layers saturated up to 87 %; those
# that a saturated hidden layer had stopped, 93 % and more.
MOST = 0.9
# The last layer saturates where it is right, as it should. So its verdict is about saturation only
# if less than this share of the error passes σ': over all training samples, 4 % and more did in
# nets that had learned; in those that had stopped, 0.02 % and less.
PASSED = 0.01
# An input is dead if it never has this share of the inputs' root mean square.
DEAD = 0.01
# The share of a layer's neurons or inputs from which on the verdict is about them.
MANY = 0.5
# How many times smaller or larger than the last layer's an error has to be for a verdict about it.
FAR = 1000.0
# How many rows of δ it takes to say that something is so in all of them.
ENOUGH = 8
# How many times its weights an update may be before it is a leap. Layers start with small weights:
# in nets that learned well the first update was up to 6 times as large.
LEAP = 10.0


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


@torch.no_grad()
def diagnose(
    layers: Sequence[LayerTrace], learning_rate: float | None, elsewhere: tuple[str, ...]
) -> Diagnostics:
    """The numbers and the verdict of every layer of a trace, in forward order."""
    if learning_rate is not None:
        _require.above("learning_rate", learning_rate, 0)
    for layer in layers:
        layer.require_as_it_was()
    with without_autocast(layers[0].w):
        found = [_numbers(layer, layers[i + 1 :], learning_rate) for i, layer in enumerate(layers)]
    verdicts = [_verdict(found[i:], layer) for i, layer in enumerate(layers)]
    return Diagnostics(
        tuple(replace(d, verdict=verdict) for d, verdict in zip(found, verdicts, strict=True)),
        elsewhere,
    )


def _numbers(
    layer: LayerTrace, later: Sequence[LayerTrace], learning_rate: float | None
) -> LayerDiagnostics:
    _require.real(f"the output of layer {layer.name!r}", layer.calls[0].z)
    a_prev, z, a, delta = (_rows(layer, name) for name in ("a_prev", "z", "a", "delta"))
    delta_norm = norm_of(delta)
    z_is_known = all(call.z_is_known for call in layer.calls)
    slope = _slope(layer) if z_is_known else None
    reader = _reader(layer, later)
    grad_a = None if reader is None else _grad_a(reader, layer, delta, slope)
    zeros = _zeros(delta, slope, grad_a)
    above = reader or (later[0] if later else None)
    above_norm = None if above is None else norm_of(_rows(above, "delta"))
    grad_a_norm = None if grad_a is None else norm_of(grad_a)
    grad_norm = None if layer.grad_w is None else norm_of(layer.grad_w)
    update = None if learning_rate is None or grad_norm is None else learning_rate * grad_norm
    return LayerDiagnostics(
        name=layer.name,
        delta_norm=delta_norm,
        ratio=_over(delta_norm, above_norm),
        by_w=_over(grad_a_norm, above_norm),
        by_sigma=_over(delta_norm, grad_a_norm),
        mean_prime=None if slope is None else _mean(slope.prime),
        saturated=None if slope is None else _mean(slope.is_saturated()),
        passed=None if slope is None else _passed(delta, slope, grad_a),
        off=None if slope is None else _mean((slope.prime == 0).all(0)) if len(delta) else 0.0,
        zeros=_mean(delta == 0),
        zeros_rounded=_mean(zeros.rounded),
        zeros_from_above=_mean(zeros.from_above),
        zeros_off=_mean(zeros.off),
        nonfinite=_nonfinite(
            {"w": layer.w} | ({"z": z, "a": a} if z_is_known else {}) | {"δ": delta}
        ),
        grad_norm=grad_norm,
        update=_over(update, norm_of(layer.w)),
        dead_inputs=None if any(call.changed for call in layer.calls) else _dead(a_prev),
        verdict="",
    )


class _Slope(NamedTuple):
    """σ' of a layer's activations, one row for each of δ."""

    prime: Tensor  # from z, exact
    is_lost: Tensor  # whether in terms of a, as a backward has it, it is rounded to 0
    least: float  # that it can come close to
    largest: float  # that it can be

    def is_saturated(self) -> Tensor:
        # Where it stays above 0 for good, as a LeakyReLU's does, nothing saturates.
        is_small = (self.prime > 0) & (self.prime < SATURATED * self.largest)
        return is_small if self.least == 0 else torch.zeros_like(is_small)


def _slope(layer: LayerTrace) -> _Slope | None:
    """None where no known activation follows, each time that the layer ran."""
    if not all(call.activations for call in layer.calls):
        return None
    slopes = [_slope_of(call) for call in layer.calls]
    return _Slope(
        prime=torch.cat([slope.prime for slope in slopes]),
        is_lost=torch.cat([slope.is_lost for slope in slopes]),
        least=min(slope.least for slope in slopes),
        largest=max(slope.largest for slope in slopes),
    )


def _slope_of(call: Call) -> _Slope:
    z = as_rows(call.z)
    prime = torch.ones_like(wide(z))
    is_lost = torch.zeros_like(z, dtype=torch.bool)
    least = largest = 1.0
    for activation in call.activations:
        a = activation.forward(z)
        exact = activation.sigma_prime_from_z(wide(z))
        prime = prime * exact
        is_lost |= (_prime_in_terms_of(a, activation, exact) == 0) & (exact > 0)
        least *= activation.slope_bounds[0]
        largest *= activation.slope_bounds[1]
        z = a
    return _Slope(prime, is_lost, least, largest)


def _prime_in_terms_of(a: Tensor, activation: Activation, exact: Tensor) -> Tensor:
    try:
        return activation.sigma_prime(a)
    except ValueError:  # a Softplus from whose a the slope does not follow keeps z instead
        return exact


def _passed(delta: Tensor, slope: _Slope, grad_a: Tensor | None) -> float | None:
    """How much of the error σ' lets pass; where not known, what came follows from what passed."""
    came = delta.double() / slope.prime if grad_a is None else grad_a
    share = _over(norm_of(delta), norm_of(came.where(slope.prime > 0, 0)))
    return None if share is None else share / slope.largest


class _Zeros(NamedTuple):
    """Where δ is exactly 0, and why."""

    rounded: Tensor
    from_above: Tensor
    off: Tensor


def _zeros(delta: Tensor, slope: _Slope | None, grad_a: Tensor | None) -> _Zeros:
    zero = delta == 0
    off = zero & (slope.prime == 0) if slope else torch.zeros_like(zero)
    if grad_a is not None:
        off &= grad_a != 0  # where nothing came, σ' is not to blame
        was_rounded = grad_a != 0
    elif slope is not None:
        was_rounded = slope.is_lost  # what reached a is not known, but could not have passed
    else:
        return _Zeros(*[torch.zeros_like(zero)] * 3)  # an activation that is not known may be off
    return _Zeros(zero & ~off & was_rounded, zero & ~off & ~was_rounded, off)


def _reader(layer: LayerTrace, later: Sequence[LayerTrace]) -> LayerTrace | None:
    """The later layer that takes this one's a for its input, as it is; both ran once."""
    if len(layer.calls) != 1:
        return None
    for other in later:
        if len(other.calls) == 1 and _is_same_memory(layer.a, other.a_prev):
            return other
    return None


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _grad_a(
    reader: LayerTrace, layer: LayerTrace, delta: Tensor, slope: _Slope | None
) -> Tensor | None:
    """wᵀδ^(l+1), if it is all that reached a and ⊙ σ' makes δ^l of it: if BP2 holds here."""
    grad_a = _rows(reader, "delta").to(delta.dtype) @ reader.w.to(delta.dtype)  # BP2: wᵀδ
    dtype = layer.delta.dtype
    share = 0.001 if dtype in (torch.float32, torch.float64) else 0.05
    # σ' in terms of a is exact but for some units of rounding in a.
    rounding = 8 * torch.finfo(dtype).eps * (slope.largest if slope else 1) * norm_of(grad_a)
    difference = delta - grad_a * (slope.prime if slope else 1)
    return grad_a if norm_of(difference) <= share * norm_of(delta) + rounding else None


def _nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int((~t.isfinite()).sum()) for name, t in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def _dead(a_prev: Tensor) -> float:
    if not len(a_prev):
        return 0.0
    root_mean_square = norm_of(a_prev) / math.sqrt(max(1, a_prev.numel()))
    return _mean(a_prev.abs().amax(0) <= DEAD * root_mean_square)


def _verdict(layers: Sequence[LayerDiagnostics], trace: LayerTrace) -> str:
    """What is to be said of the first of these, which is of that trace; the others are above it."""
    layer, last = layers[0], layers[-1]
    rows = sum(as_rows(call.delta).shape[0] for call in trace.calls)
    if not rows:
        return "has seen no sample"
    if layer.nonfinite:
        counts = ", ".join(f"{count} of {name}" for name, count in layer.nonfinite.items())
        return f"is broken: not finite: {counts}"
    if not (trace.learns_w or trace.learns_b) and trace.w_is_leaf:
        return "is frozen"
    if not trace.w.numel() and not (len(trace.w) and trace.learns_b):
        return "has no weights"
    if layer.zeros == 1:
        return f"does not learn: {_why_all_zero(layer)}"
    if layer.grad_norm == 0 and trace.w.numel():
        return "does not learn: its inputs are 0 wherever an error is"
    if (
        layer.saturated is not None
        and layer.saturated >= MOST
        and (len(layers) > 1 or (layer.passed is not None and layer.passed < PASSED))
    ):
        hint = "" if len(layers) > 1 else ", which in the last layer is well if the cost is low"
        return f"learns slowly: {_share(layer.saturated)} of its neurons are saturated{hint}"
    smaller = _over(last.delta_norm, layer.delta_norm) or 0
    if smaller > FAR:
        fading = f"its error is {_number(smaller)} times smaller than the last layer's"
        return f"learns slowly: {fading}{_cause(layers, min)}"
    larger = _over(layer.delta_norm, last.delta_norm) or 0
    if larger > FAR:
        growth = f"its error is {_number(larger)} times larger than the last layer's"
        return f"is unsteady: {growth}{_cause(layers, max)}"
    if layer.off is not None and layer.off >= MANY and rows >= ENOUGH:
        return f"learns in part: {_share(layer.off)} of its neurons are off for every sample"
    if layer.update is not None and layer.update > LEAP:
        return f"leaps: one update is {_number(layer.update)} times its weights"
    if layer.dead_inputs is not None and layer.dead_inputs >= MANY and rows >= ENOUGH:
        return f"learns in part: {_share(layer.dead_inputs)} of its inputs are near 0"
    return "learns"


def _why_all_zero(layer: LayerDiagnostics) -> str:
    reasons = {
        "σ' of its neurons is rounded to 0": layer.zeros_rounded,
        "all its neurons are off": layer.zeros_off,
        "no error comes from above": layer.zeros_from_above,
    }
    reason = max(reasons, key=lambda reason: reasons[reason])
    unknown = "no error comes from above, or an activation that is not known is off"
    return reason if reasons[reason] else unknown


def _cause(layers: Sequence[LayerDiagnostics], worst: Callable[..., float]) -> str:
    """Which factor of BP2 did most of it from the last layer down to here; "" if not known."""
    by_w = [layer.by_w for layer in layers[:-1] if layer.by_w]
    by_sigma = [layer.by_sigma for layer in layers[:-1] if layer.by_sigma]
    if len(by_w) < len(layers) - 1 or len(by_sigma) < len(by_w):
        return ""
    w, sigma = (sum(map(math.log, factors)) for factors in (by_w, by_sigma))
    name = "wᵀ" if worst(w, sigma) == w else "σ'"
    return f", most of it by {name}"


def _rows(layer: LayerTrace, name: str) -> Tensor:
    """a_prev, z, a or delta of all calls, (rows, components), in at least single precision."""
    return wide(torch.cat([as_rows(getattr(call, name)) for call in layer.calls]))


def _mean(t: Tensor) -> float:
    return t.double().mean().item() if t.numel() else 0.0


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
