"""Several calls, several backwards, and one tensor as two arguments."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
    tensors_of,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import exact
from manual_bp.verify.checks._shared import (
    compare_with_reference,
    diagnosed,
    pairs_of_one_shape,
    tied,
)

_Rewrite = Callable[[list[Any], int, Tensor], None]
_OVERWRITTEN = "kept in one place for all calls, where the next call overwrites it"
_STALE = "a cache is not renewed: it is keyed by an address, an id or a shape, or by nothing"


@check(builds_on=("writes_nothing", "deterministic", "interleaved_calls"))
def repeatable_backward(ctx: CheckContext, sample: Sample) -> None:
    """Two backwards through one graph give the same gradients, and `.grad` adds up."""
    arguments = leaves(sample)
    result = ctx.call(*arguments)
    upstream = [ctx.random_like(t) for t in outputs_of(result)]
    first = gradients_of(result, arguments, upstream, retain_graph=True)
    kept = {i: None if g is None else g.clone() for i, g in first.items()}
    second = gradients_of(result, arguments, upstream, retain_graph=True)
    ctx.compare_gradients(sample, second, kept, " of a second backward")
    gradients_of(result, arguments, [2 * u for u in upstream], retain_graph=True)
    where = " of the first backward, read after another one"
    diagnosis = "a buffer is returned, and overwritten by the next backward"
    ctx.compare_gradients(sample, first, kept, where, diagnosis=diagnosis)
    if not all(output.requires_grad for output in outputs_of(result)):
        return
    for _ in range(2):
        torch.autograd.backward(outputs_of(result), upstream, retain_graph=True)
    added = {i: arguments[i].grad for i in positions(sample)}
    twice: Gradients = {i: None if g is None else 2 * g for i, g in kept.items()}
    ctx.compare_gradients(sample, added, twice, " added up in .grad by two backwards")


@check(builds_on=("writes_nothing", "deterministic"))
def interleaved_calls(ctx: CheckContext, sample: Sample) -> None:
    """Calls between another call's forward and backward change nothing for any of them."""
    alone = _alone(ctx, sample)
    others = [call for other in _other_samples(ctx, sample) if (call := _try(ctx, other))]
    sharing = [call for other in _sharing(ctx, sample) if (call := _try(ctx, other))]
    for calls in ([alone, *others[:1]], [alone, *others], [alone, *sharing]):
        _compare_interleaved(ctx, calls, backwards=calls)
        _compare_interleaved(ctx, calls, backwards=calls[::-1])
    _compare_retained(ctx, alone, others)
    _compare_in_thread(ctx, alone)


@check(builds_on=("writes_nothing", "deterministic", "interleaved_calls"))
def stale_caches(ctx: CheckContext, sample: Sample) -> None:
    """A call sees new values in an old tensor, and in a new tensor at an old one's address."""
    for i in positions(sample):
        others = (_with(sample, i, other[i]) for other in _of_the_same_shapes(ctx, sample))
        new = next((call for other in others if (call := _try(ctx, other))), None)
        if new is None:
            continue
        _compare_rewritten(ctx, sample, i, new, " was changed in place", _write)
        _compare_rewritten(ctx, sample, i, new, " was given another .data", _give_data)
        if (
            i < len(sample) - ctx.case.parameters
        ):  # a module keeps those, so no other tensor gets their memory
            _compare_rewritten(ctx, sample, i, new, " was freed and its memory used again", _reuse)


@check(builds_on=("writes_nothing", "deterministic", "interleaved_calls"))
def non_leaf_arguments(ctx: CheckContext, sample: Sample) -> None:
    """Arguments that another operation computed count like leaves, and so do parameters."""
    alone = _alone(ctx, sample)
    variables = leaves(sample)
    computed = tuple(t * 1 if is_differentiable(t) else t for t in variables)
    result = ctx.call(*computed)
    found = gradients_of(result, variables, alone.upstream)
    parameters = tuple(nn.Parameter(t) if is_differentiable(t) else t for t in leaves(sample))
    _, of_parameters = gradients(ctx.call, parameters, alone.upstream)
    with diagnosed("it asks what kind of tensor an argument is"):
        for i in positions(sample):
            what = f"{ctx.label(i)}, computed by another operation, after the call"
            ctx.compare(what, computed[i].detach(), variables[i].detach())
        where = " of arguments computed by another operation"
        ctx.compare_outputs(result, alone.outputs, where)
        ctx.compare_gradients(sample, found, alone.gradients, where)
        where = " of arguments that are parameters"
        ctx.compare_gradients(sample, of_parameters, alone.gradients, where)


@check(builds_on=SLOPE)
def tied_inputs(ctx: CheckContext, sample: Sample) -> None:
    """One tensor given as two arguments gets the sum of both gradients."""
    pairs = pairs_of_one_shape(sample)
    if not pairs:
        raise NotApplicable("no two arguments have the same shape")
    usual = exact(ctx.reference, sample, ctx.upstream(ctx.call, sample))
    for i, j in pairs:
        if ctx.case.project.get(i) is not ctx.case.project.get(j):
            continue  # one tensor may not be in both domains
        wanted = [place for place in positions(sample) if place != j]
        once = partial(tied, i=i, j=j)
        where = f" where {ctx.label(j)} is the same tensor as {ctx.label(i)}"
        compare_with_reference(ctx, sample, where, change=once, wanted=wanted, usual=usual)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call, and what it gives if no other call comes between its forward and its backward."""

    sample: Sample
    upstream: Sequence[Tensor]
    outputs: tuple[Tensor, ...]
    gradients: Gradients


def _alone(ctx: CheckContext, sample: Sample) -> _Call:
    upstream = ctx.upstream(ctx.call, sample)
    result, found = gradients(ctx.call, leaves(sample), upstream)
    # Copies, since a later call may overwrite a buffer that is returned.
    outputs = tuple(t.detach().clone() for t in tensors_of(result))
    copies = {i: None if g is None else g.clone() for i, g in found.items()}
    return _Call(sample, upstream, outputs, copies)


def _try(ctx: CheckContext, sample: Sample) -> _Call | None:
    """The same, unless these arguments are out of the domain."""
    try:
        ctx.upstream(ctx.trusted, sample)
        return _alone(ctx, sample)
    except Exception:
        return None


def _compare_interleaved(
    ctx: CheckContext, calls: Sequence[_Call], backwards: Sequence[_Call]
) -> None:
    """Run all forwards, then one without gradients, then the backwards in this order."""
    shared: dict[int, Any] = {}
    arguments, results = {}, {}
    for call in calls:
        # A tensor that is in several samples becomes one leaf, as a weight used twice.
        made = zip(call.sample, leaves(call.sample), strict=True)
        arguments[call] = tuple(shared.setdefault(id(given), leaf) for given, leaf in made)
        results[call] = ctx.call(*arguments[call])
    with torch.no_grad():
        ctx.call(*arguments[calls[-1]])
    with diagnosed(_OVERWRITTEN):
        for call in calls:
            ctx.compare_outputs(results[call], call.outputs, ", read after another call")
    # All backwards before the first comparison, since a later one may overwrite what one returned.
    found = {
        call: gradients_of(results[call], arguments[call], call.upstream) for call in backwards
    }
    where = " with other calls between its forward and its backward"
    for call, one in found.items():
        ctx.compare_gradients(call.sample, one, call.gradients, where, diagnosis=_OVERWRITTEN)


def _compare_retained(ctx: CheckContext, call: _Call, others: Sequence[_Call]) -> None:
    """Run a second backward through one graph, after another call's forward and backward."""
    arguments = leaves(call.sample)
    result = ctx.call(*arguments)
    gradients_of(result, arguments, call.upstream, retain_graph=True)
    for other in others:
        gradients(ctx.call, leaves(other.sample), other.upstream)
    found = gradients_of(result, arguments, call.upstream)
    where = " of a second backward, with another call before it"
    ctx.compare_gradients(call.sample, found, call.gradients, where, diagnosis=_OVERWRITTEN)


def _compare_rewritten(
    ctx: CheckContext, sample: Sample, i: int, new: _Call, what: str, rewrite: _Rewrite
) -> None:
    """Call with a sample, give argument i new values, and compare another call with a fresh one."""
    upstream = ctx.upstream(ctx.call, sample)
    arguments = list(leaves(sample))
    memory = arguments[i].detach().clone()
    # Its own count of changes, as a tensor has that gets the memory of a freed one.
    arguments[i] = memory.data.requires_grad_()
    gradients(ctx.call, tuple(arguments), upstream)
    rewrite(arguments, i, new.sample[i])
    result, found = gradients(ctx.call, tuple(arguments), new.upstream)
    where = f" after {ctx.label(i)}{what}"
    with diagnosed(_STALE):
        ctx.compare_outputs(result, new.outputs, where)
        ctx.compare_gradients(new.sample, found, new.gradients, where)


def _write(arguments: list[Any], i: int, value: Tensor) -> None:
    with torch.no_grad():
        arguments[i].copy_(value)


def _give_data(arguments: list[Any], i: int, value: Tensor) -> None:
    arguments[i].data = value.clone()


def _reuse(arguments: list[Any], i: int, value: Tensor) -> None:
    """Put a new tensor where the old one was in memory, with its id if Python gives it."""
    old = arguments[i]
    number, memory = id(old), old.data
    arguments[i] = old = None
    memory.copy_(value)
    kept = []
    for _ in range(8):
        kept.append(memory.data)
        if id(kept[-1]) == number:
            break
    arguments[i] = kept[-1].requires_grad_()


def _of_the_same_shapes(ctx: CheckContext, sample: Sample) -> list[Sample]:
    """Other samples whose tensors have the shapes of this one's."""
    shapes = [getattr(t, "shape", None) for t in sample]
    return [
        other
        for other in _other_samples(ctx, sample)
        if [getattr(t, "shape", None) for t in other] == shapes
    ]


def _with(sample: Sample, i: int, value: Tensor) -> Sample:
    return tuple(value if j == i else t for j, t in enumerate(sample))


def _compare_in_thread(ctx: CheckContext, call: _Call) -> None:
    """Run the backward in another thread, as PyTorch does on an accelerator."""
    arguments = leaves(call.sample)
    result = ctx.call(*arguments)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gradients_of, result, arguments, call.upstream).result()
    diagnosis = "kept for the thread of the forward; on a GPU, backward runs in another one"
    where = " of a backward in another thread"
    ctx.compare_gradients(call.sample, found, call.gradients, where, diagnosis=diagnosis)


def _sharing(ctx: CheckContext, sample: Sample) -> list[Sample]:
    """The same tensors again, and samples in which one argument is another."""
    new = next(iter(_of_the_same_shapes(ctx, sample)), sample)
    count = len(sample) - ctx.case.parameters
    return [tuple(sample), *(_with(sample, i, new[i]) for i in positions(sample[:count]))]


def _other_samples(ctx: CheckContext, sample: Sample) -> list[Sample]:
    """Samples for a call in between: newly drawn ones, and changes of this one.

    The first has the shapes of this one, the second those of the next one.
    """
    drawn = ctx.draw(ctx.dtypes_of(sample))
    place = next(i for i, other in enumerate(ctx.samples) if other is sample)
    others = [drawn[i % len(drawn)] for i in {place % len(drawn), (place + 1) % len(drawn)}]
    others += [_changed(sample, how) for how in (_flipped, torch.neg, lambda t: t / 2)]
    return [ctx.in_domain(_with_parameters(ctx, other, sample)) for other in others]


def _with_parameters(ctx: CheckContext, other: Sample, sample: Sample) -> Sample:
    """Other inputs of a module with the parameters of a sample: two calls of it share them."""
    count = len(sample) - ctx.case.parameters
    return (*other[: len(other) - ctx.case.parameters], *sample[count:])


def _flipped(value: Tensor) -> Tensor:
    return value.flip(0) if value.ndim else value


def _changed(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return tuple(change(t) if is_differentiable(t) else t for t in sample)
