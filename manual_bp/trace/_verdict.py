"""What the numbers of a layer say of how well it learns, in a line."""

import math
from collections.abc import Callable, Sequence

from manual_bp.layers._affine import as_rows
from manual_bp.trace._diagnostics import LayerDiagnostics, _number, _over, _share
from manual_bp.trace._layer import LayerTrace

# The share of a layer's neurons from which on the verdict is about saturation. Of 250 small nets on
# scikit-learn's datasets, those that had learned well had hidden layers saturated up to 87 %; those
# that a saturated hidden layer had stopped, 93 % and more.
MOST = 0.9
# The last layer saturates where it is right, as it should. So its verdict is about saturation only
# if less than this share of the error passes σ': over all training samples, 4 % and more did in
# nets that had learned; in those that had stopped, 0.02 % and less.
PASSED = 0.01
# The share of a layer's neurons or inputs from which on the verdict is about them.
MANY = 0.5
# How many times smaller or larger than the last layer's an error has to be for a verdict about it.
FAR = 1000.0
# How many rows of δ it takes to say that something is so in all of them.
ENOUGH = 8
# How many times its weights an update may be before it is a leap. Layers start with small weights:
# in nets that learned well the first update was up to 6 times as large.
LEAP = 10.0


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
