"""Lower precision than float64."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    gradients_of,
    leaves,
    outputs_of,
)
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, STATE, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._diagnose import DEMOTED
from manual_bp.verify._precision import exact, narrowest
from manual_bp.verify.checks._digits import TO_FLOAT32, TO_HALF, noise_of_rounding, small_steps
from manual_bp.verify.checks._kinks import compare_except_at_kinks
from manual_bp.verify.checks._shared import (
    cast,
    compare_raw,
    require_dtype,
    require_real,
)

_HALF = "rounded to half precision on the way; a call that does so on purpose names its dtypes"


@check(builds_on=("writes_nothing", "deterministic"))
def full_precision(ctx: CheckContext, sample: Sample) -> None:
    """Nothing is rounded on the way: neighboring arguments give neighboring results."""
    if narrowest(sample) is not None:
        raise NotApplicable("the sample is not in float64")
    upstream = ctx.upstream(ctx.call, sample)
    for to, diagnosis in ((TO_HALF, _HALF), (TO_FLOAT32, DEMOTED)):
        small = small_steps(ctx, sample, upstream, to)
        noise = noise_of_rounding(ctx, ctx.call, sample, upstream, small, to)
        ctx.comparisons += 1
        if noise and ctx.case.reference is not None:
            theirs = noise_of_rounding(ctx, ctx.case.reference, sample, upstream, small, to)
            noise = {name: share for name, share in noise.items() if name not in theirs}
        if noise:
            name, share = next(iter(noise.items()))
            raise Mismatch(
                f"{name}: expected a change in proportion to that of the arguments, got jumps of "
                f"{share:.1e} of the largest element\ndiagnosis: {diagnosis}"
            )


@check(capability=True, builds_on=(*SLOPE, *STATE, "raw_backward"))
def float32(ctx: CheckContext, sample: Sample) -> None:
    """In float32 the error is that of the reference in float32, and rounding."""
    _compare_in(ctx, sample, torch.float32)


@check(capability=True, builds_on=(*SLOPE, *STATE, "raw_backward", "float32"))
def bfloat16(ctx: CheckContext, sample: Sample) -> None:
    """In bfloat16 the error is that of the reference in bfloat16, and rounding."""
    _compare_in(ctx, sample, torch.bfloat16)


@check(capability=True, builds_on=(*SLOPE, *STATE, "raw_backward", "float32", "bfloat16"))
def float16(ctx: CheckContext, sample: Sample) -> None:
    """In float16 the error is that of the reference in float16, and rounding."""
    _compare_in(ctx, sample, torch.float16)


@check(capability=True, builds_on=(*SLOPE, *STATE, "raw_backward", "float32", "bfloat16"))
def autocast(ctx: CheckContext, sample: Sample) -> None:
    """Under autocast the dtypes match the reference, and backward works outside the region."""
    require_real(sample)
    if narrowest(sample) not in (None, torch.float32):
        raise NotApplicable("autocast changes nothing in half precision")
    low = ctx.in_domain(cast(sample, torch.float32))
    results: list[Any] = []
    for call in (ctx.call, ctx.reference):
        arguments = leaves(low)
        with torch.autocast(ctx.case.device.type, torch.bfloat16):
            result = call(*arguments)
        outputs = outputs_of(result)
        if not results:
            compare_raw(ctx, arguments, result)
            # Random, since a gradient for ones may cancel to zero.
            upstream = [ctx.random_like(t) for t in outputs]
        given = [u.to(t.dtype) for u, t in zip(upstream, outputs, strict=True)]
        results.append((outputs, gradients_of(result, arguments, given)))
    (outputs, found), (expected_outputs, expected) = results
    right, slopes = exact(ctx.reference, low, upstream)
    for got, peer, wide in zip(outputs, expected_outputs, outputs_of(right), strict=True):
        _compare_close(ctx, "output under autocast", got, peer, wide)
    for i, peer in expected.items():
        one, slope = found[i], slopes[i]
        if one is not None and peer is not None and slope is not None:
            _compare_close(ctx, f"gradient of {ctx.label(i)} under autocast", one, peer, slope)


def _compare_in(ctx: CheckContext, sample: Sample, dtype: torch.dtype) -> None:
    require_real(sample)
    if narrowest(sample) is not None:
        raise NotApplicable("the case names its dtypes, and all other checks judge it in them")
    ctx.reference  # noqa: B018 (raises if there is none)
    low = ctx.in_domain(cast(sample, dtype))
    arguments = leaves(low)
    compare_raw(ctx, arguments, ctx.call(*arguments))
    # Rounding may move an argument to a kink.
    compare_except_at_kinks(ctx, low, f" in {dtype}", is_cast=True)


def _compare_close(
    ctx: CheckContext, what: str, got: Tensor, expected: Tensor, right: Tensor
) -> None:
    """Compare with the reference under autocast; where sums cancel, by what it loses itself."""
    ctx.comparisons += 1
    if "autocast" in ctx.case.supports:
        require_dtype(what, got.dtype, expected.dtype, same_dtype=True)
    got, expected = got.detach().double(), expected.detach().double()
    lost = (expected - right.detach()).norm()
    if (got - expected).norm() > max(2e-2 * expected.norm(), 4 * lost) + 1e-6:
        raise Mismatch(f"{what}: further from the reference than bfloat16 explains")
