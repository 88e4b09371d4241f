"""What other tools say about a case."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify import Case
from manual_bp.verify._autograd import gradients, leaves, outputs_of, positions, tensors_of
from manual_bp.verify._case import Sample
from manual_bp.verify._context import CheckContext
from manual_bp.verify.checks._shared import cast
from manual_bp.verify.self_test import default_gradcheck
from tests.verify.museum._exhibit import Exhibit

_numbers = itertools.count()
_SCHEMA_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def what_it_says(tool: Callable[[Case], str], exhibit: Exhibit) -> str:
    """The verdict of a tool: "caught", "missed", or "refuses", if it rejects the correction too."""
    verdict = tool(exhibit.wrong)
    return "refuses" if verdict == "caught" and tool(exhibit.fixed) == "caught" else verdict


def gradcheck(case: Case) -> str:
    """`torch.autograd.gradcheck` with its defaults, in float64."""
    return default_gradcheck(case)


def allclose(case: Case) -> str:
    """The usual test: value and `.grad` against the reference, in float32.

    The upstream gradient is random, or 1 for a loss.
    """
    ctx = CheckContext(case, "allclose")
    for sample in ctx.samples:
        ours, theirs = leaves(cast(sample, torch.float32)), leaves(cast(sample, torch.float32))
        expected = outputs_of(ctx.reference(*theirs))
        upstream = [ctx.random_like(t) if t.ndim else torch.ones_like(t) for t in expected]
        torch.autograd.backward(expected, upstream)
        try:
            found = outputs_of(ctx.call(*ours))
            torch.autograd.backward(found, [u.clone() for u in upstream])
        except Exception:
            return "caught"
        pairs = [*zip(found, expected, strict=True)]
        if not all(one.shape == other.shape and _is_close(one, other) for one, other in pairs):
            return "caught"
        if not all(_is_close(ours[i].grad, theirs[i].grad) for i in positions(sample)):
            return "caught"
    return "missed"


def opcheck(case: Case) -> str:
    """`torch.library.opcheck` of the call and of its backward, each made an operator."""
    ctx = CheckContext(case, "opcheck")
    for sample in ctx.samples:
        try:
            forward, backward = _operators(ctx, sample)
        except TypeError:
            return "refuses"
        upstream = [u.detach() for u in ctx.upstream(ctx.trusted, sample)]
        try:
            with warnings.catch_warnings(action="ignore"):
                torch.library.opcheck(forward, leaves(sample))
                torch.library.opcheck(backward, (*upstream, *sample))
        except Exception:
            return "caught"
    return "missed"


def _is_close(got: Tensor | None, expected: Tensor | None) -> bool:
    if got is None or expected is None:
        return expected is None or not expected.count_nonzero()
    return torch.allclose(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def _operators(ctx: CheckContext, sample: Sample) -> tuple[Any, Any]:
    """Two operators, of the call and of its gradients.

    Raises:
        TypeError: An argument or a result is of a kind that operators do not take.
    """
    places, outputs = positions(sample), tensors_of(ctx.call(*leaves(sample, ())))
    if outputs != outputs_of(outputs):
        raise TypeError("every result must be a floating-point tensor")
    arguments = [f"{_schema_type(value)} a{i}" for i, value in enumerate(sample)]
    count = len(outputs)

    def forward(*values: Any) -> Any:
        return _one_or_several(tensors_of(ctx.call(*values)))

    def backward(*values: Any) -> Any:
        upstream, rest = values[:count], values[count:]
        with torch.enable_grad():
            _, found = gradients(ctx.call, leaves(rest), upstream)
        if not any(g is not None for g in found.values()):
            raise TypeError("the call must be an autograd.Function, not a composition")
        pairs = ((rest[i], found[i]) for i in places)
        return _one_or_several([torch.zeros_like(t) if g is None else g.clone() for t, g in pairs])

    name = f"museum::exhibit{next(_numbers)}"
    operator = _operator(name, forward, arguments, outputs)
    given = [f"Tensor u{i}" for i in range(count)]
    derivative = _operator(
        f"{name}_backward", backward, [*given, *arguments], [sample[i] for i in places]
    )

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.values = inputs

    def differentiate(context: Any, *upstream: Tensor) -> Any:
        found = tensors_of(derivative(*upstream, *context.values))
        by_place = dict(zip(places, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(sample)))

    operator.register_autograd(differentiate, setup_context=keep)
    return operator, derivative


def _operator(name: str, fn: Any, arguments: list[str], results: Any) -> Any:
    """An operator whose results have the shapes and strides of these."""
    kinds = ", ".join(["Tensor"] * len(results))
    returned = kinds if len(results) == 1 else f"({kinds})"
    schema = f"({', '.join(arguments)}) -> {returned}"
    operator = torch.library.custom_op(name, fn, mutates_args=(), schema=schema)

    def fake(*_: Any) -> Any:
        return _one_or_several(
            [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in results]
        )

    operator.register_fake(fake)
    return operator


def _one_or_several(tensors: Any) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _schema_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "Tensor"
    if type(value) not in _SCHEMA_TYPES:
        raise TypeError(f"arguments must be tensors, numbers or strings; got {type(value)}")
    return _SCHEMA_TYPES[type(value)]
