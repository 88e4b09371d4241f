"""How the arguments are stored: their strides, and the dtype of integers."""

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable, first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify._layouts import LAYOUTS, is_plain, windows
from manual_bp.verify._precision import narrowest, widened
from manual_bp.verify.checks._shared import diagnosed


@check(builds_on=SLOPE)
def argument_layouts(ctx: CheckContext, sample: Sample) -> None:
    """The strides of the arguments do not matter: a contiguous copy gives the same."""
    # A module keeps its parameters as it made them.
    given = sample[: len(sample) - ctx.case.parameters]
    tensors = [i for i, t in enumerate(given) if isinstance(t, Tensor)]
    _, usual = gradients(ctx.call, leaves(sample), ctx.upstream(ctx.call, sample))
    layouts = {"given": lambda t: t, **LAYOUTS}
    if ctx.case.reference is not None:  # some of PyTorch's own functions are wrong for it
        layouts["overlapping"] = windows
    for chosen in [tensors, *([i] for i in tensors if len(tensors) > 1)]:
        names = ", ".join(map(ctx.label, chosen))
        for name, layout in layouts.items():
            arguments = tuple(layout(t) if i in chosen else t for i, t in enumerate(sample))
            if ctx.is_in_domain(arguments) and not all(is_plain(arguments[i]) for i in chosen):
                _compare_layout(ctx, arguments, usual, f" for {name} {names}")
    fused = _slices_of_one_tensor(sample, len(given))
    if fused is not None:
        _compare_layout(ctx, fused, usual, " for arguments that are slices of one tensor")


@check(builds_on=SLOPE)
def integer_dtypes(ctx: CheckContext, sample: Sample) -> None:
    """Indices and labels give the same in int32 as in int64, unless it refuses one of them."""
    places = [i for i, t in enumerate(sample) if _fits_int32(t)]
    if not places:
        raise NotApplicable("no argument is an integer tensor whose values fit into int32")
    others = {torch.int32: torch.int64, torch.int64: torch.int32}
    changed = tuple(t.to(others[t.dtype]) if i in places else t for i, t in enumerate(sample))
    upstream = ctx.upstream(ctx.call, sample)
    result, expected = gradients(ctx.call, leaves(sample), upstream)
    try:
        other_result, found = gradients(ctx.call, leaves(changed), upstream)
    except Exception as error:
        raise NotApplicable(f"it refuses another integer dtype: {first_line(error)}") from None
    names = ", ".join(f"{ctx.label(i)} in {changed[i].dtype}" for i in places)
    with diagnosed(f"right only for {sample[places[0]].dtype}"):
        ctx.compare_outputs(outputs_of(other_result), outputs_of(result), f" with {names}")
        ctx.compare_gradients(sample, found, expected, f" with {names}")


def _fits_int32(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        return False
    return not value.numel() or int(value.abs().max()) <= torch.iinfo(torch.int32).max


def _slices_of_one_tensor(sample: Sample, count: int) -> Sample | None:
    """The first arguments that differ at most in their last size, as columns of one tensor."""
    places = [i for i in positions(sample[:count]) if sample[i].ndim]
    chosen = [i for i in places if sample[i].shape[:-1] == sample[places[0]].shape[:-1]]
    chosen = [i for i in chosen if sample[i].dtype == sample[chosen[0]].dtype]
    if len(chosen) < 2:
        return None
    fused = torch.cat([sample[i] for i in chosen], -1)
    slices = fused.split([sample[i].shape[-1] for i in chosen], -1)
    laid_out = dict(zip(chosen, slices, strict=True))
    return tuple(laid_out.get(i, t) for i, t in enumerate(sample))


def _compare_layout(ctx: CheckContext, arguments: Sample, usual: Gradients, where: str) -> None:
    try:
        _compare_with_copy(ctx, ctx.call, arguments, usual, where)
    except Exception as problem:
        blameless = _reference_fails_too(ctx, arguments, usual, problem)
        if not blameless and not (
            isinstance(problem, Mismatch) and _is_ill_conditioned(ctx, arguments, problem)
        ):
            raise


def _reference_fails_too(
    ctx: CheckContext, arguments: Sample, usual: Gradients, problem: Exception
) -> bool:
    """Whether the reference also refuses these strides or values, or is wrong for them.

    Random numbers may be drawn in the order of the memory, so without a reference they say nothing.
    """
    if ctx.case.reference is None:
        return ctx.case.is_random or not isinstance(problem, Mismatch)
    try:
        _compare_with_copy(ctx, ctx.case.reference, arguments, usual)
    except Exception:
        return True
    return False


def _is_ill_conditioned(ctx: CheckContext, arguments: Sample, problem: Mismatch) -> bool:
    """Whether rounding such values changes the exact result by 100 times as much.

    An expanded row has equal elements, and layer_norm divides what is left of them by √ε. So the
    order in which a sum is rounded shows, and it may depend on the strides. Without a reference,
    the result of the call is asked, for a change of some roundings, since it is rounded itself. Of
    equal elements any may be the median, so its gradient jumps, but that excuses no wrong value.
    """
    eps = torch.finfo(narrowest(arguments) or torch.float64).eps
    step = 4 * eps
    if ctx.case.reference is not None:
        arguments, step = widened(arguments), eps
    upstream = [ctx.random_like(t) for t in outputs_of(ctx.trusted(*leaves(arguments, ())))]
    moved = tuple(
        t * (1 + step * ctx.random_like(t)) if is_differentiable(t) else t for t in arguments
    )
    here, there = (gradients(ctx.trusted, leaves(a), upstream) for a in (arguments, moved))
    is_gradient = problem.finding.startswith("gradient of")
    ours, theirs = (
        list(values.values()) if is_gradient else outputs_of(result)
        for result, values in (here, there)
    )
    pairs = zip(ours, theirs, strict=True)
    return any(
        one is not None and other is not None and largest(one - other) > 100 * eps * largest(one)
        for one, other in pairs
    )


def _compare_with_copy(
    ctx: CheckContext, call: Call, arguments: Sample, usual: Gradients, where: str = ""
) -> None:
    copied = tuple(
        t.clone(memory_format=torch.contiguous_format).resolve_conj()
        if isinstance(t, Tensor)
        else t
        for t in arguments
    )
    upstream = ctx.upstream(call, copied)
    result, expected = gradients(call, leaves(copied), upstream)
    # leaves() would copy the arguments, and with them lazy conjugates and offsets.
    views = tuple(t.detach().requires_grad_() if is_differentiable(t) else t for t in arguments)
    found_result, found = gradients(call, views, upstream)
    ctx.compare_outputs(found_result, result, where)
    diagnosis = "right only for contiguous arguments"
    ctx.compare_gradients(copied, found, expected, where, diagnosis=diagnosis, scales=usual)
