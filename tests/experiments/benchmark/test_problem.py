import torch
from torch import nn

from experiments.benchmark.problem import problem


def test_the_network_is_made_of_pytorchs_own_layers(device: torch.device) -> None:
    net = problem((6, 5, 4), 3, device.type).net
    assert [type(module) for module in net] == [nn.Linear, nn.Sigmoid] * 2
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 6), (5,), (4, 5), (4,)]
    assert {p.device.type for p in net.parameters()} == {device.type}


def test_a_problem_is_named_by_its_sizes() -> None:
    assert str(problem((6, 5, 4), 3, "cpu")) == "6-5-4, batch 3"
    assert problem((6, 5, 4), (3, 2), "cpu").label == {"net": "6-5-4", "batch": "3×2"}


def test_a_sample_may_have_several_rows() -> None:
    task = problem((6, 5, 4), (30, 20), "cpu")
    assert (task.x.shape, task.y.shape) == ((30, 20, 6), (30, 20, 4))
    assert task.longest == 600
    assert problem((6, 5, 4), 3, "cpu").longest == 6
