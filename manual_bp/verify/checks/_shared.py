"""What several checks share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manual_bp._torch import expected_gradient
from manual_bp.verify._autograd import (
    custom_nodes,
    gradients,
    gradients_of,
    leaves,
    node_name,
    outputs_of,
    positions,
)
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._check import CheckContext
from manual_bp.verify._compare import Mismatch, NotApplicable

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([torch.ones_like(t), t], -1)[..., 1],
    "shifted": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
}


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is contiguous and starts where its memory starts."""
    return value.is_contiguous() and not value.storage_offset()


def compare_with_reference(
    ctx: CheckContext, arguments: Sample, where: str, *, is_large: bool = False
) -> None:
    """Compare outputs and gradients with the reference's, unless it refuses the arguments.

    Where the reference's output is not finite (a logarithm below 0), the call may refuse them too.
    """
    reference = ctx.reference
    try:
        upstream = ctx.upstream(reference, arguments)
    except Exception:
        return
    expected_result, expected = gradients(reference, leaves(arguments), upstream)
    try:
        result, found = gradients(ctx.call, leaves(arguments), upstream)
    except Exception:
        if all(t.isfinite().all() for t in outputs_of(expected_result)):
            raise
        return
    ctx.compare_outputs(result, expected_result, where)
    ctx.compare_gradients(arguments, found, expected, where, is_large=is_large)


def require_custom_nodes(result: Any) -> list[Any]:
    """The nodes of hand-written Functions in the graph, for checks that need one."""
    nodes = custom_nodes(result)
    if not nodes:
        raise NotApplicable("no hand-written Function in the graph")
    return nodes


def compare_raw(ctx: CheckContext, arguments: Sample, result: Any) -> None:
    """Call every hand-written backward once more, by itself, with its own upstream gradients."""
    nodes = custom_nodes(result)
    received: dict[Any, Any] = {}
    for node in nodes:
        node.register_prehook(partial(received.__setitem__, node))
    upstream = [ctx.random_like(t) for t in outputs_of(result)]
    gradients_of(result, arguments, upstream, retain_graph=True)
    for node in nodes:
        if any(gradient is None for gradient in received.get(node, [None])):
            continue  # one of its outputs was not used
        with torch.no_grad():
            returned = node.apply(*received[node])
        returned = returned if isinstance(returned, tuple) else (returned,)
        edges = iter([edge for edge in node.next_functions if edge[0] is not None])
        # A backward may return fewer values than there are arguments, or more that are None.
        for i, (gradient, needed) in enumerate(zip(returned, node.needs_input_grad, strict=False)):
            if not needed:
                continue
            next_node, slot = next(edges)
            wanted = expected_gradient(next_node, slot)
            if gradient is not None and wanted is not None:
                ctx.comparisons += 1
                _compare_kind(node, i, gradient, wanted)


def _compare_kind(node: Any, i: int, gradient: Tensor, wanted: Any) -> None:
    for what, got, expected in (
        ("shape", tuple(gradient.shape), tuple(wanted.shape)),
        ("dtype", gradient.dtype, wanted.dtype),
        ("device", gradient.device, wanted.device),
    ):
        if got != expected:
            diagnosis = "missing a sum over the batch"
            if what == "dtype":
                is_wider = gradient.dtype.itemsize > wanted.dtype.itemsize
                diagnosis = "promoted by a tensor of a wider dtype" if is_wider else "dtype demoted"
            raise Mismatch(
                f"{what} of gradient {i} as {node_name(node)} returned it: expected {expected}, "
                f"got {got}\ndiagnosis: {diagnosis}; the autograd engine hides it by a cast"
            )


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """The real tensors of a sample in another dtype."""
    return tuple(
        t.detach().to(dtype) if is_differentiable(t) and not t.is_complex() else t for t in sample
    )


def require_real(sample: Sample) -> None:
    """Refuse a sample with complex tensors, for checks of lower precision."""
    if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
        raise NotApplicable("the sample is complex")


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}"
    return line if len(line) <= 100 else f"{line[:97]}..."


def pairs_of_one_shape(sample: Sample) -> list[tuple[int, int]]:
    """The pairs of arguments that one tensor could replace."""
    return [
        (i, j)
        for i in positions(sample)
        for j in positions(sample)
        if i < j and sample[i].shape == sample[j].shape and sample[i].dtype == sample[j].dtype
    ]


def tied(call: Call, i: int, j: int) -> Call:
    """The call with its argument i in the place of argument j as well."""

    def once(*arguments: Any) -> Any:
        return call(*arguments[:j], arguments[i], *arguments[j + 1 :])

    return once
