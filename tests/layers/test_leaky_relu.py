from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import LeakyReLU, leaky_relu
from manual_bp.verify import parametrize_with_checks
from tests.helpers import activation_cases, assert_matches, leaf


def steep(z: Tensor) -> Tensor:
    return leaky_relu(z, 1.5)


CASES = activation_cases(leaky_relu, F.leaky_relu, LeakyReLU, nn.LeakyReLU)
CASES += activation_cases(
    steep, lambda z: F.leaky_relu(z, 1.5), lambda: LeakyReLU(1.5), lambda: nn.LeakyReLU(1.5)
)[1:]


@parametrize_with_checks(CASES)
def test_leaky_relu(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([-2.0, 0.0, 3.0]))
    a = leaky_relu(z, 0.25)
    assert a.tolist() == [-0.5, 0, 3]
    a.backward(torch.tensor([10.0, 20.0, 30.0]))
    assert z.grad is not None
    assert z.grad.tolist() == [2.5, 5, 30]


@pytest.mark.parametrize("slope", [0, 0.0, 0.3, 1, 2.5])
def test_any_slope_that_keeps_the_sign(slope: float, device: torch.device) -> None:
    z = torch.randn(5, 3, dtype=torch.float64, device=device)
    assert_matches(lambda z: leaky_relu(z, slope), lambda z: F.leaky_relu(z, slope), [z])
    assert_matches(LeakyReLU(slope), nn.LeakyReLU(slope), [z])


@pytest.mark.parametrize(
    "call", [LeakyReLU, lambda slope: leaky_relu(torch.ones(3), slope)], ids=["module", "function"]
)
def test_a_slope_below_0_is_refused(call: Any) -> None:
    for slope in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"negative_slope must be at least 0; got {slope}"):
            call(slope)
    for no_number in (None, "0.1"):
        with pytest.raises(TypeError, match="negative_slope must be a number; got"):
            call(no_number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_slope_is_not_rounded_to_a_low_dtype(dtype: torch.dtype, device: torch.device) -> None:
    z = leaf(torch.full((1000,), -1.0, dtype=dtype, device=device))
    upstream = torch.rand(1000, device=device).to(dtype) + 1
    leaky_relu(z, 0.1).backward(upstream)
    assert z.grad is not None
    error = (z.grad.double() / (upstream.double() * 0.1) - 1).mean()
    assert abs(error) < torch.finfo(dtype).eps / 20
