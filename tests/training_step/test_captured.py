"""The step in a CUDA graph. What it runs is tested on the CPU too: a rate in a tensor."""

import pytest
import torch
from torch import nn

from manual_bp import Cost, QuadraticCost, SoftmaxCrossEntropyCost, TrainingStep
from tests.training_step.networks import COSTS, Reference, assert_follows, batch, network, values
from tests.training_step.test_training_step import every_activation, every_descent

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


def test_the_cpu_has_no_graphs() -> None:
    net = network()
    step = TrainingStep(net, QuadraticCost(), 0.1)
    before = values(net)
    with pytest.raises(ValueError, match="x must be on a CUDA device to be captured; got cpu"):
        step.cuda_graph(*batch(net, step.cost, 4))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


@cuda
@every_descent
@pytest.mark.parametrize("cost", COSTS, ids=repr)
def test_as_autograd_and_sgd(cost: Cost, descent: dict[str, float]) -> None:
    net = network(device="cuda")
    indices = isinstance(cost, SoftmaxCrossEntropyCost)
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    before = values(net)
    captured = step.cuda_graph(*batch(net, cost, 4, indices=indices))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    for number in range(10):
        step.lr = 0.1 / (1 + number // 4)
        reference.set_lr(step.lr)
        x, y = batch(net, cost, 4, indices=indices)
        run = step if number == 5 else captured  # they share parameters and velocities
        torch.testing.assert_close(run(x, y), reference(x, y))
    assert_follows(net, reference.net)


@cuda
@every_activation
def test_every_activation(activation: nn.Module) -> None:
    net, cost = network(activation, device="cuda"), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    captured = step.cuda_graph(*batch(net, cost, 2, 3))
    for _ in range(5):
        x, y = batch(net, cost, 2, 3)
        torch.testing.assert_close(captured(x, y), reference(x, y))
    assert_follows(net, reference.net)


@cuda
def test_what_does_not_fit_changes_nothing() -> None:
    net, cost = network(device="cuda"), QuadraticCost()
    captured = TrainingStep(net, cost, 0.1).cuda_graph(*batch(net, cost, 4))
    before = values(net)
    x, y = batch(net, cost, 3)
    with pytest.raises(ValueError, match=r"x must have shape \(4, 7\), that of the one captured"):
        captured(x, y)
    with pytest.raises(TypeError, match="x must have the dtype of the captured x"):
        captured(x.float(), y)
    with pytest.raises(ValueError, match="x must be on the device of the captured x"):
        captured(x.cpu(), y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


@cuda
def test_a_net_that_has_moved_is_not_trained_where_it_was() -> None:
    net, cost = network(device="cuda"), QuadraticCost()
    captured = TrainingStep(net, cost, 0.1).cuda_graph(*(pair := batch(net, cost, 4)))
    w = net.get_parameter("0.weight")
    w.data = w.data.clone()
    with pytest.raises(RuntimeError, match="must stay where they were captured"):
        captured(*pair)


@cuda
def test_a_step_waits_for_nothing() -> None:
    """Neither the eager step nor the captured one synchronises."""
    net = network(device="cuda", dtype=torch.float32)
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)
    x, y = batch(net, step.cost, 4)
    captured = step.cuda_graph(x, y)
    step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y)
        captured(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
