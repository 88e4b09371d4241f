"""No right answer is refused, however it is written."""

import pytest

from tests.exercises import variants
from tests.exercises.answer import VARIANTS, Answer
from tests.exercises.test_mistakes import EXERCISES, verdict_on

assert variants.__all__


@pytest.mark.parametrize("answer", VARIANTS, ids=[f"{a.name}-{a.form}" for a in VARIANTS])
def test_a_right_answer_is_right(answer: Answer) -> None:
    for seed in (0, 1):
        verdict = verdict_on(answer, seed)
        assert verdict.state == "done", verdict


def test_there_are_thirty_variants_and_more_in_all_exercises_and_both_forms() -> None:
    assert len(VARIANTS) >= 30
    assert {answer.exercise for answer in VARIANTS} == set(EXERCISES)
    assert {answer.form for answer in VARIANTS} == {"rows", "columns"}
