from typing import Any

import pytest
import torch
from torch import Tensor

from manual_bp.verify._compare import Mismatch, compare

RIGHT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]], dtype=torch.float64)
ONE = torch.tensor(0.7, dtype=torch.float64)
SQUARE = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)


def message(got: Tensor | None, expected: Tensor, **options: Any) -> str:
    with pytest.raises(Mismatch) as mismatch:
        compare("gradient of w", got, expected, **options)
    return str(mismatch.value)


@pytest.mark.parametrize(
    ("got", "expected", "options", "diagnosis"),
    [
        (RIGHT / 5, RIGHT, {"sizes": [2, 5]}, "1/5 of the right one: a mean over 5 where a sum"),
        (RIGHT * 5, RIGHT, {"sizes": [2, 5]}, "5 times the right one: a factor, or a sum over 5"),
        (RIGHT * 1.001, RIGHT, {}, "1.001 times the right one, everywhere"),
        (-RIGHT, RIGHT, {}, "-1 times the right one: a sign error"),
        (RIGHT * 0, RIGHT, {}, "zero everywhere"),
        (ONE / 15, ONE, {"sizes": [5, 3, 15]}, "1/15 of the right one: a mean over 15 where a sum"),
        (-ONE, ONE, {}, "-1 times the right one: a sign error"),
        (ONE / 2, ONE, {}, "0.5 times the right one, everywhere: a factor 2 is missing"),
        (SQUARE.mT, SQUARE, {}, "equal to the transpose"),
        (RIGHT.mT, RIGHT, {}, "equal to the transpose"),
        (RIGHT.expand(5, 2, 3), RIGHT, {}, "missing a sum over the batch"),
        (RIGHT.float(), RIGHT, {}, "dtype demoted"),
        ((RIGHT / 3).float().double(), RIGHT / 3, {}, "right to float32 precision only"),
        (RIGHT * (RIGHT < 5), RIGHT, {}, "zero where it should not be"),
        (RIGHT + 1, RIGHT, {"clues": lambda: [("one too large", RIGHT + 1)]}, "one too large"),
        (SQUARE - 1j * SQUARE**2, SQUARE + 1j * SQUARE**2, {}, "equal to the complex conjugate"),
    ],
)
def test_the_diagnosis_names_the_mistake(
    got: Tensor, expected: Tensor, options: Any, diagnosis: str
) -> None:
    assert f"diagnosis: {diagnosis}" in message(got, expected, **options)


def test_a_ratio_of_single_numbers_that_is_no_known_one_says_nothing() -> None:
    assert "times the right one" not in message(1.37 * ONE, ONE, sizes=[5, 3])


def test_the_message_gives_index_values_and_ratio() -> None:
    got = RIGHT.clone()
    got[1, 2] = 14
    assert message(got, RIGHT) == (
        "gradient of w, at index (1, 2): expected 7, got 14, ratio 2; 1 of 6 elements differ"
    )
    assert "expected a tensor of shape (2, 3), got None: no gradient" in message(None, RIGHT)


@pytest.mark.parametrize("got", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_right_only_if_expected(got: float) -> None:
    bad = RIGHT.clone()
    bad[0, 0] = got
    assert "1 of 6 elements differ" in message(bad, RIGHT)
    compare("same", bad, bad.clone())


def test_where_inf_is_expected_nothing_else_is_right_and_where_nan_is_everything() -> None:
    infinite, unknown = RIGHT.clone(), RIGHT.clone()
    infinite[0, 0], unknown[0, 0] = torch.inf, torch.nan
    assert "1 of 6 elements differ" in message(RIGHT, infinite)
    wrong = RIGHT.clone()
    wrong[1, 1] = 0
    assert "1 of 6 elements differ" in message(wrong, unknown)
    compare("anything", RIGHT, unknown)
    compare("anything", infinite, unknown)


def test_rounding_and_missing_zeros_pass() -> None:
    compare("same", RIGHT, RIGHT * (1 + 1e-12))
    compare("none", None, None)
    compare("zero", None, RIGHT * 0)
    compare("zero", RIGHT * 0, None)
    compare("empty", RIGHT[:0], RIGHT[:0])
    # The rounding of a sum that cancels is tiny compared with the largest element.
    compare("cancelled", RIGHT + 1e-15, RIGHT)


def test_a_wrong_small_element_is_found_next_to_a_large_one() -> None:
    right = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    wrong = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert "zero where it should not be" in message(wrong, right)
