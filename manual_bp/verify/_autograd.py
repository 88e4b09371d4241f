"""Arguments that require gradients, the gradients themselves, and the graph between them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd.function import FunctionCtx

from manual_bp._torch import is_pytorchs_function, module_of, tree_leaves
from manual_bp.verify._arguments import hides_tensors
from manual_bp.verify._case import Call, Sample, is_differentiable

Gradients = dict[int, Tensor | None]

# The module with the one Function of this kit, which stands around the code under test.
_NOT_JUDGED = "manual_bp.verify._calling"


class HiddenTensorsError(TypeError):
    """A result holds tensors where nobody looks for them."""


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """All tensors in a result, however they are nested. Those of a dict are sorted by key.

    Raises a HiddenTensorsError if a class holds some that is not registered as a pytree.
    """
    if isinstance(value, Tensor):
        return (value,)
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = [value[key] for key in sorted(value, key=str)]
    elif isinstance(value, list | tuple):
        parts = value
    elif (found := tree_leaves(value)) and found[0] is not value:
        parts = found
    elif name := hides_tensors(value):
        raise HiddenTensorsError(
            f"the result must hold its tensors in lists, tuples, dicts or classes registered as "
            f"pytrees; got some in a {name}"
        )
    return tuple(t for part in parts for t in tensors_of(part))


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    """The differentiable tensors in a result."""
    return tuple(t for t in tensors_of(value) if is_differentiable(t))


def positions(sample: Sample) -> list[int]:
    """The positions of the arguments that can have a gradient."""
    return [i for i, t in enumerate(sample) if is_differentiable(t)]


def subsets(places: Sequence[int]) -> Iterator[list[int]]:
    """All non-empty subsets of up to four positions; of more, one, all but one, and all."""
    if len(places) <= 4:
        for number in range(1, 2 ** len(places)):
            yield [place for bit, place in enumerate(places) if number >> bit & 1]
        return
    for place in places:
        yield [place]
        yield [other for other in places if other != place]
    yield list(places)


def leaves(sample: Sample, wanted: Sequence[int] | None = None) -> Sample:
    """The arguments as new leaves. Those at `wanted` (by default all) require gradients."""
    chosen = positions(sample) if wanted is None else wanted
    return tuple(
        copied(t).requires_grad_(i in chosen and is_differentiable(t))
        if isinstance(t, Tensor)
        else t
        for i, t in enumerate(sample)
    )


def copied(
    value: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A copy with the same strides, even if elements lie apart or share memory."""
    value = value.detach()
    copy = value.to(device or value.device, dtype or value.dtype, copy=True)
    if copy.stride() == value.stride():
        return copy
    size = value.untyped_storage().nbytes() // value.dtype.itemsize
    memory = value.as_strided((size,), (1,), 0).to(copy.device, copy.dtype, copy=True)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset()).detach()


def gradients(
    call: Call, arguments: Sample, upstream: Sequence[Tensor], **options: Any
) -> tuple[Any, Gradients]:
    """The result of a call, and the gradient of every argument that requires one."""
    result = call(*arguments)
    return result, gradients_of(result, arguments, upstream, **options)


def gradients_of(
    result: Any,
    arguments: Sample,
    upstream: Sequence[Tensor],
    *,
    copy_upstream: bool = True,
    **options: Any,
) -> Gradients:
    """The gradient of every argument that requires one; None where autograd gives none.

    copy_upstream: Whether backward gets copies of upstream gradients that require no gradients, so
        that one that writes over them spoils nothing else.
    """
    wanted = [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.requires_grad]
    pairs = [(t, u) for t, u in zip(outputs_of(result), upstream, strict=True) if t.requires_grad]
    if not pairs:
        return dict.fromkeys(wanted)
    outputs = [t for t, _ in pairs]
    given = [copied(u) if copy_upstream and not u.requires_grad else u for _, u in pairs]
    found = torch.autograd.grad(
        outputs, [arguments[i] for i in wanted], given, allow_unused=True, **options
    )
    return dict(zip(wanted, found, strict=True))


def tangents_of(
    call: Call, sample: Sample, tangents: Mapping[int, Tensor | None]
) -> list[Tensor | None]:
    """The tangent of each differentiable output, by forward mode."""
    with fwAD.dual_level():
        result = call(*with_tangents(sample, tangents))
        return [fwAD.unpack_dual(t).tangent for t in outputs_of(result)]


def with_tangents(sample: Sample, tangents: Mapping[int, Tensor | None]) -> Sample:
    """The arguments, as dual numbers where they have a tangent."""
    return tuple(
        fwAD.make_dual(t, tangents[i]) if i in tangents else t for i, t in enumerate(sample)
    )


def graph_of(result: Any) -> set[Any]:
    """All nodes in the graph of a result."""
    seen: set[Any] = set()
    queue = [t.grad_fn for t in outputs_of(result) if t.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [below for below, _ in node.next_functions if below is not None]
    return seen


def custom_nodes(result: Any) -> list[Any]:
    """The nodes of hand-written Functions in the graph of a result, without PyTorch's own."""
    functions = [node for node in graph_of(result) if isinstance(node, FunctionCtx)]
    return [
        node
        for node in functions
        if not (is_pytorchs_function(node) or module_of(node) == _NOT_JUDGED)
    ]


def node_name(node: Any) -> str:
    """The name of a hand-written Function, from its node."""
    return type(node).__name__.removesuffix("Backward")
