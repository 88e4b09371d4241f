import torch

from manual_bp import QuadraticCost, quadratic_cost
from tests.helpers import leaf


def test_cost_and_gradient_in_numbers() -> None:
    a = leaf(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]]))
    y = leaf(torch.tensor([[0.0, 2.0, 5.0], [0.0, 1.0, 0.0]]))
    # ½(1 + 0 + 4) and ½(0 + ¼ + 1)
    assert quadratic_cost(a, y, "none").tolist() == [2.5, 0.625]
    assert quadratic_cost(a, y, "sum").item() == 3.125
    cost = QuadraticCost()(a, y)
    assert cost.item() == 1.5625
    cost.backward()
    assert a.grad is not None
    assert y.grad is not None
    assert a.grad.tolist() == [[0.5, 0.0, -1.0], [0.0, -0.25, 0.5]]
    assert torch.equal(y.grad, -a.grad)


def test_mse_loss_differs_by_a_factor() -> None:
    a, y = torch.rand(5, 3), torch.rand(5, 3)
    torch.testing.assert_close(quadratic_cost(a, y), torch.nn.functional.mse_loss(a, y) * 3 / 2)
