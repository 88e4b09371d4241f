"""What a contender is, how exact it must be, and what becomes of one that fails."""

import importlib.util
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Task = TypeVar("Task")
Row = dict[str, str]  # of a table: cells by the names of their columns

FLOAT32 = 2**-24  # the largest relative error of one rounding

# The same for a factor of a product: float32, TF32, bfloat16.
_ROUNDING = {"highest": FLOAT32, "high": 2**-11, "medium": 2**-8}


class Result(NamedTuple):
    """A float32 tensor that was computed, the right one, and how far an element may be off."""

    found: Tensor
    right: Tensor
    allowed: float


@dataclass
class Contender:
    """One way to do what a question compares, and what was measured of it.

    call: Does it.
    each: How many times one call does it.
    wait: Returns when all calls so far are done; for contenders with calls that return earlier.
    results: Makes the first call, and returns what it computed; nothing if there is no result.
    is_ours: Whether it is our own code.
    note: Why it dropped out, in a few words.
    calls: How many calls make a turn.
    seconds: How long it took to do it once, round by round.
    peak: The most bytes that a call held at any one time.
    """

    name: str
    call: Callable[[], object] = lambda: None
    each: int = 1
    wait: Callable[[], object] = lambda: None
    results: Callable[[], Sequence[Result]] = lambda: ()
    is_ours: bool = False
    note: str = ""
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def row(self, label: Row, cells: Callable[["Contender"], Row]) -> Row:
        """A row of a table: its label, and then its cells, or why it dropped out."""
        return label | ({"note": self.note} if self.note else cells(self))

    @property
    def micros(self) -> float:
        """The median of its times, in microseconds."""
        return 1e6 * float(np.median(self.seconds))

    def ratio(self, base: "Contender") -> tuple[str, str]:
        """The median and the quartiles of its time over another's; empty if either dropped out."""
        if self.note or base.note:
            return "", ""
        return spread(np.divide(self.seconds, base.seconds), 3)

    def check(self) -> None:
        """Make the first call, and check its results.

        Raises:
            InexactError: A result is off by more than is allowed; the message says by how much.
            TypeError: A result has another shape or dtype than it should have.
        """
        for found, right, allowed in self.results():
            if (found.dtype, found.shape) != (torch.float32, right.shape):
                raise TypeError(f"a result is {found.dtype}, of shape {tuple(found.shape)}")
            error = (found.double() - right.double()).abs().max().item()
            if not error <= allowed:  # nan is not
                raise InexactError(f"inexact: off by {error:.1e}, {allowed:.1e} allowed")


class InexactError(ArithmeticError):
    """A result is further from the right one than rounding explains."""


def allowance(layers: int, longest: int) -> float:
    """How far apart right answers may be, relative to the sizes of the terms that they sum.

    Factors are rounded to the precision set for products, sums to float32. Roundings go either way,
    so they grow with the square root of their number.

    Args:
        layers: The number of products that follow one another.
        longest: The number of terms of the longest sum.
    """
    rounding = _ROUNDING[torch.get_float32_matmul_precision()]
    return 8 * math.sqrt(layers) * (rounding + math.sqrt(longest) * FLOAT32)


def gather(
    makers: Mapping[str, Callable[[Task], Sequence[Contender]]], task: Task
) -> list[Contender]:
    """Make all contenders; a maker that raises is represented by a contender with a note."""
    found: list[Contender] = []
    for name, make in makers.items():
        try:
            found += make(task)
        except Exception as error:
            found.append(Contender(name, is_ours=name.startswith("ours"), note=_reason(error)))
    return found


def attempt(do: Callable[[Contender], None], contenders: Iterable[Contender]) -> None:
    """Do something with each contender that has not dropped out; one that raises drops out."""
    for contender in contenders:
        if not contender.note:
            try:
                do(contender)
            except Exception as error:
                contender.note = _reason(error)


def notes_of(contenders: Sequence[Contender]) -> Row:
    """Why contenders of a row dropped out, as a cell; empty if none did."""
    notes = [f"{c.name}: {c.note}" for c in contenders if c.note]
    return {"note": "; ".join(notes)} if notes else {}


def spread(values: Any, digits: int) -> tuple[str, str]:
    """The median, and the lower and the upper quartile, as text."""
    lower, median, upper = (
        f"{value:.{digits}f}" for value in np.quantile(values, (0.25, 0.5, 0.75))
    )
    return median, f"{lower} to {upper}"


def _reason(error: Exception) -> str:
    """Why a contender failed, in a few words that fit into the cell of a table."""
    if isinstance(error, InexactError):
        return str(error)
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_memory or "can't allocate memory" in str(error):  # as PyTorch says on the CPU
        return "out of memory"
    said = f"{type(error).__name__}: {error}".partition("\n")[0].replace("|", "/")
    return textwrap.shorten(said, 80, placeholder=" ...")


def is_installed(name: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(name) is not None
