"""The upstream gradient in all its forms."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    subsets,
)
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import SLOPE, STATE, check
from manual_bp.verify._compare import NotApplicable, first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify._layouts import LAYOUTS, is_plain
from manual_bp.verify.checks._digits import asking_no_more_than_half


@check(builds_on=SLOPE)
def upstream_layouts(ctx: CheckContext, sample: Sample) -> None:
    """The strides of the upstream gradient do not matter, nor whether it is expanded or zero."""
    random = ctx.upstream(ctx.call, sample)
    _, usual = gradients(ctx.call, leaves(sample), random)
    for name, layout in {**LAYOUTS, "constant (stride 0)": _constant}.items():
        upstream = [layout(u) for u in ctx.upstream(ctx.call, sample)]
        if all(map(is_plain, upstream)):
            continue
        where = f" for a {name} upstream gradient"
        try:
            _compare_with_plain(ctx, ctx.call, sample, upstream, where, usual)
        except Exception:
            if not _reference_fails_too(ctx, sample, upstream, usual):
                raise
    _, found = gradients(ctx.call, leaves(sample), [torch.zeros_like(u) for u in random])
    where = " for an upstream gradient of zeros"
    ctx.compare_gradients(sample, _where_finite(found, usual), dict.fromkeys(found), where)


@check(builds_on=SLOPE)
def upstream_undefined(ctx: CheckContext, sample: Sample) -> None:
    """An undefined upstream gradient counts as zero, and breaks nothing."""
    arguments = leaves(sample)
    for output in outputs_of(ctx.call(*arguments)):
        if output.requires_grad:
            cut = _Cut.apply(output)
            with _blaming_no_hook():
                found = gradients_of(cut, arguments, [torch.ones_like(cut)], retain_graph=True)
            where = " for an undefined upstream gradient"
            ctx.compare_gradients(sample, found, dict.fromkeys(found), where)


@check(builds_on=SLOPE)
def outputs_alone(ctx: CheckContext, sample: Sample) -> None:
    """The gradient of some of the outputs is the same if the others are unused or undefined."""
    upstream = ctx.upstream(ctx.call, sample)
    results = outputs_of(ctx.call(*leaves(sample)))
    places = [i for i, t in enumerate(results) if t.requires_grad]
    if len(places) < 2:
        raise NotApplicable("fewer than two outputs are differentiable")
    for chosen in subsets(places):
        others = [i for i in places if i not in chosen]
        if not others:
            continue
        zeroed = [u if i in chosen else torch.zeros_like(u) for i, u in enumerate(upstream)]
        _, expected = gradients(ctx.call, leaves(sample), zeroed)
        names = ", ".join(map(str, others))
        for how, used in (("unused", chosen), ("undefined", places)):
            arguments = leaves(sample)
            outputs = outputs_of(ctx.call(*arguments))
            kept = tuple(outputs[i] if i in chosen else _Cut.apply(outputs[i]) for i in used)
            with _blaming_no_hook():
                found = gradients_of(kept, arguments, [upstream[i] for i in used])
            where = f" with output {names} {how}"
            ctx.compare_gradients(sample, found, expected, where)


@check(builds_on=(*SLOPE, *STATE))
def linear_in_upstream(ctx: CheckContext, sample: Sample) -> None:
    """Gradients are linear in the upstream gradient: for a sum, and scaled up and down."""

    def gradients_for(upstream: Sequence[Tensor]) -> Gradients:
        # Copies, since writes_nothing finds a backward that changes them.
        return gradients(ctx.call, leaves(sample), [u.clone() for u in upstream])[1]

    # Multiples of 1/8, so that their sum is exact in every dtype, as in that of a weight.
    one, other = (
        [(8 * u).round().clamp(-32, 32) / 8 if u.is_floating_point() else u for u in upstream]
        for upstream in (ctx.upstream(ctx.call, sample), ctx.upstream(ctx.call, sample))
    )
    # Powers of two scale without rounding. float16 overflows at 2^16, and underflows at 2^-14.
    powers = (6, -3) if any(u.dtype is torch.float16 for u in one) else (20, -20, -80)
    of_one, of_other = gradients_for(one), gradients_for(other)
    for factor, added in ((2.0, 1.0), (-1.0, 0.0), *((2.0**k, 0.0) for k in powers)):
        of_mixed = gradients_for([factor * u + added * v for u, v in zip(one, other, strict=True)])
        # Over the factor, so that all are of the usual size.
        found: Gradients = {i: None if g is None else g / factor for i, g in of_mixed.items()}
        expected: Gradients = {
            i: g + (added / factor * h if added else 0)
            for i, g in of_one.items()
            if g is not None and (h := of_other[i]) is not None
        }
        # Where the larger one overflows, nothing is asked.
        guide: Gradients = {i: None if g is None else factor * g for i, g in expected.items()}
        with asking_no_more_than_half(ctx, sample, one):
            ctx.compare_gradients(
                sample,
                _where_finite(found, guide),
                _where_finite(expected, guide),
                f" for {factor:.3g} times an upstream gradient, divided by {factor:.3g}",
                diagnosis="not linear in the upstream gradient",
            )


def _compare_with_plain(
    ctx: CheckContext,
    call: Call,
    sample: Sample,
    upstream: Sequence[Tensor],
    where: str,
    usual: Gradients,
) -> None:
    plain = [u.clone(memory_format=torch.contiguous_format) for u in upstream]
    _, found = gradients(call, leaves(sample), upstream, copy_upstream=False)
    _, expected = gradients(call, leaves(sample), plain)
    diagnosis = "right only for contiguous upstream gradients"
    ctx.compare_gradients(sample, found, expected, where, diagnosis=diagnosis, scales=usual)


def _reference_fails_too(
    ctx: CheckContext, sample: Sample, upstream: Sequence[Tensor], usual: Gradients
) -> bool:
    """Whether the reference also refuses these strides, or is wrong for them."""
    if ctx.case.reference is None:
        return False
    try:
        _compare_with_plain(ctx, ctx.case.reference, sample, upstream, "", usual)
    except Exception:
        return True
    return False


def _where_finite(found: Gradients, guide: Gradients) -> Gradients:
    """Gradients with 0 where the guide is not finite, since linearity says nothing there."""
    return {
        i: g if g is None or (like := guide.get(i)) is None else g.where(like.isfinite(), 0.0)
        for i, g in found.items()
    }


def _constant(value: Tensor) -> Tensor:
    return value.flatten()[0].expand(value.shape) if value.numel() else value


@contextmanager
def _blaming_no_hook() -> Iterator[None]:
    """A region in which an error is only passed on if a hand-written backward raised it."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        if not any(isinstance(frame.f_locals.get("self"), FunctionCtx) for frame in frames):
            raise NotApplicable(
                f"PyTorch calls a hook with None if the gradient is undefined, and the hook of the "
                f"call raised {first_line(error)}"
            ) from None
        raise


class _Cut(Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None
