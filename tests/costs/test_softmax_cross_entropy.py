import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from manual_bp import SoftmaxCrossEntropyCost, softmax_cross_entropy_cost
from tests.helpers import assert_matches, assert_same, gradients, leaf


def test_cost_and_gradient_in_numbers() -> None:
    z = leaf(torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64))  # 1/8, 2/8, 5/8
    cost = SoftmaxCrossEntropyCost()(z, torch.tensor([1]))
    assert cost.item() == pytest.approx(math.log(4), rel=1e-15)
    cost.backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([1 / 8, 2 / 8 - 1, 5 / 8], rel=1e-15)


def test_indices_equal_one_hot_rows(device: torch.device) -> None:
    z = torch.randn(5, 4, dtype=torch.float64, device=device)
    indices = torch.randint(4, (5,), device=device)
    rows = F.one_hot(indices, 4).double()
    upstream = torch.ones((), dtype=torch.float64, device=device)
    value, grads = gradients(softmax_cross_entropy_cost, (leaf(z), indices), upstream)
    other_value, other_grads = gradients(softmax_cross_entropy_cost, (leaf(z), rows), upstream)
    assert_same([value, *grads], [other_value, *other_grads])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.uint16], ids=str)
def test_any_integer_dtype_is_accepted_for_indices(dtype: torch.dtype) -> None:
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(softmax_cross_entropy_cost(z, y.to(dtype)), softmax_cross_entropy_cost(z, y))


def test_rows_that_do_not_sum_to_one_match_pytorch(device: torch.device) -> None:
    z = torch.randn(5, 4, dtype=torch.float64, device=device)
    assert_matches(softmax_cross_entropy_cost, F.cross_entropy, (z, torch.rand_like(z) * 3))


def test_classes_are_in_the_last_dimension() -> None:
    z, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(4, (2, 3))
    assert_same([softmax_cross_entropy_cost(z, y)], [F.cross_entropy(z.movedim(-1, 1), y)])


def test_cost_and_gradient_are_finite_for_large_z(device: torch.device) -> None:
    z = leaf(torch.tensor([[1e30, -1e30, 0.0], [-90.0, 0.0, 90.0]], device=device))
    cost = softmax_cross_entropy_cost(z, torch.tensor([0, 2], device=device), "none")
    assert cost.isfinite().all()
    (delta,) = torch.autograd.grad(cost.sum(), z)
    assert delta.isfinite().all()


def test_indices_out_of_range_are_refused_under_vmap_and_as_parameter() -> None:
    z, y = torch.randn(2, 4), torch.tensor([0, 7])
    cost = SoftmaxCrossEntropyCost()
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.func.vmap(cost.gradient)(z, y)
    parameter = torch.nn.Parameter(y, requires_grad=False)
    with pytest.raises(ValueError, match="y must hold class indices from 0 to 3; got 0 to 7"):
        cost.gradient(z, parameter)


def test_zero_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z must have at least one class; got \(2, 0\)"):
        softmax_cross_entropy_cost(torch.randn(2, 0), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.tensor([0, 4]), ValueError, "y must hold class indices from 0 to 3; got 0 to 4"),
        (torch.tensor([-100, 1]), ValueError, "class indices from 0 to 3; got -100 to 1"),
        (torch.tensor([[0], [1]]), ValueError, r"y must have shape \(2,\), a class index for each"),
        (torch.tensor([True, False]), TypeError, "y must hold integers or probabilities; got"),
        (torch.tensor([1j, 1]), TypeError, "y must hold integers or probabilities; got"),
    ],
)
def test_bad_targets_are_refused(y: torch.Tensor, error: type[Exception], message: str) -> None:
    z = torch.randn(2, 4)
    with pytest.raises(error, match=message):
        softmax_cross_entropy_cost(z, y)
    with pytest.raises(error, match=message):
        SoftmaxCrossEntropyCost().gradient(z, y)


def test_traced_gradient_takes_class_indices() -> None:
    y = torch.tensor([1, 0])

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(softmax_cross_entropy_cost(z, y), z)[0]

    z, other = (leaf(torch.randn(2, 3, dtype=torch.float64)) for _ in range(2))
    assert_same([make_fx(gradient)(z)(other)], [gradient(other)])
