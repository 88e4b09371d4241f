"""The page as one text: the template with its style, its script and the numbers in it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.walk.passes import Matrices


def page(net: Mapping[str, Any], shared: Matrices, passes: Sequence[Matrices]) -> str:
    """A page that needs no other file and no network.

    Args:
        net: What the page says about the network: sizes, activation, output, cost, learning_rate,
            samples and source.
        shared: The weights and biases before the step.
        passes: The matrices of each pass that can be chosen: the whole batch, then single samples.
    """
    data = {"net": net, "shared": _plain(shared), "passes": [_plain(each) for each in passes]}
    # Within a script element, a text with "</script>" in it, such as a path, would end the element.
    numbers = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    text = _read("page.html")
    for name in ("page.css", "steps.js", "matrices.js", "page.js"):
        text = text.replace(f"/* {name} */", _read(name))
    return text.replace("/* numbers */", numbers)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _plain(matrices: Matrices) -> dict[str, list[list[float | str]]]:
    return {
        name: [[_number(value) for value in row] for row in matrix.tolist()]
        for name, matrix in matrices.items()
    }


def _number(value: float) -> float | str:
    """The value to six digits; what JSON cannot say, in words that JavaScript's Number reads."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.6g}")
