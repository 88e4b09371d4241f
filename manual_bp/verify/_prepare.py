"""Finds out, by calling it, how a case has to be called, before any check does."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves, outputs_of, tensors_of
from manual_bp.verify._calling import (
    by_backward,
    needs_backward,
    returned_arguments,
    with_copies,
)
from manual_bp.verify._case import Call, Case, Sample
from manual_bp.verify._compare import first_line
from manual_bp.verify._context import CheckContext
from manual_bp.verify._intended import intended
from manual_bp.verify._lifted import put_parameters
from manual_bp.verify._precision import widened
from manual_bp.verify._random import reseed, reseeded


def prepared(case: Case, calls_differ: bool) -> tuple[Case, tuple[str, ...]]:
    """The case as the checks should call it, and what is special about that, for the report.

    Args:
        case: The case.
        calls_differ: Whether two calls with the same arguments differ.

    Raises:
        TypeError: The call or the reference returns no tensor that can have a gradient.
        ValueError: The reference or gradient_of raises at a sample, or they give different shapes
            or dtypes.
    """
    notes = []
    ctx = CheckContext(case, "prepare")
    for sample in ctx.each(ctx.samples):
        _require_results(ctx, sample)
    written = sorted(
        {i for s in ctx.samples for i in _answer(returned_arguments, ctx.call, s) or ()}
    )
    if written:
        names = ", ".join(map(case.label, written))
        notes.append(f"changes {names} in place and returns it: it is given a copy in each call")
        case = replace(case, call=with_copies(case.call, written))
        ctx = CheckContext(case, "prepare")
    if any(_answer(_needs_backward, ctx, sample) for sample in ctx.samples):
        notes.append("gives gradients by .backward() only: they are read from .grad")
        call = by_backward(case.call, partial(_hold, case))
        case = replace(case, call=call, by_backward=True)
        ctx = CheckContext(case, "prepare")
    if (calls_differ or notes) and any(_answer(_is_random, ctx, sample) for sample in ctx.samples):
        notes.append("draws random numbers: the same seeds are set before each call")
        case = _reseeded(case)
    if case.gradient_of is not None and case.reference is not None:
        notes.append("the right gradient is that of gradient_of, not the derivative")
        case = replace(case, reference=intended(case.reference, case.gradient_of))
    return case, tuple(notes)


def _require_results(ctx: CheckContext, sample: Sample) -> None:
    """Raise a TypeError or ValueError unless there is something to compare at a sample.

    A call that raises is left to the checks.
    """
    case = ctx.case
    ours = _answer(_tensors, ctx.call, sample)
    right = _trusted_tensors(ctx, "reference", case.reference, sample)
    intended = _trusted_tensors(ctx, "gradient_of", case.gradient_of, sample)
    for name, found, other in ((case.name, ours, right), ("reference", right, ours)):
        is_floating = bool(other and outputs_of(other))
        if found is not None and not (outputs_of(found) if is_floating else found):
            wanted = "a floating tensor" if is_floating else "a tensor"
            got = ", ".join(str(t.dtype) for t in found) or "none"
            raise TypeError(ctx.located(f"{name} must return {wanted}, or several; got {got}"))
    if right is not None and intended is not None:
        kinds = [[(tuple(t.shape), t.dtype) for t in outputs_of(r)] for r in (right, intended)]
        if kinds[0] != kinds[1]:
            message = "gradient_of must give outputs of the shapes and dtypes of the reference's"
            raise ValueError(ctx.located(f"{message}, {kinds[0]}; got {kinds[1]}"))


def _tensors(call: Call, sample: Sample) -> tuple[Tensor, ...]:
    return tensors_of(call(*leaves(sample, ())))


def _trusted_tensors(
    ctx: CheckContext, name: str, call: Call | None, sample: Sample
) -> tuple[Tensor, ...] | None:
    """What a reference returns in float64; None if there is no reference."""
    try:
        return None if call is None else _tensors(call, widened(sample))
    except Exception as error:
        message = f"{name} must accept the samples; it raised {first_line(error)}"
        raise ValueError(ctx.located(message)) from error


def _reseeded(case: Case) -> Case:
    def once(call: Call) -> Call:
        return reseeded(call, case.seed)

    return replace(
        case,
        call=once(case.call),
        reference=case.reference and once(case.reference),
        gradient_of=case.gradient_of and once(case.gradient_of),
        is_random=True,
    )


def _hold(case: Case, arguments: Sample) -> None:
    """Put the parameters among the arguments of a module into it again."""
    if case.module is not None:
        first = len(arguments) - case.parameters
        put_parameters(case.module, dict(zip(case.labels[first:], arguments[first:], strict=True)))


def _needs_backward(ctx: CheckContext, sample: Sample) -> bool:
    return needs_backward(ctx.call, sample, ctx.upstream(ctx.call, sample))


def _answer(question: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; None if the code under test raises, which the checks will report."""
    try:
        return question(*arguments)
    except Exception:
        return None


def _is_random(ctx: CheckContext, sample: Sample) -> bool:
    """Whether calls with different global seeds differ, while calls with the same seeds agree."""
    upstream = ctx.upstream(ctx.call, sample)
    first, other, again = (_results(ctx.call, sample, upstream, seed) for seed in (0, 1, 0))
    return not _are_equal(first, other) and _are_equal(first, again)


def _results(call: Call, sample: Sample, upstream: list[Tensor], seed: int) -> list[Tensor]:
    reseed(seed)
    result, found = gradients(call, leaves(sample), [u.clone() for u in upstream])
    values = [*tensors_of(result), *outputs_of(list(found.values()))]
    return [value.detach().clone() for value in values]


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        t.shape == u.shape and torch.allclose(t, u, rtol=0, atol=0, equal_nan=True)
        for t, u in zip(one, other, strict=True)
    )
