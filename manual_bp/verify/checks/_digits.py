"""Whether results were rounded to a lower precision on the way."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import narrowest

Named = dict[str, Tensor]

_HIDDEN = (
    "no reference, and the call rounds to half precision on the way, or loses as much: how much is "
    "right is not known"
)


@dataclass(frozen=True)
class Rounding:
    """How rounding to a lower precision is recognized: all numbers are relative.

    step: Some units in the last place.
    least, most: How large the noise is.
    """

    step: float
    least: float
    most: float


TO_FLOAT32 = Rounding(2.0**-20, 1e-8, 1.0)
# To float16 or bfloat16. What jumps by more has a reason, such as a threshold.
TO_HALF = Rounding(2.0**-9, 2e-5, 2e-2)


def results_of(ctx: CheckContext, call: Call, sample: Sample, upstream: Sequence[Tensor]) -> Named:
    """The outputs and the gradients of a call, by their names in messages."""
    result, found = gradients(call, leaves(sample), upstream)
    outputs = {f"output {i}": t.detach() for i, t in enumerate(outputs_of(result))}
    return outputs | {f"gradient of {ctx.label(i)}": g for i, g in found.items() if g is not None}


def small_steps(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], to: Rounding
) -> dict[int, Tensor]:
    """Steps of a few units in the last place, by position in (*sample, *upstream)."""
    tensors = (*sample, *upstream)
    moved = [*positions(sample), *range(len(sample), len(tensors))]
    return {i: to.step * ctx.random_like(tensors[i]) * tensors[i] for i in moved}


def noise_of_rounding(
    ctx: CheckContext,
    call: Call,
    sample: Sample,
    upstream: Sequence[Tensor],
    small: Mapping[int, Tensor],
    to: Rounding,
) -> dict[str, float]:
    """Which outputs and gradients have the noise of rounding, and how much of the largest element.

    Over a few units in the last place a smooth function is nearly a straight line: its second
    difference is tiny, and grows 16 times with 4 times the step. Rounding makes it jump by the
    rounding error, whatever the step.

    small: The steps, of `small_steps`. Two calls are alike only if they move by the same.
    """
    tensors = (*sample, *upstream)

    def at(steps: int) -> Named:
        shifted = [t + steps * small[i] if i in small else t for i, t in enumerate(tensors)]
        arguments = ctx.in_domain(tuple(shifted[: len(sample)]))
        return results_of(ctx, call, arguments, shifted[len(sample) :])

    here = at(0)
    near, far = (_second_differences(at(-steps), here, at(steps)) for steps in (1, 4))
    return {name: n for name, n in near.items() if to.least < n < to.most and far[name] < 3 * n}


@contextmanager
def asking_no_more_than_half(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor]
) -> Iterator[None]:
    """A region in which nothing is asked if a call in float32 rounds to half precision.

    Nor if it loses digits because numbers cancel. Without a reference it is not known how many.
    """
    try:
        yield
    except Mismatch:
        for step in (TO_HALF.step, TO_FLOAT32.step):
            if rounds_to_half(ctx, sample, upstream, replace(TO_HALF, step=step, least=1e-6)):
                raise NotApplicable(_HIDDEN) from None
        raise


def rounds_to_half(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], to: Rounding = TO_HALF
) -> bool:
    """Whether a call in float32, without a reference, rounds to half precision on the way."""
    if ctx.case.reference is not None or narrowest(sample) is not torch.float32:
        return False
    small = small_steps(ctx, sample, upstream, to)
    return bool(noise_of_rounding(ctx, ctx.call, sample, upstream, small, to))


def is_demoted(
    ctx: CheckContext,
    sample: Sample,
    upstream: Sequence[Tensor],
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> bool:
    """Whether results are right to about seven digits, and have the noise of float32."""
    errors = {
        name: largest(got[name] - right) / largest(right)
        for name, right in expected.items()
        if name in got and got[name].shape == right.shape and largest(right)
    }
    name = max(errors, key=lambda name: errors[name], default="")
    if not name or not TO_FLOAT32.least / 10 < errors[name] < 1e-5:
        return False
    small = small_steps(ctx, sample, upstream, TO_FLOAT32)
    return name in noise_of_rounding(ctx, ctx.call, sample, upstream, small, TO_FLOAT32)


def _second_differences(behind: Named, here: Named, ahead: Named) -> dict[str, float]:
    """The largest second difference of each tensor, relative to its largest element."""
    return {
        name: largest(behind[name] - 2 * t + ahead[name]) / largest(t)
        for name, t in here.items()
        if largest(t)
    }
