"""Of every mistake that a learner made, the course says what is wrong."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manual_bp.exercises._answers import Answers
from manual_bp.exercises._judge import Verdict, judge
from manual_bp.exercises.course import COURSE
from tests.exercises import mistakes
from tests.exercises.answer import MISTAKES, Answer

assert mistakes.__all__

EXERCISES = {exercise.function: exercise for exercise in COURSE}


def verdict_on(answer: Answer, seed: int = 0) -> Verdict:
    """What is said of a file in which the functions around an answer are, too."""
    names = {**answer.function.__globals__, answer.exercise: answer.function}
    path = Path(answer.function.__code__.co_filename)
    return judge(EXERCISES[answer.exercise], Answers(path, names, answer.form == "columns"), seed)


# Each with other sizes and numbers than its neighbours.
@pytest.mark.parametrize(
    ("answer", "seed"),
    [(answer, i % 7) for i, answer in enumerate(MISTAKES)],
    ids=[answer.name for answer in MISTAKES],
)
def test_a_mistake_gets_its_sentence(answer: Answer, seed: int) -> None:
    verdict = verdict_on(answer, seed)
    assert verdict.state == "wrong"
    assert re.search(answer.says, verdict.says), verdict.says
    assert not re.search(r"[{}]", verdict.says)


def test_there_are_sixty_mistakes_and_more_in_all_exercises_each_with_its_source() -> None:
    assert len(MISTAKES) >= 60
    assert {answer.exercise for answer in MISTAKES} == set(EXERCISES)
    assert all(answer.source and answer.says for answer in MISTAKES)
    assert len({answer.name for answer in MISTAKES}) == len(MISTAKES)


def mistake(name: str) -> Answer:
    (found,) = [answer for answer in MISTAKES if answer.name == name]
    return found


def test_a_wrong_number_is_shown_with_the_smallest_arguments_that_show_it() -> None:
    verdict = verdict_on(mistake("grad_b-bias_averaged"))
    assert verdict.lines == (
        "delta  [[ 1.5],",
        "        [-0.3]]",
        "yours  [0.6]",
        "right  [1.2]",
    )
    assert verdict.says.startswith("averaged over the 2 samples")


def test_an_error_is_shown_with_its_line_and_the_shapes() -> None:
    verdict = verdict_on(mistake("hidden_delta-transpose_kept"))
    error, shapes = verdict.lines
    assert re.match(
        r"line \d+, `return np.dot\(delta_next, w_next.T\) \* sigmoid_prime\(z\)`: ValueError: ",
        error,
    )
    assert re.fullmatch(
        r"with delta_next \((\d+), (\d+)\), w_next \(\2, (\d+)\), z \(\1, \3\)", shapes
    )


def test_what_is_right_in_the_other_form_is_called_that() -> None:
    verdict = verdict_on(mistake("grad_b-wrong_axis"))
    (note,) = verdict.notes
    assert "right if samples were columns" in note
    assert verdict_on(mistake("sigmoid_prime-overflowing")).notes == ()


def test_what_only_the_other_form_explains_is_called_that() -> None:
    def per_sample_grad_w(delta: Any, a_prev: Any) -> Any:
        return [np.outer(d, a) for d, a in zip(delta, a_prev, strict=False)]

    answer = Answer("per_sample_grad_w", per_sample_grad_w, "", form="columns")
    verdict = verdict_on(answer)
    assert verdict.says.startswith("it would be right if samples were rows")
    assert verdict.notes == ()
    assert verdict.lines[-1].strip().startswith(("[", "right"))


def test_two_mistakes_at_once_are_both_named() -> None:
    def output_delta(_: Any, a: Any, y: Any) -> Any:
        return (y - a) * a * (1 - a)

    says = verdict_on(Answer("output_delta", output_delta, "")).says
    assert says.startswith("two mistakes: y − a where a − y belongs")
    assert "the 1/N of the mean is missing" in says


def test_an_unknown_mistake_gets_an_example() -> None:
    def grad_w(delta: Any, a_prev: Any) -> Any:
        return (delta.T @ a_prev).round(1)

    verdict = verdict_on(Answer("grad_w", grad_w, ""))
    assert "like none of the mistakes" in verdict.says
    assert [line.split()[0] for line in verdict.lines] == ["delta", "a_prev", "yours", "right"]
