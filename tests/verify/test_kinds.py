"""Who is right where a reference disagrees, what is right at kinks, and lost digits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from manual_bp.verify import check_function, run
from manual_bp.verify._report import Outcome
from manual_bp.verify.mutants import MUTANTS


def rows(generator: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=generator, dtype=torch.float64),)]


def judged(check: str, call: Any, reference: Any = None, samples: Any = rows) -> Outcome:
    (outcome,) = check_function(call, samples, reference, only=[check]).outcomes
    return outcome


def normalized(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class WrongThird(torch.autograd.Function):
    """The gradient of a cube, whose second derivative is a constant to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        return 3 * x.square() * delta

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x.detach() * delta * v, 3 * x.square() * v


class CubeWithWrongThird(torch.autograd.Function):
    """x³, whose third derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return WrongThird.apply(ctx.saved_tensors[0], delta)


def wrong_cube(x: Tensor) -> Any:
    return CubeWithWrongThird.apply(x)


def cube(x: Tensor) -> Tensor:
    return x**3


def test_a_wrong_third_derivative_of_the_reference_is_not_blamed_on_the_call() -> None:
    outcome = judged("third_order", cube, wrong_cube)
    assert outcome.status == "passed"
    assert "the reference's derivative of order 3 is wrong" in outcome.message


def test_a_wrong_third_derivative_of_the_call_is_found_with_the_evidence() -> None:
    outcome = judged("third_order", wrong_cube, cube)
    assert outcome.status == "failed"
    assert "finite differences support the reference" in outcome.message


def test_layer_norm_with_a_right_third_derivative_passes() -> None:
    """PyTorch 2.13 has a wrong one, which a later release may correct."""
    assert judged("third_order", normalized, lambda x: F.layer_norm(x, (3,))).status == "passed"


def test_a_wrong_gradient_of_the_reference_is_named() -> None:
    outcome = judged("gradients_match_reference", cube, lambda x: x * (x * x).detach())
    assert outcome.status == "failed"
    assert "diagnosis: the reference's gradient is wrong" in outcome.message


ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda x: x.sort(-1).values,
    "median": lambda x: x.median(-1).values,
    "amax": lambda x: x.amax(-1),
    "topk": lambda x: x.topk(2, -1).values,
    "norm": lambda x: x.norm(dim=-1),
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "sign": lambda x: x.sign() * x.square(),
    "two outputs": lambda x: torch.stack([x.amax(-1), x.norm(1, dim=-1)]),
}


@pytest.mark.parametrize("call", ORDER.values(), ids=ORDER)
@pytest.mark.parametrize("check", ["at_zero", "at_ties"])
def test_a_right_slope_at_a_kink_passes_without_a_reference(
    check: str, call: Callable[[Tensor], Tensor]
) -> None:
    assert judged(check, call).status == "passed"


LOST = {
    "saves_float32": "full_precision",
    "sigmoid_in_float32": "full_precision",
    "seven_digits": "gradients_match_reference",
}


@pytest.mark.parametrize(("name", "check"), LOST.items())
def test_a_float32_round_trip_is_told_from_a_wrong_digit(name: str, check: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    (outcome,) = run(mutant.case, only=[check]).outcomes
    assert outcome.status == "failed"
    is_digit = "a wrong digit in a constant" in outcome.message
    assert is_digit == (name == "seven_digits")
    assert ("dtype demoted" in outcome.message) != is_digit
    (precise,) = run(mutant.case, only=["full_precision"]).outcomes
    assert precise.status == ("passed" if is_digit else "failed")
