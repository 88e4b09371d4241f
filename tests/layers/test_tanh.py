import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from manual_bp import Tanh, tanh
from manual_bp.verify import parametrize_with_checks
from tests.helpers import activation_cases, assert_gradchecks, assert_matches, leaf


@parametrize_with_checks(activation_cases(tanh, torch.tanh, Tanh, nn.Tanh, is_complex=True))
def test_tanh(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([0.0, math.log(2)], dtype=torch.float64))  # a = 0 and 3/5
    a = tanh(z)
    assert a.tolist() == pytest.approx([0, 3 / 5], rel=1e-15)
    a.backward(torch.tensor([5.0, 50.0], dtype=torch.float64))
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([5, 50 * 16 / 25], rel=1e-15)


def test_complex_derivatives(device: torch.device) -> None:
    z = torch.randn(5, 3, dtype=torch.complex128, device=device)
    assert_gradchecks(tanh, [z])
    assert_matches(tanh, torch.tanh, [z])


def test_saturated_neurons_keep_their_small_gradients(device: torch.device) -> None:
    z = torch.linspace(-8, 8, 101, device=device)
    a = tanh(leaf(z))
    found = Tanh().sigma_prime(a.detach())
    exact = 1 - a.detach().double() ** 2  # exact to 1e-16, for an a of float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)
