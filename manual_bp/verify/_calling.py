"""Calls that change their arguments in place, or give gradients by `.backward()` only."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp._torch import version
from manual_bp.verify._autograd import Gradients, gradients, leaves, outputs_of, tensors_of
from manual_bp.verify._case import Call, Sample, is_differentiable


def returned_arguments(call: Call, sample: Sample) -> list[int]:
    """The positions of the arguments that a call changes in place and returns."""
    copies = tuple(t.clone() if isinstance(t, Tensor) else t for t in leaves(sample))
    versions = [version(t) if isinstance(t, Tensor) else 0 for t in copies]
    results = tensors_of(call(*copies))
    return [
        i
        for i, (t, before) in enumerate(zip(copies, versions, strict=True))
        if isinstance(t, Tensor) and version(t) > before and any(t is r for r in results)
    ]


def with_copies(call: Call, places: Sequence[int]) -> Call:
    """A call that is given copies of the arguments at these positions."""

    def on_copies(*arguments: Any) -> Any:
        return call(*(t.clone() if i in places else t for i, t in enumerate(arguments)))

    return on_copies


def needs_backward(call: Call, sample: Sample, upstream: Sequence[Tensor]) -> bool:
    """Whether `.backward()` gives a gradient that `torch.autograd.grad` does not give."""
    try:
        _, found = gradients(call, leaves(sample), upstream)
    except Exception:
        found = {}
    if found and all(gradient is not None for gradient in found.values()):
        return False
    arguments = leaves(sample)
    grads = gradients_by_backward(call(*arguments), arguments, upstream)
    return any(grad is not None and found.get(i) is None for i, grad in grads.items())


def gradients_by_backward(
    result: Any, arguments: Sample, upstream: Sequence[Tensor | None]
) -> Gradients:
    """What `.backward()` adds to `.grad` of each argument that requires a gradient.

    `.grad` stays as it was. None in upstream counts as zero.
    """
    wanted = [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.requires_grad]
    before = [arguments[i].grad for i in wanted]
    pairs = zip(outputs_of(result), upstream, strict=True)
    outputs, given = zip(*((t, u) for t, u in pairs if t.requires_grad), strict=True)
    for i in wanted:
        arguments[i].grad = None
    try:
        torch.autograd.backward(outputs, given, retain_graph=True)
        return {i: arguments[i].grad for i in wanted}
    finally:
        for i, grad in zip(wanted, before, strict=True):
            arguments[i].grad = grad


def by_backward(call: Call, hold: Callable[[Sample], None]) -> Call:
    """The call, with gradients that come from `.grad` after a `.backward()`.

    hold: Called with the arguments before each backward, which may run parts of a module again.
    """
    return lambda *arguments: ByBackward.apply(call, hold, *arguments)


class ByBackward(Function):
    """One call whose backward runs `.backward()` on a graph of its own."""

    @staticmethod
    def forward(ctx: Any, call: Call, hold: Callable[[Sample], None], *arguments: Any) -> Any:
        """The tensors that the call returns, flat."""
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        ctx.hold = hold
        ctx.arguments = leaves(arguments, needed)
        with torch.enable_grad():
            ctx.results = tensors_of(call(*ctx.arguments))
        outputs = tuple(t.detach() for t in ctx.results)
        constant = zip(outputs, ctx.results, strict=True)
        ctx.mark_non_differentiable(*(t for t, result in constant if not result.requires_grad))
        return outputs[0] if len(outputs) == 1 else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """What `.backward()` leaves in `.grad` of each argument."""
        pairs = zip(ctx.results, upstream, strict=True)
        given = [u for t, u in pairs if is_differentiable(t)]
        ctx.hold(ctx.arguments)
        # In this thread it is part of another backward, which reentrant checkpointing refuses.
        with ThreadPoolExecutor(max_workers=1) as thread:
            work = thread.submit(gradients_by_backward, ctx.results, ctx.arguments, given)
        found = work.result()
        return None, None, *(found.get(i) for i in range(len(ctx.arguments)))
