"""Lower precision than float64."""

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    gradients_of,
    leaves,
    outputs_of,
)
from manual_bp.verify._case import Sample
from manual_bp.verify._check import SLOPE, STATE, CheckContext, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._precision import narrowest
from manual_bp.verify.checks._shared import (
    cast,
    compare_raw,
    compare_with_reference,
    require_real,
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
    low = cast(sample, torch.float32)
    results = []
    for call in (ctx.call, ctx.reference):
        arguments = leaves(low)
        with torch.autocast(ctx.case.device.type, torch.bfloat16):
            result = call(*arguments)
        ones = [torch.ones_like(t) for t in outputs_of(result)]
        if call is ctx.call:
            compare_raw(ctx, arguments, result)
        results.append((outputs_of(result), gradients_of(result, arguments, ones)))
    (outputs, found), (expected_outputs, expected) = results
    for got, right in zip(outputs, expected_outputs, strict=True):
        _compare_close(ctx, "output under autocast", got, right)
    for i, right_gradient in expected.items():
        gradient = found[i]
        if gradient is not None and right_gradient is not None:
            name = f"gradient of {ctx.label(i)} under autocast"
            _compare_close(ctx, name, gradient, right_gradient)


def _compare_in(ctx: CheckContext, sample: Sample, dtype: torch.dtype) -> None:
    require_real(sample)
    if narrowest(sample) is not None:
        raise NotApplicable("the case names its dtypes, and all other checks judge it in them")
    ctx.reference  # noqa: B018 (raises if there is none)
    low = cast(sample, dtype)
    arguments = leaves(low)
    compare_raw(ctx, arguments, ctx.call(*arguments))
    compare_with_reference(ctx, low, f" in {dtype}", same_dtype=True)


def _compare_close(ctx: CheckContext, what: str, got: Tensor, expected: Tensor) -> None:
    ctx.comparisons += 1
    if "autocast" in ctx.case.supports:
        _require_dtype(what, got, expected)
    got, expected = got.detach().double(), expected.detach().double()
    if (got - expected).norm() > 2e-2 * expected.norm() + 1e-6:
        raise Mismatch(f"{what}: further from the reference than bfloat16 explains")


def _require_dtype(what: str, got: Tensor, expected: Tensor) -> None:
    if got.dtype is not expected.dtype:
        raise Mismatch(
            f"{what}: expected {expected.dtype}, as the reference, got {got.dtype}\n"
            f"diagnosis: wrong dtype"
        )
