"""Calls that change their arguments in place, or give gradients by `.backward()` only."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp._torch import version
from manual_bp.verify._autograd import gradients, leaves, outputs_of, tensors_of
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
    pairs = zip(outputs_of(call(*arguments)), upstream, strict=True)
    outputs, given = zip(*((t, u) for t, u in pairs if t.requires_grad), strict=True)
    torch.autograd.backward(outputs, given)
    grads = {i: t.grad for i, t in enumerate(arguments) if is_differentiable(t)}
    return any(grad is not None and found.get(i) is None for i, grad in grads.items())


def by_backward(call: Call) -> Call:
    """The call, with gradients that come from `.grad` after a `.backward()`."""
    return lambda *arguments: ByBackward.apply(call, *arguments)


class ByBackward(Function):
    """One call whose backward runs `.backward()` on a graph of its own."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arguments: Any) -> Any:
        """The tensors that the call returns, flat."""
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
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
        pairs = [(t, u) for t, u in zip(ctx.results, upstream, strict=True) if t.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        for t in ctx.arguments:
            if isinstance(t, Tensor):
                t.grad = None
        # In this thread it is part of another backward, which reentrant checkpointing refuses.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(torch.autograd.backward, outputs, given, retain_graph=True).result()
        return None, *(t.grad if isinstance(t, Tensor) else None for t in ctx.arguments)
