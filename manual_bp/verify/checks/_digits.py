"""Whether results were rounded to a lower precision on the way."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import CheckContext

_STEP = 2.0**-20  # relative: 8 units in the last place of float32
_NOISE = 1e-8  # relative: float32 has an error of 6e-8

Named = dict[str, Tensor]


def results_of(ctx: CheckContext, call: Call, sample: Sample, upstream: Sequence[Tensor]) -> Named:
    """The outputs and the gradients of a call, by their names in messages."""
    result, found = gradients(call, leaves(sample), upstream)
    outputs = {f"output {i}": t.detach() for i, t in enumerate(outputs_of(result))}
    return outputs | {f"gradient of {ctx.label(i)}": g for i, g in found.items() if g is not None}


def small_steps(ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor]) -> dict[int, Tensor]:
    """Steps of a few units in the last place of float32, by position in (*sample, *upstream)."""
    tensors = (*sample, *upstream)
    moved = [*positions(sample), *range(len(sample), len(tensors))]
    return {i: _STEP * ctx.random_like(tensors[i]) * tensors[i] for i in moved}


def noise_of_float32(
    ctx: CheckContext,
    call: Call,
    sample: Sample,
    upstream: Sequence[Tensor],
    small: Mapping[int, Tensor],
) -> dict[str, float]:
    """Which outputs and gradients have the noise of float32, and how much of the largest element.

    Over a few units in the last place of float32 a smooth function is nearly a straight line: its
    second difference is tiny, and grows 16 times with 4 times the step. Rounding to float32 makes
    it jump by the rounding error, whatever the step.

    small: The steps, of `small_steps`. Two calls are alike only if they move by the same.
    """
    tensors = (*sample, *upstream)

    def at(steps: int) -> Named:
        shifted = [t + steps * small[i] if i in small else t for i, t in enumerate(tensors)]
        arguments = ctx.in_domain(tuple(shifted[: len(sample)]))
        return results_of(ctx, call, arguments, shifted[len(sample) :])

    here = at(0)
    near, far = (_second_differences(at(-steps), here, at(steps)) for steps in (1, 4))
    return {name: n for name, n in near.items() if n > _NOISE and far[name] < 3 * n}


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
    if not name or not _NOISE / 10 < errors[name] < 1e-5:
        return False
    small = small_steps(ctx, sample, upstream)
    return name in noise_of_float32(ctx, ctx.call, sample, upstream, small)


def _second_differences(behind: Named, here: Named, ahead: Named) -> dict[str, float]:
    """The largest second difference of each tensor, relative to its largest element."""
    return {
        name: largest(behind[name] - 2 * t + ahead[name]) / largest(t)
        for name, t in here.items()
        if largest(t)
    }
