"""Special values, and other devices."""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable, first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import loss, widened
from manual_bp.verify.checks._digits import results_of
from manual_bp.verify.checks._far_out import LARGE, far_out, scaled
from manual_bp.verify.checks._kinks import compare_except_at_kinks, judge_slopes
from manual_bp.verify.checks._shared import (
    cast,
    compare_with_reference,
    pairs_of_one_shape,
)


@check(builds_on=("writes_nothing", "deterministic"))
def no_nan(ctx: CheckContext, sample: Sample) -> None:
    """Without a reference: no nan where arguments are finite, and far out, where values are."""
    if ctx.case.reference is not None:
        raise NotApplicable("the reference says where nan is right")
    if not all(t.isfinite().all() for t in outputs_of(sample)):
        raise NotApplicable("an argument is not finite")
    _require_no_nan(ctx, sample, "the arguments are finite")
    for _, arguments, where in far_out(ctx, sample):
        _require_no_nan(ctx, arguments, "the values are finite", where)


@check(builds_on=SLOPE)
def at_zero(ctx: CheckContext, sample: Sample) -> None:
    """At 0, value and gradient match the reference, or the slope is between the one-sided ones."""
    where = " at zero, where slopes may jump"
    # A single zero equals no other element, so the slope must be the reference's.
    for i, k, arguments in _single_zeros(ctx, sample):
        if ctx.case.reference is None:
            judge_slopes(ctx, arguments, where, [(i, k)])
        else:
            compare_with_reference(ctx, arguments, where)
    for share in (0.5, 1.0) if ctx.case.reference is not None else ():
        compare_except_at_kinks(ctx, _mixed(ctx, sample, torch.zeros_like, share), where)


@check(builds_on=SLOPE)
def at_ties(ctx: CheckContext, sample: Sample) -> None:
    """Where elements are equal, the slope is the reference's, or between the one-sided ones."""
    judge = judge_slopes if ctx.case.reference is None else compare_except_at_kinks
    for arguments in (sample, *_tied_along_dims(sample), *_tied_pairs(ctx, sample)):
        judge(ctx, arguments, " where elements are equal")


@check(builds_on=SLOPE)
def small_values(ctx: CheckContext, sample: Sample) -> None:
    """At small values, -0, 1 and powers of 2, value and gradient match the reference."""
    special: dict[str, Callable[[Tensor], Tensor]] = {
        "-0": lambda t: torch.full_like(t, -0.0),
        "1": torch.ones_like,
        "-1": lambda t: -torch.ones_like(t),
        "powers of 2": lambda t: t.sgn() * 2.0 ** torch.randint_like(t.real, -4, 4),
        "2^-10 times the sample": lambda t: t * 2.0**-10,
        "2^-40 times the sample": lambda t: t * 2.0**-40,
        "denormal numbers": lambda t: t.sgn() * torch.finfo(t.dtype).tiny / 8,
    }
    for name, value in special.items():
        arguments = ctx.in_domain(_mixed(ctx, sample, value, 0.5))
        try:
            compare_except_at_kinks(ctx, arguments, f" at {name}")
        except Mismatch:
            if not _loses_digits(ctx, arguments):
                raise


@check(builds_on=SLOPE)
def special_values(ctx: CheckContext, sample: Sample) -> None:
    """At the special values that the case names, value and gradient match the reference."""
    if not ctx.case.special:
        raise NotApplicable("special was not given")
    judge = judge_slopes if ctx.case.reference is None else compare_with_reference
    for i, values in ctx.case.special.items():
        for value, share in product(values, (0.5, 1.0)):
            mask = _chosen(ctx, sample[i], share)
            mask.view(-1)[:1] = True
            changed = sample[i].masked_fill(mask, value)
            arguments = tuple(changed if j == i else t for j, t in enumerate(sample))
            where = f" with {ctx.label(i)} = {value:g}"
            if share < 1:  # alone, it may be refused
                _require_accepted(ctx, arguments, where)
            judge(ctx, arguments, where)


@check(builds_on=SLOPE)
def large_values(ctx: CheckContext, sample: Sample) -> None:
    """At large values, where functions saturate, value and gradient match the reference."""
    for factor, i in product(LARGE, positions(sample)):
        where = f" at {factor:g} times the sample"
        compare_with_reference(ctx, scaled(sample, i, factor), where, factor=factor)


@check(capability=True, only_if_declared=True, builds_on=(*SLOPE, "large_values"))
def infinite_values(ctx: CheckContext, sample: Sample) -> None:
    """For inf, -inf and nan, value and gradient match the reference."""
    i = positions(sample)[0]
    if not sample[i].numel() or sample[i].is_complex() or i in ctx.case.project:
        return
    for value in (torch.inf, -torch.inf, torch.nan):
        changed = sample[i].clone()
        changed[(0,) * changed.ndim] = value
        arguments = tuple(changed if j == i else t for j, t in enumerate(sample))
        compare_with_reference(ctx, arguments, f" with {value} in {ctx.label(i)}")


@check(builds_on=("writes_nothing", "deterministic"))
def device_parity(ctx: CheckContext, sample: Sample) -> None:
    """An accelerator gives the same numbers as the CPU."""
    if ctx.case.device.type == "cpu":
        raise NotApplicable("the case runs on the CPU")
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    on_cpu = tuple(t.cpu() if isinstance(t, Tensor) else t for t in sample)
    try:
        expected_result, expected = gradients(ctx.call, leaves(on_cpu), [u.cpu() for u in upstream])
    except Exception as error:
        raise NotApplicable(f"it does not run on the CPU: {first_line(error)}") from None
    moved: Gradients = {i: None if g is None else g.cpu() for i, g in found.items()}
    for one, other in zip(outputs_of(result), outputs_of(expected_result), strict=True):
        ctx.compare("output", one.detach().cpu(), other.detach())
    ctx.compare_gradients(on_cpu, moved, expected, " on the accelerator")


def _require_no_nan(ctx: CheckContext, arguments: Sample, why: str, where: str = "") -> None:
    upstream = ctx.upstream(ctx.call, arguments)
    for name, value in results_of(ctx, ctx.call, arguments, upstream).items():
        ctx.comparisons += 1
        if count := int(value.isnan().sum()):
            raise Mismatch(
                f"{name}{where}: expected numbers, since {why}, got nan in {count} of "
                f"{value.numel()} elements\ndiagnosis: nan"
            )


def _mixed(
    ctx: CheckContext, sample: Sample, value: Callable[[Tensor], Tensor], share: float
) -> Sample:
    """The sample, with other values in a share of the elements."""
    return tuple(
        torch.where(_chosen(ctx, t, share), value(t), t) if is_differentiable(t) else t
        for t in sample
    )


def _require_accepted(ctx: CheckContext, arguments: Sample, where: str) -> None:
    """Raise a Mismatch if the reference (or the call) refuses a value that the case names."""
    is_reference = ctx.case.reference is not None
    given = ctx.in_domain(widened(arguments) if is_reference else arguments)
    try:
        ctx.trusted(*leaves(given, ()))
    except Exception as error:
        name = "the reference" if is_reference else "the call"
        raise Mismatch(
            f"output{where}: expected a value that {name} accepts, got {first_line(error)}\n"
            f"diagnosis: a special value that is none"
        ) from None


def _chosen(ctx: CheckContext, value: Tensor, share: float) -> Tensor:
    """A random choice of a share of the elements of a tensor, as a mask."""
    # Not from the global numbers, which are the same after each call of a random function.
    mask = torch.rand(value.shape, generator=ctx.generator) < share
    # With the strides of the value, which the result of torch.where then has.
    return torch.empty_like(value, dtype=torch.bool).copy_(mask)


def _single_zeros(ctx: CheckContext, sample: Sample) -> Iterator[tuple[int, int, Sample]]:
    """Samples with a zero in a random element of one argument: its position, and the element's.

    Those that are out of the domain are left out.
    """
    for i in positions(sample):
        for k in torch.randperm(sample[i].numel(), generator=ctx.generator)[:2].tolist():
            is_chosen = torch.zeros_like(sample[i], dtype=torch.bool)
            is_chosen[torch.unravel_index(torch.tensor(k), sample[i].shape)] = True
            changed = torch.where(is_chosen, 0.0, sample[i])
            arguments = (*sample[:i], changed, *sample[i + 1 :])
            if ctx.is_in_domain(arguments):
                yield i, k, arguments


def _tied_along_dims(sample: Sample) -> Iterator[Sample]:
    """Samples whose elements are equal in pairs along one dimension."""
    for dim in range(max((t.ndim for t in outputs_of(sample)), default=0)):
        yield tuple(
            torch.empty_like(t).copy_(t.index_select(dim, _in_pairs(t.shape[dim], t.device)))
            if is_differentiable(t) and t.ndim > dim
            else t
            for t in sample
        )


def _in_pairs(count: int, device: torch.device) -> Tensor:
    """The indices 0, 0, 2, 2, 4, 4, …, so many."""
    return torch.arange(count, device=device) // 2 * 2


def _tied_pairs(ctx: CheckContext, sample: Sample) -> Iterator[Sample]:
    """Samples with two arguments that are equal in half of their elements, or else in all."""
    for i, j in pairs_of_one_shape(sample):
        half = _chosen(ctx, sample[i], 0.5)
        tied = (*sample[:j], torch.where(half, sample[i], sample[j]), *sample[j + 1 :])
        # A projection onto the domain would untie them.
        yield tied if ctx.is_in_domain(tied) else (*sample[:j], sample[i], *sample[j + 1 :])


def _loses_digits(ctx: CheckContext, arguments: Sample) -> bool:
    """Whether the reference is ill-conditioned: float32 gives it fewer than four digits."""
    low = ctx.in_domain(cast(arguments, torch.float32))
    try:
        lost = loss(ctx.reference, low, [ctx.upstream(ctx.reference, low)])
    except Exception:
        return False
    pairs = [*lost.outputs, *(pair for pairs in lost.gradients.values() for pair in pairs)]
    return any(
        bool(((a - b).abs() > 1e-4 * b.abs().max()).any())
        for a, b in pairs
        if is_differentiable(b) and b.numel()
    )
