"""The file that a learner starts with: twelve functions with docstrings, nothing in them."""

from collections.abc import Sequence
from inspect import cleandoc
from textwrap import indent

from manual_bp.exercises._exercise import Axes, Exercise, Spec, each

_HEADER = '''"""My answers to the exercises of manual_bp. To see what is right and what is not yet:

    python -m manual_bp.exercises check {name}

Write each function with NumPy or with PyTorch, in loops or with matrices, but without autograd.
Each may call those before it, and functions of your own.
"""

import numpy as np  # or: import torch

# {form}
SAMPLES = "{samples}"
'''

_FORMS = {
    "rows": "One sample is a row, as in the code of manual_bp. For columns: `start --columns`.",
    "columns": "One sample is a column, as in the notes. Without --columns, `start` writes rows.",
}

_STUB = '''

def {name}({arguments}):
    """{number}. {title}.

{text}

    Args:
{args}

    Returns:
{returns}
    """
    raise NotImplementedError
'''


def stubs(course: Sequence[Exercise], name: str, *, columns: bool) -> str:
    """The text of a file called `name`, for samples in rows or in columns."""
    samples = "columns" if columns else "rows"
    header = _HEADER.format(name=name, samples=samples, form=_FORMS[samples])
    return header + "".join(
        _stub(number, exercise, columns=columns) for number, exercise in enumerate(course, start=1)
    )


def _stub(number: int, exercise: Exercise, *, columns: bool) -> str:
    return _STUB.format(
        name=exercise.function,
        arguments=", ".join(exercise.arguments),
        number=number,
        title=exercise.title,
        text=indent(cleandoc(exercise.text), "    "),
        args=_shapes(exercise.arguments, "a function of an array", columns=columns),
        returns=_shapes(exercise.results, "a number", columns=columns),
    )


def _shapes(specs: dict[str, Spec], no_array: str, *, columns: bool) -> str:
    lines = []
    for name, spec in specs.items():
        shapes = ", ".join(_shape(axes, columns=columns) for axes in each(spec))
        kind = "a list of arrays of shapes" if isinstance(spec, list) else "shape"
        lines.append(f"        {name}: {f'{kind} {shapes}' if each(spec) != [()] else no_array}")
    return "\n".join(lines)


def _shape(axes: Axes, *, columns: bool) -> str:
    if columns and axes[:1] == ("N",) and len(axes) == 2:
        axes = axes[::-1]
    elif columns and len(axes) == 1 and axes != ("N",):
        axes = (*axes, "1")
    return f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})"
