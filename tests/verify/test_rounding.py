"""Differences that rounding explains are not mistakes; larger ones are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manual_bp.verify import check_function


def rows_of(count: int) -> Any:
    def draw(generator: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.randn(5, count, generator=generator, dtype=torch.float64) + 3,)]

    return draw


def normalized(x: Tensor) -> Any:
    return x / x.norm(dim=1, keepdim=True)


class Normalized(torch.autograd.Function):
    """Of one element: the sign, so the gradient is exactly 0."""

    wrong = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Normalized.wrong * grad


def judged(candidate: Any, reference: Any, draw: Any, *only: str) -> list[str]:
    failures = {"informative_samples": "the gradient is 0"}
    report = check_function(
        candidate, draw, reference, only=only or None, slow=False, expected_failures=failures
    )
    return [outcome.check for outcome in report.outcomes if outcome.status == "failed"]


def test_exactly_zero_and_its_rounding_agree() -> None:
    names = ("gradients_match_reference", "linear_in_upstream", "at_zero", "large_values")
    assert not judged(normalized, normalized, rows_of(1))
    assert not judged(Normalized.apply, normalized, rows_of(1), *names)


@pytest.mark.parametrize("wrong", [1e-3, 1e-9])
def test_what_is_larger_than_rounding_is_found(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Normalized, "wrong", wrong)
    name = "gradients_match_reference"
    assert judged(Normalized.apply, normalized, rows_of(1), name) == [name]


def test_rounding_excuses_nothing_at_a_threshold() -> None:
    """A change in the last place of 3 moves its slope on one side only."""

    def threes(_: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.full((5, 2), 3.0, dtype=torch.float64),)]

    def other_side(x: Tensor) -> Tensor:
        return torch.where(x < 3, 2 * x, 3 * x - 3)

    def reference(x: Tensor) -> Tensor:
        return torch.where(x <= 3, 2 * x, 3 * x - 3)

    name = "gradients_match_reference"
    assert judged(other_side, reference, threes, name) == [name]


def test_a_random_reference_excuses_no_difference() -> None:
    its_own = torch.Generator()

    def dropout(x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=its_own) < 0.5)

    assert judged(dropout, dropout, rows_of(3), "deterministic") == ["deterministic"]


def test_nan_is_expected_of_no_function() -> None:
    def logarithm(x: Tensor) -> Tensor:
        return (x - 3).log()

    def elsewhere(x: Tensor) -> Tensor:
        return torch.where(x > 3, (x - 3).abs().log(), 0.0)

    name = "forward_matches_reference"
    assert not judged(elsewhere, logarithm, rows_of(3), name)
    assert judged(logarithm, elsewhere, rows_of(3), name) == [name]


def test_slopes_near_a_pole_are_no_alarm_and_wrong_ones_are() -> None:
    def near(_: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.tensor([[3e-4, 5.0], [2e-4, 7.0]], dtype=torch.float64),)]

    name = "finite_differences"
    assert not judged(torch.reciprocal, None, near, name)
    assert not judged(torch.sqrt, None, rows_of(3), name)
    assert judged(lambda x: x.detach() * x, None, near, name) == [name]


def test_a_gradient_that_is_nan_where_the_value_is_finite_is_found() -> None:
    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.nan

    assert judged(Nan.apply, None, rows_of(3), "finite_differences") == ["finite_differences"]
