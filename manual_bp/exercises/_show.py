"""Numbers and shapes, as a learner reads them."""

from typing import Any

import numpy as np
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Values, each
from manual_bp.exercises._explain import is_right
from manual_bp.exercises._values import fitted, in_form, labels

_RESULTS = 2


def shapes(exercise: Exercise, values: Values, *, columns: bool) -> str:
    """The shapes of all arguments."""
    found = []
    for name, spec in exercise.arguments.items():
        value = getattr(values, name)
        if isinstance(value, list):
            parts = zip(value, each(spec), strict=True)
            inner = ", ".join(_shape(v, axes, columns=columns) for v, axes in parts)
            found.append(f"{name} [{inner}]")
        elif isinstance(value, Tensor):
            found.append(f"{name} {_shape(value, each(spec)[0], columns=columns)}")
    return ", ".join(found)


def example(
    exercise: Exercise, values: Values, got: list[Tensor], expected: list[Tensor], *, columns: bool
) -> tuple[str, ...]:
    """The arguments, and what was returned and is right, where they differ."""
    rows: dict[str, Any] = {}
    for name, spec in exercise.arguments.items():
        value = getattr(values, name)
        for i, (part, axes) in enumerate(zip(_parts(value), each(spec), strict=True)):
            label = f"{name}[{i}]" if isinstance(value, list) else name
            is_array = isinstance(part, Tensor)
            rows[label] = _numbers(in_form(part, axes, columns=columns)) if is_array else str(part)
    result_axes = [axes for spec in exercise.results.values() for axes in each(spec)]
    names = labels(exercise)
    differing = [
        (i, g, e) for i, (g, e) in enumerate(zip(got, expected, strict=True)) if not is_right(g, e)
    ]
    for i, g, e in differing[:_RESULTS]:
        of = f" {names[i]}" if len(names) > 1 else ""
        right = in_form(e, result_axes[i], columns=columns)
        yours = fitted(in_form(g, result_axes[i], columns=columns), right)
        pairs = ((_numbers(yours, digits), _numbers(right, digits)) for digits in (4, 8))
        if yours.shape != right.shape:
            rows[f"shape{of}"] = f"yours {tuple(yours.shape)}, right {tuple(right.shape)}"
        rows[f"your{of or 's'}"], rows[f"right{of}"] = next(
            (pair for pair in pairs if pair[0] != pair[1]),
            (_numbers(yours, 16), _numbers(right, 16)),
        )
    width = max(map(len, rows))
    lines = [t for label, text in rows.items() for t in _indented(f"{label:{width}}  ", text)]
    others = [names[i] for i, _, _ in differing[_RESULTS:]]
    return (*lines, *([f"and so on for {', '.join(others)}"] if others else []))


def difference(
    exercise: Exercise, values: Values, got: list[Tensor], expected: list[Tensor], *, columns: bool
) -> tuple[str, ...]:
    """The first element that differs."""
    names = labels(exercise)
    axes = [axes for spec in exercise.results.values() for axes in each(spec)]
    pairs = enumerate(zip(got, expected, strict=True))
    i, (g, e) = next((i, pair) for i, pair in pairs if not is_right(*pair))
    g = fitted(in_form(g, axes[i], columns=columns), e := in_form(e, axes[i], columns=columns))
    sizes = f"with {shapes(exercise, values, columns=columns)}"
    if g.shape != e.shape:
        return (sizes, f"{names[i]} has shape {tuple(g.shape)}; right is {tuple(e.shape)}")
    place = next(p for p in np.ndindex(*e.shape) if not is_right(g[p], e[p]))
    at = f"[{', '.join(map(str, place))}]" if place else ""
    return (sizes, f"{names[i]}{at} is {g[place].item():.6g}; right is {e[place].item():.6g}")


def _shape(value: Tensor, axes: Any, *, columns: bool) -> str:
    return str(tuple(in_form(value, axes, columns=columns).shape))


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _numbers(value: Tensor, digits: int = 4) -> str:
    array = value.numpy()
    if array.dtype.kind != "f":
        return np.array2string(array, separator=", ")
    texts = [f"{x:.{digits}g}" for x in (array.astype(float) + 0.0).flat]  # no minus zero
    width = max(map(len, texts))
    formatter: Any = {"float_kind": lambda x: f"{x:{width}.{digits}g}"}
    return np.array2string(array.astype(float) + 0.0, separator=", ", formatter=formatter)


def _indented(start: str, text: str) -> list[str]:
    first, *others = [line for line in text.splitlines() if line.strip()]
    return [start + first, *(" " * len(start) + line for line in others)]
