"""What a call does to the state of the process."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients_of, leaves, outputs_of
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._global_state import STATES, changed, random_numbers, restored

_MODES = "global state is changed for all code that runs afterwards"
_SEEDED = "it seeds a global generator, so all code after it draws the same numbers again and again"
_DRAWN = "it draws from a global generator, although its results do not depend on the numbers"


@check()
def global_state(ctx: CheckContext, sample: Sample) -> None:
    """Forward and backward leave modes, default dtype, random numbers and warnings as they were."""
    with restored():
        upstream = ctx.upstream(ctx.call, sample)
    judges = [_judge_modes]
    if not ctx.case.is_random:  # its seeds are set before each call
        judges.append(_judge_random_numbers)
    for judge in judges:
        with restored():
            mistakes = judge(ctx, ctx.case.call, sample, upstream)
        if mistakes and ctx.case.reference is not None:
            with restored():
                excused = judge(ctx, ctx.case.reference, sample, upstream)
            mistakes = {part: text for part, text in mistakes.items() if part not in excused}
        for text in mistakes.values():
            raise Mismatch(text)


def _judge_modes(
    ctx: CheckContext, call: Call, sample: Sample, upstream: Sequence[Tensor]
) -> dict[str, str]:
    """What the call changed, with a message."""
    before = {name: state.get() for name, state in STATES.items()}
    found: dict[str, str] = {}

    def look(when: str) -> None:
        for name, was in before.items():
            ctx.comparisons += 1
            now = STATES[name].get()
            if changed(was, now):
                values = f": expected {was}, got {now}" if len(f"{was}{now}") < 60 else ""
                found.setdefault(name, f"{name} changed by {when}{values}\ndiagnosis: {_MODES}")

    arguments = leaves(sample)
    result = call(*arguments)
    look("forward")
    gradients_of(result, arguments, upstream)
    look("backward")
    return found


def _judge_random_numbers(
    ctx: CheckContext, call: Call, sample: Sample, upstream: Sequence[Tensor]
) -> dict[str, str]:
    """Which global generators the call seeds, or draws from in vain, with a message."""
    generators = random_numbers(ctx.case.device)
    values, before, after = [], [], []
    for seed in (ctx.case.seed + 1, ctx.case.seed + 2):
        for generator in generators.values():
            generator.seed(seed)
        before.append({name: generator.get() for name, generator in generators.items()})
        arguments = leaves(sample)
        result = call(*arguments)
        found = gradients_of(result, arguments, upstream)
        after.append({name: generator.get() for name, generator in generators.items()})
        values.append([*outputs_of(result), *found.values()])
    is_random = not all(map(_is_same, *values))
    messages = {}
    for name in generators:
        ctx.comparisons += 1
        if not changed(before[0][name], after[0][name]):
            continue
        if not changed(after[0][name], after[1][name]):
            messages[name] = (
                f"{name}: expected their state after the call to depend on the seed before it, "
                f"got the same state after two seeds\ndiagnosis: {_SEEDED}"
            )
        elif not is_random:
            messages[name] = (
                f"{name}: expected no draw, got another state after the call\ndiagnosis: {_DRAWN}"
            )
    return messages


def _is_same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())
