"""Other dtypes than float64."""

import torch
from torch import Tensor

from manual_bp.verify._bench import Bench, gradients, gradients_of, leaves, outputs_of, positions
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify.checks._shared import cast, compare_raw


def float32(bench: Bench) -> None:
    """In float32 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.float32)


def bfloat16(bench: Bench) -> None:
    """In bfloat16 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.bfloat16)


def float16(bench: Bench) -> None:
    """In float16 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.float16)


def autocast(bench: Bench) -> None:
    """Under autocast the reference's dtypes, and a backward that works outside the region."""
    device = bench.case.device.type
    for sample in bench.samples:
        if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
            continue
        low = cast(sample, torch.float32)
        results = []
        for call in (bench.case.call, bench.reference):
            arguments = leaves(low)
            with torch.autocast(device, torch.bfloat16):
                result = call(*arguments)
            ones = [torch.ones_like(t) for t in outputs_of(result)]
            if call is bench.case.call:
                compare_raw(bench, arguments, result)
            results.append((outputs_of(result), gradients_of(result, arguments, ones)))
        (ours, our_gradients), (theirs, their_gradients) = results
        for one, other in zip(ours, theirs, strict=True):
            _compare_close(bench, "output under autocast", one, other)
        for i, other_gradient in their_gradients.items():
            one_gradient = our_gradients[i]
            if one_gradient is not None and other_gradient is not None:
                name = f"gradient of {bench.case.label(i)} under autocast"
                _compare_close(bench, name, one_gradient, other_gradient)


def _compare_precision(bench: Bench, dtype: torch.dtype) -> None:
    for sample in bench.samples:
        if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
            raise NotApplicable("the samples are complex")
        low = cast(sample, dtype)
        upstream = [u.to(dtype) for u in bench.upstream(bench.reference, low)]
        wide, wide_upstream = cast(low, torch.float64), [u.double() for u in upstream]
        ours, our_gradients = gradients(bench.case.call, leaves(low), upstream)
        again = leaves(low)
        compare_raw(bench, again, bench.case.call(*again))
        theirs, their_gradients = gradients(bench.reference, leaves(low), upstream)
        right, right_gradients = gradients(bench.reference, leaves(wide), wide_upstream)
        triples = [
            ("output", *found)
            for found in zip(*map(outputs_of, (ours, theirs, right)), strict=True)
        ]
        for i in positions(sample):
            one, other, exact = our_gradients[i], their_gradients[i], right_gradients[i]
            if one is not None and other is not None and exact is not None:
                triples.append((f"gradient of {bench.case.label(i)}", one, other, exact))
        for name, got, peer, exact in triples:
            _compare_error(bench, f"{name} in {dtype}", got, peer, exact, dtype)


def _compare_error(
    bench: Bench, what: str, got: Tensor, peer: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    bench.comparisons += 1
    if got.dtype is not peer.dtype:
        raise Mismatch(
            f"{what}: expected {peer.dtype}, as the reference, got {got.dtype}\n"
            f"diagnosis: wrong dtype"
        )
    got, peer, exact = got.detach().double(), peer.detach().double(), exact.detach()
    error, allowed = (got - exact).norm(), 2 * (peer - exact).norm()
    allowed = allowed + 4 * torch.finfo(dtype).eps * exact.norm()
    if not error <= allowed and bool(peer.isfinite().all()):
        raise Mismatch(
            f"{what}: expected an error against float64 of at most {allowed.item():.3g}, twice the "
            f"reference's and some rounding, got {error.item():.3g}"
        )


def _compare_close(bench: Bench, what: str, got: Tensor, expected: Tensor) -> None:
    bench.comparisons += 1
    if got.dtype is not expected.dtype and "autocast" in bench.case.supports:
        raise Mismatch(
            f"{what}: expected {expected.dtype}, as the reference, got {got.dtype}\n"
            f"diagnosis: wrong dtype"
        )
    got, expected = got.detach().double(), expected.detach().double()
    if (got - expected).norm() > 2e-2 * expected.norm() + 1e-6:
        raise Mismatch(f"{what}: further from the reference than bfloat16 explains")
