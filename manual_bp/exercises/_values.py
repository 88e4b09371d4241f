"""From the arguments of an exercise to those of a learner's function, and back from its results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manual_bp.exercises._exercise import Axes, Exercise, Spec, each


class MalformedError(Exception):
    """A result is not what is asked. The message says so in one sentence."""


def given(value: Any, spec: Spec, *, columns: bool, as_torch: bool) -> Any:
    """An argument in the learner's form: a new array, a list of arrays, or a function of one."""
    if isinstance(value, list):
        pairs = zip(value, each(spec), strict=True)
        return [given(v, axes, columns=columns, as_torch=as_torch) for v, axes in pairs]
    if not isinstance(value, Tensor):
        return _of_arrays(value, as_torch=as_torch)
    value = in_form(value, each(spec)[0], columns=columns).clone()
    return value if as_torch else value.numpy()


def in_form(value: Tensor, axes: Axes, *, columns: bool) -> Tensor:
    """From one sample a row to one sample a column, if the learner wants that. Its own inverse."""
    if not columns:
        return value
    if value.ndim == 2 and len(axes) == 2 and axes[0] == "N":
        return value.mT.contiguous()
    return value[:, None] if axes and len(axes) == value.ndim == 1 and axes != ("N",) else value


def taken(result: Any, exercise: Exercise, *, columns: bool) -> list[Tensor]:
    """All arrays in what a learner's function returned, one sample a row.

    Raises:
        MalformedError: It is not as many numbers, arrays and lists as asked.
    """
    specs = exercise.results
    if result is None:
        raise MalformedError("it returns None: is the return missing?")
    if len(specs) == 1:
        (spec,) = specs.values()
        return _arrays(exercise.function, result, spec, columns=columns)
    names = ", ".join(specs)
    if isinstance(result, dict):
        result = [result[name] for name in specs if name in result]
    if not isinstance(result, tuple | list) or len(result) != len(specs):
        count = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        kind = f"{_a(type(result).__name__)}{count}"
        raise MalformedError(f"it must return {len(specs)} results, ({names}); it returns {kind}")
    pairs = zip(result, specs.items(), strict=True)
    return [t for part, (name, s) in pairs for t in _arrays(name, part, s, columns=columns)]


def labels(exercise: Exercise) -> list[str]:
    """What each array in the results is called."""
    return [
        f"{name}[{i}]" if isinstance(spec, list) else name
        for name, spec in exercise.results.items()
        for i in range(len(each(spec)))
    ]


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """The value in the shape of another, if they differ only in dimensions of size 1.

    A single 0 stands for an array of zeros.
    """
    if value.ndim == 0 and value == 0:
        return value.expand(like.shape)
    is_same = [n for n in value.shape if n != 1] == [n for n in like.shape if n != 1]
    return value.reshape(like.shape) if is_same else value


def _arrays(name: str, result: Any, spec: Spec, *, columns: bool) -> list[Tensor]:
    if not isinstance(spec, list):
        return [in_form(_tensor(name, result), spec, columns=columns)]
    if not isinstance(result, tuple | list) or len(result) != len(spec):
        count = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        kind = f"{_a(type(result).__name__)}{count}"
        raise MalformedError(
            f"{name} must be a list of {len(spec)}, one for each layer; got {kind}"
        )
    pairs = zip(result, spec, strict=True)
    return [in_form(_tensor(name, part), axes, columns=columns) for part, axes in pairs]


def _tensor(name: str, value: Any) -> Tensor:
    if value is None:
        raise MalformedError(f"{name} is None: is a return or an assignment missing?")
    try:
        found = _stacked(value)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise MalformedError(f"{name} must be an array of numbers; got {_a(kind)}") from None
    if found.is_complex():
        raise MalformedError(f"{name} must be an array of real numbers; got complex ones")
    return found


def _stacked(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple | list):
        return torch.stack([_stacked(part) for part in value])
    return torch.from_numpy(np.array(value))


def _of_arrays(function: Callable[[Tensor], Tensor], *, as_torch: bool) -> Callable[[Any], Any]:
    """A function of a tensor, as one of the learner's arrays."""

    def call(x: Any) -> Any:
        value = function(_tensor("the argument of f", x))
        return value if as_torch else np.float64(value.item())

    return call


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" or noun == "ndarray" else f"a {noun}"


def changed(before: Sequence[Any], after: Sequence[Any]) -> list[int]:
    """Which arguments are not what they were."""
    return [i for i, pair in enumerate(zip(before, after, strict=True)) if _differs(*pair)]


def _differs(before: Any, after: Any) -> bool:
    if isinstance(before, list):
        return len(before) != len(after) or any(map(_differs, before, after))
    if callable(before):
        return False
    one, other = torch.as_tensor(before), torch.as_tensor(after)
    # A value that was changed and put back may differ by rounding.
    return one.shape != other.shape or not torch.allclose(one, other, rtol=1e-9, atol=1e-9)
