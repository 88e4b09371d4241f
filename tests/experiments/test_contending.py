import torch
from torch import nn

from experiments.contending import is_installed, sigmoid_network


def test_is_installed() -> None:
    assert is_installed("torch")
    assert not is_installed("no_such_library")


def test_the_network_is_pytorchs_own(device: torch.device) -> None:
    net = sigmoid_network((6, 5, 4), device.type)
    assert [type(module) for module in net] == [nn.Linear, nn.Sigmoid] * 2
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 6), (5,), (4, 5), (4,)]
    assert {p.device.type for p in net.parameters()} == {device.type}
