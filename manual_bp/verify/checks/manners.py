"""The manners of a backward: what it returns, writes to, keeps and leaves behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manual_bp.verify._bench import (
    Bench,
    Gradients,
    custom_nodes,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify.checks._shared import (
    compare_raw,
    node_name,
    pairs_of_one_shape,
    tied,
)


def raw_backward(bench: Bench) -> None:
    """What a backward returns has the shape, dtype and device of its argument, before any cast."""
    for sample in bench.samples:
        arguments = leaves(sample)
        result = bench.case.call(*arguments)
        if not custom_nodes(result):
            raise NotApplicable("no hand-written Function in the graph")
        compare_raw(bench, arguments, result)


def writes_nothing(bench: Bench) -> None:
    """Neither forward nor backward changes an argument, an output or the upstream gradient."""
    for sample in bench.samples:
        arguments = leaves(sample)
        upstream = bench.upstream(bench.case.call, sample)
        before = {bench.case.label(i): arguments[i].detach().clone() for i in positions(sample)}
        result = bench.case.call(*arguments)
        now = {bench.case.label(i): arguments[i] for i in positions(sample)}
        _compare_unchanged(bench, before, now, "forward")
        for i, (u, output) in enumerate(zip(upstream, outputs_of(result), strict=True)):
            before |= {f"upstream gradient {i}": u.clone(), f"output {i}": output.detach().clone()}
            now |= {f"upstream gradient {i}": u, f"output {i}": output}
        gradients_of(result, arguments, upstream)
        _compare_unchanged(bench, before, now, "backward")


def saves_nothing_on_ctx(bench: Bench) -> None:
    """Tensors are kept by save_for_backward, never as attributes of ctx."""
    for sample in bench.samples:
        nodes = custom_nodes(bench.case.call(*leaves(sample)))
        if not nodes:
            raise NotApplicable("no hand-written Function in the graph")
        for node in nodes:
            bench.comparisons += 1
            kept = [name for name, value in vars(node).items() if _holds_tensor(value)]
            if kept:
                raise Mismatch(
                    f"{node_name(node)} keeps a tensor as ctx.{kept[0]}: expected "
                    f"ctx.save_for_backward\n"
                    f"diagnosis: hidden from saved-tensor hooks and checkpointing, and a change "
                    f"in place goes unnoticed"
                )


def stale_inputs_raise(bench: Bench) -> None:
    """An argument changed in place after forward is noticed in backward, or does not matter."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        _, expected = gradients(bench.case.call, leaves(sample), upstream)
        for i in positions(sample):
            arguments = leaves(sample)
            result = bench.case.call(*arguments)
            with torch.no_grad():
                arguments[i].mul_(2).add_(1)
            try:
                found = gradients_of(result, arguments, upstream)
            except RuntimeError:
                bench.comparisons += 1
                continue
            bench.same_gradients(
                sample,
                found,
                expected,
                f" after {bench.case.label(i)} was changed in place",
                story="kept by .data or on ctx: the change went unnoticed",
            )


def no_leak(bench: Bench) -> None:
    """Without the garbage collector's help, nothing outlives the last use."""
    collects = gc.isenabled()
    gc.disable()
    try:
        for sample in bench.samples:
            for with_backward in (True, False):
                arguments = leaves(sample)
                result = bench.case.call(*arguments)
                upstream = [bench.random_like(t) for t in outputs_of(result)]
                if with_backward:
                    gradients_of(result, arguments, upstream)
                watched = [weakref.ref(t) for t in outputs_of(result)]
                if bench.case.factory is None:  # some modules keep the parameters they were given
                    watched += [weakref.ref(t) for t in outputs_of(arguments)]
                del result, arguments, upstream
                bench.comparisons += 1
                if any(watch() is not None for watch in watched):
                    raise Mismatch(
                        "a tensor is still there after its last use: expected it to be freed\n"
                        "diagnosis: a reference cycle, such as an output kept on ctx, or a "
                        "tensor kept in a global"
                    )
    finally:
        if collects:
            gc.enable()


def repeatable_backward(bench: Bench) -> None:
    """Backward twice through one graph gives the same twice, and `.grad` adds up."""
    for sample in bench.samples:
        arguments = leaves(sample)
        result = bench.case.call(*arguments)
        upstream = [bench.random_like(t) for t in outputs_of(result)]
        first = gradients_of(result, arguments, upstream, retain_graph=True)
        kept = {i: None if g is None else g.clone() for i, g in first.items()}
        second = gradients_of(result, arguments, upstream, retain_graph=True)
        bench.same_gradients(sample, second, kept, " the second time")
        gradients_of(result, arguments, [2 * u for u in upstream], retain_graph=True)
        bench.same_gradients(
            sample,
            first,
            kept,
            " of the first time, looked at after another backward",
            story="a buffer is returned, and overwritten by the next backward",
        )
        if not all(output.requires_grad for output in outputs_of(result)):
            continue
        for _ in range(2):
            torch.autograd.backward(outputs_of(result), upstream, retain_graph=True)
        added = {i: arguments[i].grad for i in positions(sample)}
        twice: Gradients = {i: None if g is None else 2 * g for i, g in kept.items()}
        bench.same_gradients(sample, added, twice, " added up in .grad by two calls")


def deterministic(bench: Bench) -> None:
    """Two calls with the same arguments agree."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        kept = [u.clone() for u in upstream]  # whoever writes to it is found by writes_nothing
        one, of_one = gradients(bench.case.call, leaves(sample), kept)
        other, of_other = gradients(bench.case.call, leaves(sample), upstream)
        try:
            bench.same_outputs(other, one, " of a second call")
            bench.same_gradients(sample, of_other, of_one, " of a second call")
        except Mismatch as mismatch:
            raise mismatch.diagnosed(
                "random, or it remembers earlier calls: draw random numbers outside of the call "
                "and pass them as an argument, or seed them within it"
            ) from None


def interleaved_calls(bench: Bench) -> None:
    """A call between another's forward and backward changes nothing for either of them."""
    call = bench.case.call
    anew = bench.drawn()
    for k, sample in enumerate(bench.samples):
        # One of the same shapes, and the next one. Where samples are a fixed list these hold the
        # same values, and not every value is in the domain: hence some more.
        others = [anew[j % len(anew)] for j in {k, (k + 1) % len(bench.samples)}]
        others += [_changed(sample, how) for how in (_flipped, torch.neg, lambda t: t / 2)]
        upstream = bench.upstream(call, sample)
        _, expected = gradients(call, leaves(sample), upstream)
        for other in others:
            try:
                above = bench.upstream(bench.trusted, other)
                _, expected_other = gradients(call, leaves(other), above)
            except Exception:
                continue  # out of the domain
            one, two = leaves(sample), leaves(other)
            result, result_other = call(*one), call(*two)
            # First in, first out: a stack would be right the other way round.
            found = gradients_of(result, one, upstream)
            found_other = gradients_of(result_other, two, above)
            for arguments, got, right, where in (
                (sample, found, expected, " with another call before its backward"),
                (
                    other,
                    found_other,
                    expected_other,
                    " with another call's backward before its own",
                ),
            ):
                story = "kept in one place for all calls, where the next call overwrites it"
                bench.same_gradients(arguments, got, right, where, story=story)


def tied_inputs(bench: Bench) -> None:
    """One tensor in the place of two arguments gets the sum of both gradients."""
    pairs = pairs_of_one_shape(bench)
    if not pairs:
        raise NotApplicable("no sample has two arguments of the same shape")
    bench.samples = [sample for sample, _, _ in pairs]
    for sample, i, j in pairs:
        upstream = bench.upstream(bench.case.call, sample)
        wanted = [place for place in positions(sample) if place != j]
        _, found = gradients(tied(bench.case.call, i, j), leaves(sample, wanted), upstream)
        _, expected = gradients(tied(bench.reference, i, j), leaves(sample, wanted), upstream)
        both = f" which is also {bench.case.label(j)}"
        bench.same_gradients(sample, {i: found[i]}, {i: expected[i]}, both)


def _flipped(value: Tensor) -> Tensor:
    return value.flip(0) if value.ndim else value


def _changed(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return tuple(change(t) if is_differentiable(t) else t for t in sample)


def _compare_unchanged(
    bench: Bench, before: dict[str, Tensor], now: dict[str, Tensor], when: str
) -> None:
    for name, was in before.items():
        bench.comparisons += 1
        if not torch.equal(now[name].detach().nan_to_num(), was.nan_to_num()):
            raise Mismatch(f"{name}: expected it untouched, got it changed in place by {when}")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list | set):
        return any(map(_holds_tensor, value))
    if isinstance(value, Tensor | np.ndarray):
        return True
    return hasattr(value, "__dict__") and any(isinstance(t, Tensor) for t in vars(value).values())
