"""What must hold for the other checks to mean anything."""

from typing import Any

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._global_state import filled_memory
from manual_bp.verify._precision import widen
from manual_bp.verify.checks._shared import UNWRITTEN

_RANDOM = (
    "random, or it remembers earlier calls: draw random numbers outside the call and pass them as "
    "an argument, or seed them inside it"
)


def _require_no_blind_spot(ctx: CheckContext) -> None:
    if reason := ctx.blind_spot():
        raise Mismatch(f"{reason}, so a mistake would not show\ndiagnosis: unsuitable samples")


@check(after_all=_require_no_blind_spot)
def informative_samples(ctx: CheckContext, sample: Sample) -> None:  # noqa: ARG001
    """No gradient is zero, empty or of one element at all samples: a mistake would show."""
    ctx.comparisons += 1


@check()
def deterministic(ctx: CheckContext, sample: Sample) -> None:
    """Two calls with the same arguments agree, but for rounding."""
    upstream = ctx.upstream(ctx.call, sample)
    kept = [u.clone() for u in upstream]  # writes_nothing finds a backward that changes it
    first, expected = gradients(ctx.call, leaves(sample), kept)
    second, found = gradients(ctx.call, leaves(sample), upstream)
    try:
        ctx.compare_outputs(second, first, " of a second call")
        ctx.compare_gradients(sample, found, expected, " of a second call")
    except Mismatch as mismatch:
        ctx.calls_differ = True
        with filled_memory():
            filled, of_filled = gradients(ctx.call, leaves(sample), kept)
        is_written = not _has_nan(filled, of_filled) or _has_nan(first, expected)
        raise mismatch.diagnosed(_RANDOM if is_written else UNWRITTEN) from None
    apart = max(
        _furthest(second, first), _furthest(tuple(found.values()), tuple(expected.values()))
    )
    if apart:
        ctx.notes.append(
            f"two calls differ by up to {apart:.2g} of the largest element, as sums in another "
            f"order do"
        )


def _has_nan(result: Any, found: Gradients) -> bool:
    return any(bool(t.isnan().any()) for t in outputs_of((result, list(found.values()))))


def _furthest(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest element of the same tensor."""
    shares = [0.0]
    for one, other in zip(outputs_of(got), outputs_of(expected), strict=True):
        difference = (widen(one) - widen(other)).abs()
        shares.append(largest(difference) / (largest(other) or 1.0))
    return max(shares)
