"""An exercise: what is asked, what is right, and what known mistakes would give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

# The names of the sizes of an array, as ("N", "out"). A list of them is a list of arrays.
Axes = tuple[str, ...]
Spec = Axes | list[Axes]
# The arguments of an exercise, in float64, one sample a row.
Values = SimpleNamespace


@dataclass(frozen=True)
class Mistake:
    """A known mistake, with the results that it gives.

    says: What is wrong, in one sentence, as a format of the sizes. {w} and {wt} are w and wᵀ for a
        file whose samples are rows, and the reverse for columns; {over_samples} and {over_neurons}
        are the numbers of the axes.
    """

    says: str
    gives: Callable[[Values], Any]


# A part of a formula: the right one, called "", and wrong ones, each with what is then wrong.
Part = dict[str, Callable[[Values], Any]]


def combined(build: Callable[..., Any], *parts: Part) -> tuple[Mistake, ...]:
    """The mistakes of a formula in one of its parts, then those in two and in three.

    Args:
        build: The formula, of the values of its parts.
        parts: What each part may be.
    """
    found: list[tuple[int, Mistake]] = []
    for chosen in product(*(part.items() for part in parts)):
        wrong = list(dict.fromkeys(says for says, _ in chosen if says))
        if 1 <= len(wrong) <= 3:
            mistake = Mistake(together(wrong), partial(_built, build, chosen))
            found.append((len(wrong), mistake))
    return tuple(mistake for _, mistake in sorted(found, key=itemgetter(0)))


def together(sentences: Sequence[str]) -> str:
    """One sentence for several mistakes."""
    if len(sentences) == 1:
        return sentences[0]
    count = {2: "two", 3: "three"}[len(sentences)]
    return f"{count} mistakes: {'; '.join(sentences[:-1])}; and {sentences[-1]}"


def is_one(says: str) -> bool:
    """Whether a sentence is about one mistake."""
    return not says.startswith(("two mistakes: ", "three mistakes: "))


def _built(build: Callable[..., Any], chosen: Sequence[tuple[str, Any]], values: Values) -> Any:
    return build(*(make(values) for _, make in chosen))


@dataclass(frozen=True)
class Exercise:
    """A function for the learner to write.

    function: Its name.
    text: What it computes, for its docstring.
    arguments: The sizes of each argument; () for a function.
    results: The sizes of each result.
    right: Computes the right results.
    mistakes: The simplest come first.
    where: Where this package does the same.
    derived: Computes arguments that are not just random numbers, in this order.
    hidden: The sizes of random numbers that are no arguments.
    far: Changes the arguments to values so large that careless formulas overflow.
    far_says: What is wrong if only those results are.
    """

    function: str
    title: str
    text: str
    arguments: dict[str, Spec]
    results: dict[str, Spec]
    right: Callable[[Values], Any]
    mistakes: Sequence[Mistake]
    where: str
    derived: dict[str, Callable[[Values], Any]] = field(default_factory=dict)
    hidden: dict[str, Axes] = field(default_factory=dict)
    far: Callable[[Values], None] | None = None
    far_says: str = ""

    def size_names(self) -> list[str]:
        """The names of all sizes, each once."""
        specs = (*self.arguments.values(), *self.hidden.values())
        return list(dict.fromkeys(name for spec in specs for axes in each(spec) for name in axes))

    def problem(self, sizes: dict[str, int], seed: int, *, is_far: bool = False) -> Values:
        """Arguments of these sizes, from random numbers with one decimal.

        Besides the arguments, `right` has the right results by name; `sizes` the sizes; and
        `nearby` the problem before `far` changed it, or None.
        """
        values, generator = Values(sizes=sizes, nearby=None), Generator().manual_seed(seed)
        for name, spec in (self.arguments | self.hidden).items():
            arrays = [_short_numbers([sizes[a] for a in axes], generator) for axes in each(spec)]
            setattr(values, name, arrays if isinstance(spec, list) else arrays[0])
        for name, derive in self.derived.items():
            setattr(values, name, derive(values))
        if is_far and self.far:
            values.nearby = self.problem(sizes, seed)
            self.far(values)
        results = self.right(values)
        results = [results] if len(self.results) == 1 else results
        values.right = Values(**dict(zip(self.results, results, strict=True)))
        return values


def each(spec: Spec) -> list[Axes]:
    """The sizes of one array or of several."""
    return spec if isinstance(spec, list) else [spec]


def flat(results: Any) -> list[Tensor]:
    """All tensors of some results."""
    if isinstance(results, Values):
        results = list(vars(results).values())
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def _short_numbers(shape: Sequence[int], generator: Generator) -> Tensor:
    tenths = torch.randn(list(shape), generator=generator, dtype=torch.float64).mul(10).round()
    return torch.where(tenths == 0, 5.0, tenths) / 10
