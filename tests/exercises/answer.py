"""Answers as learners write them, with what the course must say of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One function of a learner, for the exercise of that name.

    source: Where this mistake is made, or why this variant is right.
    says: A pattern for the sentence that it must get; empty if it is right.
    form: What a sample is in the learner's file: rows or columns.
    """

    exercise: str
    function: Callable[..., Any]
    source: str
    says: str = ""
    form: str = "rows"

    @property
    def name(self) -> str:
        return f"{self.exercise}-{self.function.__name__}"


MISTAKES: list[Answer] = []
VARIANTS: list[Answer] = []


def mistake(exercise: str, source: str, says: str, form: str = "rows") -> Any:
    def add(function: Any) -> Any:
        MISTAKES.append(Answer(exercise, function, source, says, form))
        return function

    return add


def variant(exercise: str, source: str, form: str = "rows") -> Any:
    def add(function: Any) -> Any:
        VARIANTS.append(Answer(exercise, function, source, form=form))
        return function

    return add
