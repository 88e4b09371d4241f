import math

import pytest
import torch

from manual_bp import Sigmoid, SigmoidCrossEntropyCost, sigmoid_cross_entropy_cost
from tests.helpers import assert_same, is_same_memory, leaf, saved_tensors


def test_cost_and_gradient_in_numbers() -> None:
    z = leaf(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64))  # a = ½ and ¾
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    cost = SigmoidCrossEntropyCost()(z, y)
    assert cost.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-15)
    cost.backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([-0.5, 0.75], rel=1e-15)


def test_joint_form_equals_the_cost_as_a_function_of_a() -> None:
    z = torch.randn(5, 3, dtype=torch.float64)
    y = torch.rand(5, 3, dtype=torch.float64)
    joint, apart = leaf(z), leaf(z)
    a = Sigmoid()(apart)
    on_a = -(y * a.log() + (1 - y) * (1 - a).log()).sum(-1).mean()
    on_a.backward()
    cost = sigmoid_cross_entropy_cost(joint, y)
    cost.backward()
    assert joint.grad is not None
    assert apart.grad is not None
    assert_same([cost, joint.grad], [on_a, apart.grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cost_and_gradient_are_finite_for_any_finite_z(
    dtype: torch.dtype, device: torch.device
) -> None:
    most = torch.finfo(dtype).max
    z = leaf(
        torch.tensor([[-most], [-1e4], [-90], [0], [90], [1e4], [most]], dtype=dtype, device=device)
    )
    for target in (0.0, 0.5, 1.0):
        y = torch.full_like(z, target)
        losses = sigmoid_cross_entropy_cost(z, y, "none")
        (delta,) = torch.autograd.grad(losses.sum(), z)
        assert losses.isfinite().all()
        assert (losses >= 0).all()
        assert torch.equal(delta, torch.sigmoid(z.detach()) - y)


def test_targets_are_not_saved_for_their_own_gradient() -> None:
    z, y = torch.randn(5, 3), leaf(torch.rand(5, 3))
    (kept,) = saved_tensors(sigmoid_cross_entropy_cost, (z, y))
    assert is_same_memory(kept, z)


def test_targets_close_to_one_are_accurate() -> None:
    z = torch.tensor([[90.0]])
    y = torch.tensor([[1 - 2.0**-23]])
    loss = sigmoid_cross_entropy_cost(z, y)
    assert loss.item() == pytest.approx(90 * 2.0**-23, rel=1e-6)


def test_small_cost_of_a_confident_right_answer_is_accurate() -> None:
    z = torch.tensor([[-30.0], [-80.0]], dtype=torch.float64)
    losses = sigmoid_cross_entropy_cost(z, torch.zeros_like(z), "none")
    torch.testing.assert_close(losses, torch.exp(z)[:, 0], rtol=1e-12, atol=0)
