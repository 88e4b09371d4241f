"""Finds out, by calling it, how a case has to be called, before any check does."""

from collections.abc import Callable
from dataclasses import replace
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
from manual_bp.verify._check import CheckContext
from manual_bp.verify._intended import intended
from manual_bp.verify._random import reseed, reseeded


def prepared(case: Case, calls_differ: bool) -> tuple[Case, tuple[str, ...]]:
    """The case as the checks should call it, and what is special about that, for the report.

    Args:
        case: The case.
        calls_differ: Whether two calls with the same arguments differ.
    """
    notes = []
    ctx = CheckContext(case, "prepare")
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
        case = replace(case, call=by_backward(case.call))
        ctx = CheckContext(case, "prepare")
    if (calls_differ or notes) and any(_answer(_is_random, ctx, sample) for sample in ctx.samples):
        notes.append("draws random numbers: the same seeds are set before each call")
        case = _reseeded(case)
    if case.gradient_of is not None and case.reference is not None:
        notes.append("the right gradient is that of gradient_of, not the derivative")
        case = replace(case, reference=intended(case.reference, case.gradient_of))
    return case, tuple(notes)


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
