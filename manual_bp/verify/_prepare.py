"""Finds out, by calling it, how a case has to be called, before any check does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves, outputs_of, tensors_of
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
    ctx = CheckContext(case, "prepare")
    notes = []
    gradient_of, reference = case.gradient_of, case.reference
    if calls_differ and any(_answer(_is_random, ctx, sample) for sample in ctx.samples):
        notes.append("draws random numbers: the same seeds are set before each call")
        reference = reference and reseeded(reference, case.seed)
        gradient_of = gradient_of and reseeded(gradient_of, case.seed)
        case = replace(case, call=reseeded(case.call, case.seed), is_random=True)
    if gradient_of is not None and reference is not None:
        notes.append("the right gradient is that of gradient_of, not the derivative")
        reference = intended(reference, gradient_of)
    return replace(case, reference=reference, gradient_of=gradient_of), tuple(notes)


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
