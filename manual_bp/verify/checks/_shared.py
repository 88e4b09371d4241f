"""What several checks share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._bench import (
    Bench,
    Call,
    custom_nodes,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import Mismatch

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([torch.ones_like(t), t], -1)[..., 1],
    "shifted": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
}


def is_plain(value: Tensor) -> bool:
    """Whether the elements are all of its memory, one after the other."""
    return value.is_contiguous() and not value.storage_offset()


def compare_with_reference(
    bench: Bench, arguments: Sample, where: str, *, far_out: bool = False
) -> None:
    """Compare outputs and gradients with the reference's, unless that refuses the arguments.

    Where its output is not finite, as the logarithm's is below 0, the candidate may refuse them.
    """
    try:
        upstream = bench.upstream(bench.reference, arguments)
    except Exception:
        return
    right, expected = gradients(bench.reference, leaves(arguments), upstream)
    try:
        result, found = gradients(bench.case.call, leaves(arguments), upstream)
    except Exception:
        if all(t.isfinite().all() for t in outputs_of(right)):
            raise
        return
    bench.same_outputs(result, right, where)
    bench.same_gradients(arguments, found, expected, where, far_out=far_out)


def compare_raw(bench: Bench, arguments: Sample, result: Any) -> None:
    """Call every hand-written backward once more, by itself, with what came to it from above."""
    nodes = custom_nodes(result)
    above: dict[Any, Any] = {}
    for node in nodes:
        node.register_prehook(partial(above.__setitem__, node))
    upstream = [bench.random_like(t) for t in outputs_of(result)]
    gradients_of(result, arguments, upstream, retain_graph=True)
    for node in nodes:
        if any(gradient is None for gradient in above.get(node, [None])):
            continue  # some output of it was not used
        with torch.no_grad():
            returned = node.apply(*above[node])
        returned = returned if isinstance(returned, tuple) else (returned,)
        edges = iter([edge for edge in node.next_functions if edge[0] is not None])
        # PyTorch lets a backward leave out what follows its last gradient, and add None to it.
        for i, (gradient, needed) in enumerate(zip(returned, node.needs_input_grad, strict=False)):
            if not needed:
                continue
            next_node, slot = next(edges)
            if gradient is not None:
                bench.comparisons += 1
                _compare_kind(node, i, gradient, next_node._input_metadata[slot])


def _compare_kind(node: Any, i: int, gradient: Tensor, wanted: Any) -> None:
    for what, got, expected in (
        ("shape", tuple(gradient.shape), tuple(wanted.shape)),
        ("dtype", gradient.dtype, wanted.dtype),
        ("device", gradient.device, wanted.device),
    ):
        if got != expected:
            story = "missing a sum over the batch"
            if what == "dtype":
                is_wider = gradient.dtype.itemsize > wanted.dtype.itemsize
                story = "promoted by a tensor of a wider dtype" if is_wider else "dtype demoted"
            raise Mismatch(
                f"{what} of gradient {i} as {node_name(node)} returned it: expected {expected}, "
                f"got {got}\ndiagnosis: {story}; the engine hides it by a cast"
            )


def node_name(node: Any) -> str:
    """What a hand-written Function is called."""
    return type(node).__name__.removesuffix("Backward")


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """The real tensors of a sample in another dtype."""
    return tuple(
        t.detach().to(dtype) if is_differentiable(t) and not t.is_complex() else t for t in sample
    )


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}"
    return line if len(line) <= 100 else f"{line[:97]}..."


def pairs_of_one_shape(bench: Bench) -> list[tuple[Sample, int, int]]:
    """The samples in which one tensor could stand for two arguments, and for which."""
    return [
        (sample, i, j)
        for sample in bench.samples
        for i in positions(sample)
        for j in positions(sample)
        if i < j and sample[i].shape == sample[j].shape and sample[i].dtype == sample[j].dtype
    ]


def tied(call: Call, i: int, j: int) -> Call:
    """The call with its argument i in the place of its argument j too."""

    def once(*arguments: Any) -> Any:
        return call(*arguments[:j], arguments[i], *arguments[j + 1 :])

    return once
