from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from manual_bp import ReLU, relu
from manual_bp.verify import parametrize_with_checks
from tests.helpers import activation_cases, leaf


@parametrize_with_checks(activation_cases(relu, F.relu, ReLU, nn.ReLU))
def test_relu(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([-2.0, 0.0, 3.0]))
    a = relu(z)
    assert a.tolist() == [0, 0, 3]
    a.backward(torch.tensor([10.0, 20.0, 30.0]))
    assert z.grad is not None
    assert z.grad.tolist() == [0, 0, 30]
