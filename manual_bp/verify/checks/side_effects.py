"""What a Function returns, writes to, saves and leaves behind."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from manual_bp._torch import seeing_operators
from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    gradients_of,
    leaves,
    node_name,
    outputs_of,
    positions,
)
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import STATE, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._context import CheckContext
from manual_bp.verify._global_state import filled_memory
from manual_bp.verify.checks._shared import UNWRITTEN, compare_raw, diagnosed, require_custom_nodes

_SO_DOES_THE_REFERENCE = (
    "changed in place, by the reference too (as nn.Embedding does with max_norm), so the gradient "
    "is not the slope"
)


@check(builds_on=("writes_nothing", "deterministic", "gradients_match_reference", *STATE))
def raw_backward(ctx: CheckContext, sample: Sample) -> None:
    """What a backward returns has the shape, dtype and device of its argument, before any cast."""
    arguments = leaves(sample)
    result = ctx.call(*arguments)
    require_custom_nodes(result)
    compare_raw(ctx, arguments, result)


@check()
def writes_nothing(ctx: CheckContext, sample: Sample) -> None:
    """Neither forward nor backward changes an argument, an output or the upstream gradient."""
    try:
        _require_no_writes(ctx, ctx.call, sample)
    except Mismatch as mismatch:
        if _writes(ctx, ctx.case.reference, sample):
            raise mismatch.diagnosed(_SO_DOES_THE_REFERENCE) from None
        raise


def _writes(ctx: CheckContext, call: Call | None, sample: Sample) -> bool:
    try:
        if call is not None:
            _require_no_writes(ctx, call, sample)
    except Mismatch:
        return True
    except Exception:
        return False
    return False


def _require_no_writes(ctx: CheckContext, call: Call, sample: Sample) -> None:
    with torch.no_grad():
        frozen = leaves(sample, ())
        before = {name: t.clone() for name, t in _named(ctx, frozen).items()}
        call(*frozen)
    _compare_unchanged(ctx, before, _named(ctx, frozen), "forward without gradients")
    arguments = leaves(sample)
    upstream = ctx.upstream(call, sample)
    now = _named(ctx, arguments)
    before = {name: t.detach().clone() for name, t in now.items()}
    result = call(*arguments)
    _compare_unchanged(ctx, before, now, "forward")
    for i, (u, output) in enumerate(zip(upstream, outputs_of(result), strict=True)):
        before |= {f"upstream gradient {i}": u.clone(), f"output {i}": output.detach().clone()}
        now |= {f"upstream gradient {i}": u, f"output {i}": output}
    gradients_of(result, arguments, upstream, copy_upstream=False)
    _compare_unchanged(ctx, before, now, "backward")


@check(builds_on=("writes_nothing", "deterministic"))
def uninitialized_memory(ctx: CheckContext, sample: Sample) -> None:
    """No result depends on what torch.empty finds in memory: filled with nan, it is the same."""
    upstream = ctx.upstream(ctx.call, sample)
    result, expected = gradients(ctx.call, leaves(sample), upstream)
    with filled_memory():
        filled, found = gradients(ctx.call, leaves(sample), upstream)
    with diagnosed(UNWRITTEN):
        ctx.compare_outputs(filled, result, " with new memory filled with nan")
        ctx.compare_gradients(sample, found, expected, " with new memory filled with nan")


@check()
def saves_nothing_on_ctx(ctx: CheckContext, sample: Sample) -> None:
    """Tensors are saved by save_for_backward, never as attributes of ctx."""
    for node in require_custom_nodes(ctx.call(*leaves(sample))):
        ctx.comparisons += 1
        kept = [name for name, value in vars(node).items() if _holds_tensor(value)]
        if kept:
            raise Mismatch(
                f"{node_name(node)} keeps a tensor as ctx.{kept[0]}: expected "
                f"ctx.save_for_backward\n"
                f"diagnosis: hidden from saved-tensor hooks and checkpointing, and a change in "
                f"place goes unnoticed"
            )


@check(builds_on=("writes_nothing", "deterministic", "saves_nothing_on_ctx"))
def stale_inputs_raise(ctx: CheckContext, sample: Sample) -> None:
    """Backward notices an argument that was changed in place after forward, or does not use it."""
    upstream = ctx.upstream(ctx.call, sample)
    _, expected = gradients(ctx.call, leaves(sample), upstream)
    for i in positions(sample):
        arguments = leaves(sample)
        with set_checkpoint_early_stop(False):  # so that all of it is seen to run again
            result = ctx.call(*arguments)
        moved = ctx.in_domain(tuple(2 * t + 1 if t is arguments[i] else t for t in arguments))
        try:
            with torch.no_grad():
                arguments[i].copy_(moved[i])
        except RuntimeError:
            continue  # its elements share memory
        try:
            found, runs_again = _gradients_and_whether_it_runs_again(result, arguments, upstream)
        except RuntimeError:
            ctx.comparisons += 1
            continue
        if runs_again and i >= len(sample) - ctx.case.parameters:
            continue  # a checkpoint, which runs again with the parameters as they are
        where = f" after {ctx.label(i)} was changed in place"
        diagnosis = "saved as .data or on ctx: the change went unnoticed"
        ctx.compare_gradients(sample, found, expected, where, diagnosis=diagnosis)


@check()
def no_leak(ctx: CheckContext, sample: Sample) -> None:
    """Everything is freed after its last use, without the garbage collector."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for with_backward in (True, False):
            ctx.comparisons += 1
            # A first call may fill caches, as those of a compiler.
            if all(_leaks(ctx, sample, with_backward) for _ in range(2)):
                raise Mismatch(
                    "a tensor is still alive after its last use: expected it to be freed\n"
                    "diagnosis: a reference cycle, such as an output kept on ctx, or a tensor "
                    "kept in a global"
                )
    finally:
        if was_enabled:
            gc.enable()


def _leaks(ctx: CheckContext, sample: Sample, with_backward: bool) -> bool:
    """Whether a tensor outlives a call."""
    arguments = leaves(sample)
    result = ctx.call(*arguments)
    upstream = [ctx.random_like(t) for t in outputs_of(result)]
    if with_backward:
        gradients_of(result, arguments, upstream)
    watched = [weakref.ref(t) for t in outputs_of(result)]
    if ctx.case.factory is None:  # some modules keep the parameters they were given
        watched += [weakref.ref(t) for t in outputs_of(arguments)]
    del result, arguments, upstream
    return any(watch() is not None for watch in watched)


def _gradients_and_whether_it_runs_again(
    result: Any, arguments: Sample, upstream: Sequence[Tensor]
) -> tuple[Gradients, bool]:
    """The gradients, and whether backward runs code with a graph of its own: a checkpoint."""
    with_graph: list[bool] = []
    with seeing_operators(lambda _: with_graph.append(torch.is_grad_enabled())):
        found = gradients_of(result, arguments, upstream, copy_upstream=False)
    return found, any(with_graph)


def _named(ctx: CheckContext, arguments: Sample) -> dict[str, Tensor]:
    """The tensors among the arguments, those without gradients too."""
    return {ctx.label(i): t for i, t in enumerate(arguments) if isinstance(t, Tensor)}


def _compare_unchanged(
    ctx: CheckContext, before: dict[str, Tensor], now: dict[str, Tensor], when: str
) -> None:
    for name, was in before.items():
        ctx.comparisons += 1
        if not torch.equal(now[name].detach().nan_to_num(), was.nan_to_num()):
            raise Mismatch(
                f"{name}: expected no change, got a change in place by {when}\n"
                f"diagnosis: {when} writes over a tensor that other code may still need"
            )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list | set):
        return any(map(_holds_tensor, value))
    if isinstance(value, Tensor | np.ndarray):
        return True
    return hasattr(value, "__dict__") and any(isinstance(t, Tensor) for t in vars(value).values())
