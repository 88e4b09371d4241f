"""Whether a learner's function is right and, if not, what is wrong with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from manual_bp.exercises._answers import (
    Answers,
    ByAutogradError,
    RaisedError,
    TooLongError,
    UnwrittenError,
    one_line,
)
from manual_bp.exercises._exercise import Exercise, Values, flat
from manual_bp.exercises._explain import UNKNOWN, diagnosis, fields, hint, is_right, words
from manual_bp.exercises._show import difference, example, shapes
from manual_bp.exercises._values import MalformedError, changed, given, taken

State = Literal["done", "wrong", "to do"]

_PROBLEMS = 3
# Odd primes, so that no ratio of two of them is 2 or another size.
_SIZES = (3, 5, 7, 11, 13, 17)
_SMALLEST = {"K": 2}  # one class alone has nothing to learn
_OTHER_FORM = "it would be right if samples were"
_BY_HAND = (
    "autograd computed this gradient. Here it is your turn: write the derivative by hand, as a "
    "formula of ordinary operations"
)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an answer.

    says: What is wrong, in one sentence.
    notes: What else there is to say.
    lines: What shows it: a small example, or an error and its line.
    """

    state: State
    says: str = ""
    notes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Attempt:
    """What a function made of one problem: its results, or why there are none."""

    values: Values
    expected: list[Tensor]
    got: list[Tensor]
    broken: str = ""
    error: RaisedError | None = None

    @property
    def is_right(self) -> bool:
        return not self.broken and not self.error and all(map(is_right, self.got, self.expected))

    @property
    def is_wrong(self) -> bool:
        """Whether there are results, and they are not right."""
        return bool(self.got) and not self.is_right


def judge(exercise: Exercise, answers: Answers, seed: int = 0, *, explains: bool = True) -> Verdict:
    """Try a learner's function on random problems, and say what is wrong with it.

    Args:
        exercise: What is asked.
        answers: The learner's file.
        seed: Of the sizes and the values.
        explains: Whether to say what is wrong, which takes longer than to see that something is.
    """
    try:
        for values in _problems(exercise, seed):
            attempt = _attempt(exercise, answers, values)
            if not attempt.is_right:
                wrong = Verdict("wrong")
                return _verdict(exercise, answers, attempt, seed) if explains else wrong
    except UnwrittenError:
        return Verdict("to do")
    except ByAutogradError:
        return Verdict("wrong", _BY_HAND)
    return Verdict("done")


def _problems(exercise: Exercise, seed: int) -> Iterator[Values]:
    """Several of different sizes, each size different from all others, and one far out."""
    names = exercise.size_names()
    for number in range(_PROBLEMS):
        own = 100 * seed + number
        order = torch.randperm(len(_SIZES), generator=Generator().manual_seed(own))
        sizes = [_SIZES[i] for i in order if i <= len(names)]
        yield exercise.problem(dict(zip(names, sizes, strict=False)), own)
    if exercise.far:
        yield exercise.problem(dict.fromkeys(names, 3), seed, is_far=True)


def _small(exercise: Exercise, seed: int, *, is_far: bool) -> Iterator[Values]:
    """Problems from one number in each array up, to show a mistake with."""
    names = exercise.size_names()
    most = 3 if len(names) < 4 else 2
    ranges = [range(_SMALLEST.get(name, 1), most + 1) for name in names]
    for sizes in (*sorted(product(*ranges), key=sum), tuple(range(2, 2 + len(names)))):
        yield exercise.problem(dict(zip(names, sizes, strict=True)), seed, is_far=is_far)


def _attempt(
    exercise: Exercise, answers: Answers, values: Values, *, columns: bool | None = None
) -> _Attempt:
    columns = answers.columns if columns is None else columns
    expected = flat(values.right)

    def arguments(as_torch: bool) -> list[Any]:
        return [
            given(getattr(values, name), spec, columns=columns, as_torch=as_torch)
            for name, spec in exercise.arguments.items()
        ]

    try:
        result, after = answers.call(exercise.function, arguments)
        got = taken(result, exercise, columns=columns)
    except RaisedError as error:
        return _Attempt(values, expected, [], error=error)
    except MalformedError as error:
        return _Attempt(values, expected, [], broken=str(error))
    names = [list(exercise.arguments)[i] for i in changed(arguments(as_torch=False), after)]
    broken = f"it changes its argument {names[0]}, which the caller still needs" if names else ""
    return _Attempt(values, expected, got, broken)


def _verdict(exercise: Exercise, answers: Answers, attempt: _Attempt, seed: int) -> Verdict:
    if attempt.error:
        return _of_error(exercise, answers, attempt, attempt.error, seed)
    if attempt.broken:
        hint = _NOT_PUT_BACK if exercise.function == "numerical_gradient" else _COPY
        return Verdict("wrong", attempt.broken + (hint if attempt.got else ""))
    says = diagnosis(exercise, attempt.values, attempt.got, attempt.expected)
    if attempt.values.nearby and (not says or "nan" in says or "infinite" in says):
        says = says if says in _sentences(exercise) else exercise.far_says
    note = _other_form(exercise, answers, seed)
    if note and says not in _sentences(exercise):
        says, note = note, ""
    says = says or UNKNOWN
    shown = _smallest_like(exercise, answers, attempt, says, seed)
    text = shown[0].format_map(fields(shown[1].values, columns=answers.columns))
    return Verdict("wrong", text, _notes(note), _shown(exercise, answers, shown[1]))


_COPY = ": compute a new array (a − b, not a −= b), or work on a copy"
_NOT_PUT_BACK = ": whoever moves an element must put it back, or work on a copy"


def _sentences(exercise: Exercise) -> list[str]:
    return [mistake.says for mistake in exercise.mistakes]


def _smallest_like(
    exercise: Exercise, answers: Answers, attempt: _Attempt, says: str, seed: int
) -> tuple[str, _Attempt]:
    """The smallest problem that shows the same mistake, with its sentence there."""
    for values in _small(exercise, seed, is_far=attempt.values.nearby is not None):
        small = _attempt(exercise, answers, values)
        if not small.is_wrong or small.broken:
            continue
        if says in (UNKNOWN, exercise.far_says) or says.startswith(_OTHER_FORM):
            return says, small
        there = diagnosis(exercise, values, small.got, small.expected)
        if words(there) == words(says):
            return there, small
    return says, attempt


def _shown(exercise: Exercise, answers: Answers, attempt: _Attempt) -> tuple[str, ...]:
    numbers = sum(t.numel() for t in attempt.expected)
    show = example if numbers <= 40 else difference
    return show(exercise, attempt.values, attempt.got, attempt.expected, columns=answers.columns)


def _of_error(
    exercise: Exercise, answers: Answers, attempt: _Attempt, error: RaisedError, seed: int
) -> Verdict:
    """Of a function that raised: what its results would be if all sizes were equal."""
    line = f"{error.place}{one_line(error.cause)}"
    lines = (line, f"with {shapes(exercise, attempt.values, columns=answers.columns)}")
    if isinstance(error.cause, TooLongError):
        return Verdict("wrong", str(error.cause), (), (error.place.removesuffix(": "), lines[1]))
    if says := hint(error.cause):
        return Verdict("wrong", says, (), lines)
    sizes = dict.fromkeys(exercise.size_names(), 3)
    square = _attempt(exercise, answers, exercise.problem(sizes, seed))
    says, note = _other_form(exercise, answers, seed), ""
    if square.is_wrong and not square.broken:
        found = diagnosis(exercise, square.values, square.got, square.expected)
        if found in _sentences(exercise):
            note = says
            says = found.format_map(fields(attempt.values, columns=answers.columns))
    elif square.is_right:
        says = "right only if all sizes are equal, and here they are not"
    return Verdict("wrong", says or "your function raised an error", _notes(note), lines)


def _notes(*notes: str) -> tuple[str, ...]:
    return tuple(f"({note[0].upper()}{note[1:]}.)" for note in notes if note)


def _other_form(exercise: Exercise, answers: Answers, seed: int) -> str:
    """Whether the function is right for samples in the other form; empty if not."""
    columns = not answers.columns
    attempts = [
        _attempt(exercise, answers, values, columns=columns) for values in _problems(exercise, seed)
    ]
    if not all(attempt.is_right for attempt in attempts):
        return ""
    form, other = ("rows", "columns") if columns else ("columns", "rows")
    where = ", as in the notes" if columns else ""
    return (
        f"{_OTHER_FORM} {other}{where}, but in your file they are {form}: "
        f'write it for {form}, or put SAMPLES = "{other}" at the top and keep to it'
    )
