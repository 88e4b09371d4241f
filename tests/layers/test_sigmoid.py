import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from manual_bp import Sigmoid, sigmoid
from manual_bp.verify import parametrize_with_checks
from tests.helpers import activation_cases, assert_gradchecks, assert_matches, gradients, leaf


@parametrize_with_checks(
    activation_cases(sigmoid, torch.sigmoid, Sigmoid, nn.Sigmoid, is_complex=True)
)
def test_sigmoid(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([0.0, math.log(3)], dtype=torch.float64))  # a = 1/2 and 3/4
    a = sigmoid(z)
    assert a.tolist() == pytest.approx([1 / 2, 3 / 4], rel=1e-15)
    a.backward(torch.tensor([16.0, 32.0], dtype=torch.float64))
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([4, 6], rel=1e-15)


def test_complex_derivatives(device: torch.device) -> None:
    z = torch.randn(5, 3, dtype=torch.complex128, device=device)
    assert_gradchecks(sigmoid, [z])
    assert_matches(sigmoid, torch.sigmoid, [z])


def test_saturated_neurons_keep_their_small_gradients(device: torch.device) -> None:
    # From z = 37 on 1 − a rounds to 0 in float64, here as in PyTorch's own sigmoid.
    z = torch.tensor([-700.0, -40, -20, -5, 0, 5, 20, 30], dtype=torch.float64, device=device)
    _, (found,) = gradients(sigmoid, [leaf(z)], torch.ones_like(z))
    right = torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())) ** 2
    torch.testing.assert_close(found[:-2], right[:-2], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-2:], right[-2:], rtol=1e-2, atol=0)
