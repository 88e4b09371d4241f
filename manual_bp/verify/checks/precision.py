"""Lower precision than float64."""

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients, gradients_of, leaves, outputs_of, positions
from manual_bp.verify._case import Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify.checks._shared import cast, compare_raw, require_real


@check(capability=True)
def float32(ctx: CheckContext, sample: Sample) -> None:
    """In float32 the error against float64 is at most twice the reference's, plus rounding."""
    _compare_precision(ctx, sample, torch.float32)


@check(capability=True)
def bfloat16(ctx: CheckContext, sample: Sample) -> None:
    """In bfloat16 the error against float64 is at most twice the reference's, plus rounding."""
    _compare_precision(ctx, sample, torch.bfloat16)


@check(capability=True)
def float16(ctx: CheckContext, sample: Sample) -> None:
    """In float16 the error against float64 is at most twice the reference's, plus rounding."""
    _compare_precision(ctx, sample, torch.float16)


@check(capability=True)
def autocast(ctx: CheckContext, sample: Sample) -> None:
    """Under autocast the dtypes match the reference, and backward works outside the region."""
    require_real(sample)
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


def _compare_precision(ctx: CheckContext, sample: Sample, dtype: torch.dtype) -> None:
    require_real(sample)
    low = cast(sample, dtype)
    upstream = [u.to(dtype) for u in ctx.upstream(ctx.reference, low)]
    wide, wide_upstream = cast(low, torch.float64), [u.double() for u in upstream]
    ours, our_gradients = gradients(ctx.call, leaves(low), upstream)
    again = leaves(low)
    compare_raw(ctx, again, ctx.call(*again))
    theirs, their_gradients = gradients(ctx.reference, leaves(low), upstream)
    right, right_gradients = gradients(ctx.reference, leaves(wide), wide_upstream)
    triples = [
        ("output", *found) for found in zip(*map(outputs_of, (ours, theirs, right)), strict=True)
    ]
    for i in positions(sample):
        one, other, exact = our_gradients[i], their_gradients[i], right_gradients[i]
        if one is not None and other is not None and exact is not None:
            triples.append((f"gradient of {ctx.label(i)}", one, other, exact))
    for name, got, peer, exact in triples:
        _compare_error(ctx, f"{name} in {dtype}", got, peer, exact, dtype)


def _compare_error(
    ctx: CheckContext, what: str, got: Tensor, peer: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    ctx.comparisons += 1
    _require_dtype(what, got, peer)
    got, peer, exact = got.detach().double(), peer.detach().double(), exact.detach()
    error, allowed = (got - exact).norm(), 2 * (peer - exact).norm()
    allowed = allowed + 4 * torch.finfo(dtype).eps * exact.norm()
    if not error <= allowed and bool(peer.isfinite().all()):
        raise Mismatch(
            f"{what}: expected an error against float64 of at most {allowed.item():.3g}, twice the "
            f"reference's plus rounding, got {error.item():.3g}"
        )


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
