"""How well each layer learns, read off its pairs (a, δ), and why not.

The equations name what can go wrong. BP2 makes δ^l of δ^(l+1) in two steps, ·w and ⊙ σ'; each has
its share in how fast an error fades or grows on its way down. σ' ≈ 0 is a saturated neuron. BP4
multiplies δ with a^(l-1): where that is near 0, weights hardly move.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from manual_bp import _require
from manual_bp._autocast import without_autocast
from manual_bp.layers._activation import Activation
from manual_bp.layers._affine import as_rows
from manual_bp.trace._call import Call, wide
from manual_bp.trace._diagnostics import Diagnostics, LayerDiagnostics, _over
from manual_bp.trace._layer import LayerTrace
from manual_bp.trace._per_sample import norm_of
from manual_bp.trace._verdict import _verdict

# A neuron is saturated, for a sample, if its σ' is less than this share of the largest possible.
SATURATED = 0.05
# An input is dead if it never has this share of the inputs' root mean square.
DEAD = 0.01


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


def _rows(layer: LayerTrace, name: str) -> Tensor:
    """a_prev, z, a or delta of all calls, (rows, components), in at least single precision."""
    return wide(torch.cat([as_rows(getattr(call, name)) for call in layer.calls]))


def _mean(t: Tensor) -> float:
    return t.double().mean().item() if t.numel() else 0.0
