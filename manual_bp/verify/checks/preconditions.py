"""What must hold for the other checks to mean anything."""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, tensors_of
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._context import CheckContext
from manual_bp.verify._evidence import blind_spot
from manual_bp.verify._global_state import filled_memory
from manual_bp.verify._precision import widen
from manual_bp.verify.checks._shared import TO_GRADIENT_OF, UNWRITTEN

_Call = tuple[tuple[Tensor, ...], Gradients]

# Enough to see a call that is wrong now and then; fewer if they are slow.
_CALLS = 8
_SECONDS = 0.5


def _require_no_blind_spot(ctx: CheckContext) -> None:
    if reason := blind_spot(ctx):
        why = "unsuitable samples"
        if ctx.case.reference is not None and not blind_spot(ctx, of_call=True):
            why = f"the call has a gradient where the reference has none: {TO_GRADIENT_OF}"
        raise Mismatch(f"{reason}, so a mistake would not show\ndiagnosis: {why}")


@check(after_all=_require_no_blind_spot, builds_on=("deterministic", "finite_differences"))
def informative_samples(ctx: CheckContext, sample: Sample) -> None:  # noqa: ARG001
    """No gradient is zero, empty or of one element at all samples: a mistake would show."""
    ctx.comparisons += 1


@check()
def deterministic(ctx: CheckContext, sample: Sample) -> None:
    """Several calls with the same arguments agree, but for rounding."""
    calls = _repeated(ctx, sample)
    for other in calls[1:]:
        try:
            _compare_calls(ctx, sample, other, calls[0])
        except Mismatch as mismatch:
            ctx.calls_differ = True
            is_unwritten = _reads_unwritten(ctx, sample, calls)
            why = UNWRITTEN if is_unwritten else _why_they_differ(ctx, sample, calls)
            raise mismatch.diagnosed(why) from None
    apart = max(_furthest(other, calls[0]) for other in calls[1:])
    if apart:
        ctx.notes.append(
            f"two calls differ by up to {apart:.2g} of the largest element, as sums in another "
            f"order do"
        )


def _repeated(ctx: CheckContext, sample: Sample) -> list[_Call]:
    """Outputs and gradients of at least two calls; of more, if there is time."""
    upstream = ctx.upstream(ctx.call, sample)
    calls: list[_Call] = []
    started = time.monotonic()
    while len(calls) < 2 or (len(calls) < _CALLS and time.monotonic() - started < _SECONDS):
        kept = [u.clone() for u in upstream]  # writes_nothing finds a backward that changes it
        result, found = gradients(ctx.call, leaves(sample), kept)
        outputs = tuple(t.detach().clone() for t in tensors_of(result))
        calls.append((outputs, {i: None if g is None else g.clone() for i, g in found.items()}))
    return calls


def _compare_calls(ctx: CheckContext, sample: Sample, got: _Call, expected: _Call) -> None:
    ctx.compare_outputs(got[0], expected[0], " of another call")
    ctx.compare_gradients(sample, got[1], expected[1], " of another call")


def _why_they_differ(ctx: CheckContext, sample: Sample, calls: Sequence[_Call]) -> str:
    """Whether calls are random, are wrong now and then, or remember earlier ones."""

    def agree(one: _Call, other: _Call) -> bool:
        try:
            _compare_calls(ctx, sample, one, other)
        except Mismatch:
            return False
        return True

    # For each call the first one with which it agrees.
    peers = [next(k for k, one in enumerate(calls) if agree(call, one)) for call in calls]
    count, (_, most) = len(calls), Counter(peers).most_common(1)[0]
    if count > 2 and len(set(peers)) == 2 and peers == sorted(peers):
        return (
            f"it remembers earlier calls: it gives something else from call {peers.count(0) + 1} on"
        )
    if 2 * most > count:
        return f"flaky: {count - most} of {count} calls differ from the others"
    if count > 2 and _grows(calls):
        return "it remembers earlier calls: each adds the same to what the one before gave"
    outputs_agree = all(agree((call[0], {}), (calls[0][0], {})) for call in calls)
    part = "backward" if outputs_agree else "forward"
    return (
        f"random, or it remembers earlier calls, in {part}: draw random numbers outside the call "
        f"and pass them as an argument, or seed them inside it"
    )


def _reads_unwritten(ctx: CheckContext, sample: Sample, calls: Sequence[_Call]) -> bool:
    """Whether a call gives nan once new memory is filled with it, and did not before."""
    if any(_flat(call).isnan().any() for call in calls):
        return False
    with filled_memory():
        result, found = gradients(ctx.call, leaves(sample), ctx.upstream(ctx.call, sample))
    return bool(_flat((tensors_of(result), found)).isnan().any())


def _grows(calls: Sequence[_Call]) -> bool:
    """Whether the first three calls differ by equal steps."""
    first, second, third = (_flat(call) for call in calls[:3])
    step = second - first
    return bool(((third - second - step).norm() < 1e-6 * step.norm()).item())


def _flat(call: _Call) -> Tensor:
    outputs, found = call
    tensors = [t for t in (*outputs, *found.values()) if t is not None and is_differentiable(t)]
    return torch.cat([torch.view_as_real(widen(t).to(torch.complex128)).flatten() for t in tensors])


def _furthest(got: _Call, expected: _Call) -> float:
    """The largest difference, relative to the largest element of the same tensor."""
    shares = [0.0]
    ours, theirs = (outputs_of((call[0], list(call[1].values()))) for call in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        difference = (widen(one) - widen(other)).abs()
        shares.append(largest(difference) / (largest(other) or 1.0))
    return max(shares)
