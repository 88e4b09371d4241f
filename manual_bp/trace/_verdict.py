"""How well a layer learns, and if not, why: one line, judged from its numbers."""

import math
from collections.abc import Callable, Sequence

from manual_bp.layers._affine import as_rows
from manual_bp.trace._diagnostics import LayerDiagnostics, number, percent, quotient
from manual_bp.trace._layer import LayerTrace

# The verdict is about saturation if at least this fraction of the neurons is saturated. Of 250
# small nets on scikit-learn's datasets, those that had learned well had hidden layers with up to
# 87 % saturated; those stopped by a saturated hidden layer had 93 % and more.
MOST = 0.9
# The last layer should saturate where it is right. So its verdict is about saturation only if less
# than this fraction of the error also passes σ'. Over all training samples, 4 % and more passed in
# nets that had learned, and 0.02 % and less in those that had stopped.
PASSED = 0.01
# The verdict is about neurons that are off, or about dead inputs, from this fraction on.
MANY = 0.5
# The verdict is about the size of the error if it is more than this many times smaller or larger
# than the last layer's.
FAR = 1000.0
# How many rows of δ it takes to conclude that something holds in all of them.
ENOUGH = 8
# An update more than this many times as large as the weights is a leap. Layers start with small
# weights: in nets that learned well, the first update was up to 6 times as large.
LEAP = 10.0


def verdict_on(trace: LayerTrace, layers: Sequence[LayerDiagnostics]) -> str:
    """The verdict on a layer, from its own numbers, the first of layers, and those above it."""
    layer, last = layers[0], layers[-1]
    rows = sum(as_rows(call.delta).shape[0] for call in trace.calls)
    if not rows:
        return "saw no samples"
    if layer.nonfinite:
        counts = ", ".join(f"{count} in {name}" for name, count in layer.nonfinite.items())
        return f"is broken: not finite: {counts}"
    if not (trace.learns_w or trace.learns_b) and trace.w_is_leaf:
        return "is frozen"
    if not trace.w.numel() and not (len(trace.w) and trace.learns_b):
        return "has no weights"
    if layer.zeros == 1:
        return f"does not learn: {_why_all_zero(layer)}"
    if layer.grad_norm == 0 and trace.w.numel():
        return "does not learn: its inputs are 0 wherever its error is not"
    if (
        layer.saturated is not None
        and layer.saturated >= MOST
        and (len(layers) > 1 or (layer.passed is not None and layer.passed < PASSED))
    ):
        hint = "" if len(layers) > 1 else ", which is fine in the last layer if the cost is low"
        return f"learns slowly: {percent(layer.saturated)} of its neurons are saturated{hint}"
    smaller = quotient(last.delta_norm, layer.delta_norm) or 0
    if smaller > FAR:
        fading = f"its error is {number(smaller)} times smaller than the last layer's"
        return f"learns slowly: {fading}{_cause(layers, min)}"
    larger = quotient(layer.delta_norm, last.delta_norm) or 0
    if larger > FAR:
        growth = f"its error is {number(larger)} times larger than the last layer's"
        return f"is unstable: {growth}{_cause(layers, max)}"
    if layer.off is not None and layer.off >= MANY and rows >= ENOUGH:
        return f"learns in part: {percent(layer.off)} of its neurons are off for every sample"
    if layer.update is not None and layer.update > LEAP:
        return f"leaps: one update is {number(layer.update)} times as large as its weights"
    if layer.dead_inputs is not None and layer.dead_inputs >= MANY and rows >= ENOUGH:
        return f"learns in part: {percent(layer.dead_inputs)} of its inputs are near 0"
    return "learns"


def _why_all_zero(layer: LayerDiagnostics) -> str:
    reasons = {
        "σ' of its neurons is rounded to 0": layer.zeros_rounded,
        "all its neurons are off": layer.zeros_off,
        "no error comes from above": layer.zeros_from_above,
    }
    reason = max(reasons, key=lambda reason: reasons[reason])
    unknown = "no error comes from above, or an unknown activation is off"
    return reason if reasons[reason] else unknown


def _cause(layers: Sequence[LayerDiagnostics], worst: Callable[..., float]) -> str:
    """Which factor of BP2 did most from the last layer down to the first of these; "" if unknown.

    worst: min if the error fades on its way down, max if it grows.
    """
    by_w = [layer.by_w for layer in layers[:-1] if layer.by_w]
    by_sigma_prime = [layer.by_sigma_prime for layer in layers[:-1] if layer.by_sigma_prime]
    if len(by_w) < len(layers) - 1 or len(by_sigma_prime) < len(by_w):
        return ""
    # As sums of logarithms, since the products may be too small for a float.
    w, sigma_prime = (sum(map(math.log, factors)) for factors in (by_w, by_sigma_prime))
    factor = "wᵀ" if worst(w, sigma_prime) == w else "σ'"
    return f", mostly because of {factor}"
