"""How well each layer learns, measured from its pairs (a, δ).

The equations name what can go wrong. BP2 turns δ^(l+1) into δ^l in two steps, wᵀ and ⊙ σ', and an
error may fade or grow in either. A neuron with σ' ≈ 0 is saturated. BP4 multiplies δ by a^(l-1):
where that is near 0, weights hardly move.
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
from manual_bp.trace._call import Call, at_least_float32, memory_of
from manual_bp.trace._diagnostics import Diagnostics, LayerDiagnostics, quotient
from manual_bp.trace._layer import LayerTrace
from manual_bp.trace._per_sample import norm_of
from manual_bp.trace._verdict import verdict_on

# A neuron is saturated for a sample if its σ' is less than this fraction of the largest possible.
SATURATED = 0.05
# An input is dead if it is never above this fraction of the root mean square of all inputs.
DEAD = 0.01


@torch.no_grad()
def diagnose(
    layers: Sequence[LayerTrace], learning_rate: float | None, elsewhere: tuple[str, ...]
) -> Diagnostics:
    """The numbers and the verdict of every layer of a trace, in forward order."""
    if learning_rate is not None:
        _require.above("learning_rate", learning_rate, 0)
    for layer in layers:
        layer.require_unchanged()
    with without_autocast(layers[0].w):
        found = [_measured(layer, layers[i + 1 :], learning_rate) for i, layer in enumerate(layers)]
    verdicts = [verdict_on(layer, found[i:]) for i, layer in enumerate(layers)]
    return Diagnostics(
        tuple(replace(d, verdict=verdict) for d, verdict in zip(found, verdicts, strict=True)),
        elsewhere,
    )


def _measured(
    layer: LayerTrace, later: Sequence[LayerTrace], learning_rate: float | None
) -> LayerDiagnostics:
    _require.real(f"the output of layer {layer.name!r}", layer.calls[0].z)
    a_prev, z, a, delta = (_rows(layer, name) for name in ("a_prev", "z", "a", "delta"))
    delta_norm, grad_norm = norm_of(delta), _norm(layer.grad_w)
    z_is_known = all(call.z_is_known for call in layer.calls)
    sigma_prime = _sigma_prime(layer) if z_is_known else None
    reader = _reader(layer, later)
    grad_a = None if reader is None else _grad_a(reader, layer, delta, sigma_prime)
    grad_a_norm = _norm(grad_a)
    above = reader or (later[0] if later else None)
    above_norm = None if above is None else norm_of(_rows(above, "delta"))
    zeros_rounded, zeros_from_above, zeros_off = _zeros(delta, sigma_prime, grad_a)
    update = None if learning_rate is None or grad_norm is None else learning_rate * grad_norm
    return LayerDiagnostics(
        name=layer.name,
        delta_norm=delta_norm,
        ratio=quotient(delta_norm, above_norm),
        by_w=quotient(grad_a_norm, above_norm),
        by_sigma_prime=quotient(delta_norm, grad_a_norm),
        mean_sigma_prime=None if sigma_prime is None else _mean(sigma_prime.values),
        saturated=None if sigma_prime is None else sigma_prime.saturated(),
        passed=None if sigma_prime is None else _passed(delta, sigma_prime, grad_a),
        off=None if sigma_prime is None else sigma_prime.off(),
        zeros=_mean(delta == 0),
        zeros_rounded=zeros_rounded,
        zeros_from_above=zeros_from_above,
        zeros_off=zeros_off,
        nonfinite=_nonfinite(
            {"w": layer.w} | ({"z": z, "a": a} if z_is_known else {}) | {"δ": delta}
        ),
        grad_norm=grad_norm,
        update=quotient(update, norm_of(layer.w)),
        dead_inputs=None if any(call.changed for call in layer.calls) else _dead(a_prev),
        verdict="",  # given when all layers are measured
    )


class _SigmaPrime(NamedTuple):
    """σ'(z) of a layer's activations, one row for each row of δ."""

    values: Tensor  # computed from z: 0 only where σ is flat
    is_lost: Tensor  # where σ' in terms of a, as a backward computes it, is rounded to 0
    bounds: tuple[float, float]

    def saturated(self) -> float:
        # If σ' cannot come close to 0, as with a LeakyReLU, nothing saturates.
        least, largest = self.bounds
        is_small = (self.values > 0) & (self.values < SATURATED * largest)
        return _mean(is_small) if least == 0 else 0.0

    def off(self) -> float:
        return _mean((self.values == 0).all(0)) if len(self.values) else 0.0


def _sigma_prime(layer: LayerTrace) -> _SigmaPrime | None:
    """None if in any call no known activation followed."""
    if not all(call.activations for call in layer.calls):
        return None
    values, is_lost, bounds = zip(*map(_sigma_prime_of, layer.calls), strict=True)
    least, largest = zip(*bounds, strict=True)
    return _SigmaPrime(torch.cat(values), torch.cat(is_lost), (min(least), max(largest)))


def _sigma_prime_of(call: Call) -> _SigmaPrime:
    z = as_rows(call.z)
    values = torch.ones_like(at_least_float32(z))
    is_lost = torch.zeros_like(z, dtype=torch.bool)
    least = largest = 1.0
    for activation in call.activations:
        a = activation.forward(z)
        exact = activation.sigma_prime_from_z(at_least_float32(z))
        values = values * exact
        is_lost |= (_sigma_prime_from_a(a, activation, exact) == 0) & (exact > 0)
        least *= activation.slope_bounds[0]
        largest *= activation.slope_bounds[1]
        z = a
    return _SigmaPrime(values, is_lost, (least, largest))


def _sigma_prime_from_a(a: Tensor, activation: Activation, exact: Tensor) -> Tensor:
    try:
        return activation.sigma_prime(a)
    except ValueError:  # a Softplus whose a does not determine σ' keeps z instead
        return exact


def _passed(delta: Tensor, sigma_prime: _SigmaPrime, grad_a: Tensor | None) -> float | None:
    """‖δ‖ / ‖∂C/∂a‖ where σ' is not 0, relative to the largest σ'."""
    values, (_, largest) = sigma_prime.values, sigma_prime.bounds
    if grad_a is None:
        grad_a = delta.double() / values  # BP1 and BP2 solved for ∂C/∂a
    passed = quotient(norm_of(delta), norm_of(grad_a.where(values > 0, 0)))
    return None if passed is None else passed / largest


def _zeros(
    delta: Tensor, sigma_prime: _SigmaPrime | None, grad_a: Tensor | None
) -> tuple[float, float, float]:
    """The fraction of δ that is exactly 0, by reason: rounded, from above, off."""
    zero = delta == 0
    off = zero & (sigma_prime.values == 0) if sigma_prime else torch.zeros_like(zero)
    if grad_a is not None:
        off &= grad_a != 0  # if no error came, σ' is not to blame
        was_rounded = grad_a != 0
    elif sigma_prime is not None:
        was_rounded = sigma_prime.is_lost  # whether an error came is unknown, but none could pass
    else:
        return 0.0, 0.0, 0.0  # an unknown activation may be off
    return _mean(zero & ~off & was_rounded), _mean(zero & ~off & ~was_rounded), _mean(off)


def _reader(layer: LayerTrace, later: Sequence[LayerTrace]) -> LayerTrace | None:
    """The later layer whose input is this layer's a itself, if both ran only once."""
    if len(layer.calls) != 1:
        return None
    for other in later:
        if len(other.calls) == 1 and memory_of(layer.a) == memory_of(other.a_prev):
            return other
    return None


def _grad_a(
    reader: LayerTrace, layer: LayerTrace, delta: Tensor, sigma_prime: _SigmaPrime | None
) -> Tensor | None:
    """wᵀδ^(l+1), if BP2 holds here: if δ^l is that ⊙ σ', up to rounding."""
    grad_a = _rows(reader, "delta").to(delta.dtype) @ reader.w.to(delta.dtype)  # BP2: wᵀδ
    values, largest = (sigma_prime.values, sigma_prime.bounds[1]) if sigma_prime else (1, 1)
    dtype = layer.delta.dtype
    tolerance = 0.001 if dtype in (torch.float32, torch.float64) else 0.05
    # σ' in terms of a is exact up to some units of rounding in a.
    rounding = 8 * torch.finfo(dtype).eps * largest * norm_of(grad_a)
    difference = norm_of(delta - grad_a * values)
    return grad_a if difference <= tolerance * norm_of(delta) + rounding else None


def _nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int((~t.isfinite()).sum()) for name, t in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def _dead(a_prev: Tensor) -> float:
    if not len(a_prev):
        return 0.0
    root_mean_square = norm_of(a_prev) / math.sqrt(max(1, a_prev.numel()))
    return _mean(a_prev.abs().amax(0) <= DEAD * root_mean_square)


def _rows(layer: LayerTrace, name: str) -> Tensor:
    """a_prev, z, a or delta of all calls, (rows, components), in at least float32."""
    return at_least_float32(torch.cat([as_rows(getattr(call, name)) for call in layer.calls]))


def _norm(t: Tensor | None) -> float | None:
    return None if t is None else norm_of(t)


def _mean(t: Tensor) -> float:
    return t.double().mean().item() if t.numel() else 0.0
