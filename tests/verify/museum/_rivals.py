"""What other tools say about a case."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify import Case
from manual_bp.verify._autograd import gradients, leaves, outputs_of, positions
from manual_bp.verify._check import CheckContext
from manual_bp.verify.checks._shared import cast
from manual_bp.verify.self_test import default_gradcheck
from tests.verify.museum._exhibit import Exhibit

_numbers = itertools.count()
_SCHEMA_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def what_it_says(tool: Callable[[Case], str], exhibit: Exhibit) -> str:
    """The verdict of a tool: "caught", "missed", "refuses" or, if the fixed one fails, "alarm"."""
    verdict = tool(exhibit.wrong)
    return "alarm" if verdict == "caught" and tool(exhibit.fixed) == "caught" else verdict


def gradcheck(case: Case) -> str:
    """`torch.autograd.gradcheck` with its defaults, in float64."""
    return default_gradcheck(case)


def allclose(case: Case) -> str:
    """A usual test: value and gradients against the reference, in float32.

    The upstream gradient is random, or 1 for a loss.
    """
    ctx = CheckContext(case, "allclose")
    for sample in ctx.samples:
        low = cast(sample, torch.float32)
        try:
            outputs = outputs_of(ctx.reference(*leaves(low)))
            upstream = [ctx.random_like(t) if t.ndim else torch.ones_like(t) for t in outputs]
            result, found = gradients(ctx.call, leaves(low), [u.clone() for u in upstream])
        except Exception:
            return "caught"
        _, expected = gradients(ctx.reference, leaves(low), upstream)
        got = [*outputs_of(result), *found.values()]
        pairs = zip(got, [*outputs, *expected.values()], strict=True)
        if not all(_is_close(one, other) for one, other in pairs):
            return "caught"
    return "missed"


def opcheck(case: Case) -> str:
    """`torch.library.opcheck` of the call and of its backward, each made an operator."""
    ctx = CheckContext(case, "opcheck")
    try:
        forward, backward = _operators(ctx)
    except TypeError:
        return "refuses"
    with warnings.catch_warnings(action="ignore"):
        for sample in ctx.samples:
            upstream = [u.detach() for u in ctx.upstream(ctx.trusted, sample)]
            try:
                torch.library.opcheck(forward, leaves(sample))
                torch.library.opcheck(backward, (*upstream, *sample))
            except Exception:
                return "caught"
    return "missed"


def _is_close(got: Tensor | None, expected: Tensor | None) -> bool:
    if got is None or expected is None:
        return expected is None or not expected.count_nonzero()
    return got.shape == expected.shape and torch.allclose(
        got, expected.to(got.dtype), rtol=1e-3, atol=1e-5, equal_nan=True
    )


def _operators(ctx: CheckContext) -> tuple[Any, Any]:
    """Two operators, of the call and of its gradients.

    Raises:
        TypeError: An argument or a result is of a kind that operators do not take.
    """
    sample, places = ctx.samples[0], positions(ctx.samples[0])
    results = ctx.call(*leaves(sample, ()))
    if not all(isinstance(t, Tensor) for t in (results if _is_several(results) else [results])):
        raise TypeError("results must be tensors")
    count = len(outputs_of(results))
    name = f"museum::exhibit{next(_numbers)}"
    kinds = [_schema_type(value) for value in sample]
    arguments = [f"{kind} a{i}" for i, kind in enumerate(kinds)]
    given = [f"Tensor u{i}" for i in range(count)]

    def forward(*values: Any) -> Any:
        outputs = outputs_of(ctx.call(*values))
        return outputs if len(outputs) > 1 else outputs[0]

    def backward(*values: Any) -> Any:
        upstream, rest = values[:count], values[count:]
        with torch.enable_grad():
            _, found = gradients(ctx.call, leaves(rest), upstream)
        made = [torch.zeros_like(rest[i]) if found[i] is None else found[i] for i in places]
        return tuple(made) if len(made) > 1 else made[0]

    def like(*values: Any) -> Any:
        made = [torch.empty_like(values[count + i]) for i in places]
        return tuple(made) if len(made) > 1 else made[0]

    operator = _operator(name, forward, arguments, count)
    operator.register_fake(lambda *values: forward(*values))
    derivative = _operator(f"{name}_backward", backward, [*given, *arguments], len(places))
    derivative.register_fake(like)

    def apply_derivative(context: Any, *upstream: Tensor) -> Any:
        found = derivative(*upstream, *context.values)
        by_place = dict(zip(places, found if len(places) > 1 else [found], strict=True))
        return tuple(by_place.get(i) for i in range(len(sample)))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.values = inputs

    operator.register_autograd(apply_derivative, setup_context=keep)
    return operator, derivative


def _operator(name: str, fn: Any, arguments: list[str], count: int) -> Any:
    returned = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    schema = f"({', '.join(arguments)}) -> {returned}"
    return torch.library.custom_op(name, fn, mutates_args=(), schema=schema)


def _schema_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "Tensor"
    if type(value) not in _SCHEMA_TYPES:
        raise TypeError(f"arguments must be tensors, numbers or strings; got {type(value)}")
    return _SCHEMA_TYPES[type(value)]


def _is_several(value: Any) -> bool:
    return isinstance(value, tuple | list)
