import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import Softplus, softplus
from manual_bp.verify import parametrize_with_checks
from tests.helpers import (
    activation_cases,
    assert_gradchecks,
    assert_matches,
    gradients,
    leaf,
)


def bent(z: Tensor) -> Tensor:
    return softplus(z, 3, 0.2)


CASES = activation_cases(softplus, F.softplus, Softplus, nn.Softplus)
CASES += activation_cases(
    bent, lambda z: F.softplus(z, 3, 0.2), lambda: Softplus(3, 0.2), lambda: nn.Softplus(3, 0.2)
)[1:]


@parametrize_with_checks(CASES)
def test_softplus(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([0.0, math.log(3), 30.0], dtype=torch.float64))
    a = softplus(z)
    assert a.tolist() == pytest.approx([math.log(2), math.log(4), 30], rel=1e-15)
    a.backward(torch.tensor([10.0, 100.0, 7.0], dtype=torch.float64))
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([5, 75, 7], rel=1e-15)


@pytest.mark.parametrize("beta", [1, 0.1, 3.0, -2.0])
@pytest.mark.parametrize("threshold", [20, 20.0, 19.9, 1, 0.0, -100])
def test_any_beta_and_threshold(beta: float, threshold: float, device: torch.device) -> None:
    # On either side of the threshold, and far beyond it.
    near = (threshold + torch.tensor([-1e-3, 1e-3, -0.3, 0.3], dtype=torch.float64)) / beta
    z = torch.cat([near, torch.randn(5, dtype=torch.float64) * 30, -near]).to(device)

    def ours(z: Tensor) -> Tensor:
        return softplus(z, beta, threshold)

    def theirs(z: Tensor) -> Tensor:
        return F.softplus(z, beta, threshold)

    torch.testing.assert_close(ours(z), theirs(z), rtol=0, atol=0)
    assert_matches(ours, theirs, [z])
    assert_gradchecks(ours, [torch.randn(5, dtype=torch.float64, device=device)])


def test_small_slopes_lose_no_digits(device: torch.device) -> None:
    z = torch.tensor([-700.0, -100, -40, -20, -5], dtype=torch.float64, device=device)
    _, (found,) = gradients(softplus, [leaf(z)], torch.ones_like(z))
    torch.testing.assert_close(found, torch.sigmoid(z), rtol=1e-12, atol=0)


def test_a_low_threshold_leaves_the_slope_unknown_from_a() -> None:
    a = torch.rand(5)
    with pytest.raises(ValueError, match=r"threshold must be at least 20.0; got 0.2"):
        Softplus(threshold=0.2).sigma_prime(a)


def test_beta_0_is_refused() -> None:
    with pytest.raises(ValueError, match="beta must not be 0; got 0"):
        Softplus(0)
    with pytest.raises(ValueError, match=r"beta must not be 0; got 0\.0"):
        softplus(torch.ones(3), 0.0)


@pytest.mark.parametrize(
    ("dtype", "beta", "threshold"),
    [(torch.bfloat16, 1, 0.1), (torch.float16, 2, 0.7), (torch.bfloat16, 3, 0.2)],
)
def test_the_threshold_in_low_dtypes(dtype: torch.dtype, beta: float, threshold: float) -> None:
    near = threshold / beta
    z = torch.linspace(0.9 * near, 1.1 * near, 200, dtype=dtype).unique()
    ones = torch.ones_like(z)
    found = gradients(lambda z: softplus(z, beta, threshold), [leaf(z)], ones)[1]
    expected = gradients(lambda z: F.softplus(z, beta, threshold), [leaf(z)], ones)[1]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
