from collections.abc import Iterator

import pytest
import torch
from torch import nn

from experiments.contending import allowance, is_installed, sigmoid_network


def test_is_installed() -> None:
    assert is_installed("torch")
    assert not is_installed("no_such_library")


def test_the_network_is_pytorchs_own(device: torch.device) -> None:
    net = sigmoid_network((6, 5, 4), device.type)
    assert [type(module) for module in net] == [nn.Linear, nn.Sigmoid] * 2
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 6), (5,), (4, 5), (4,)]
    assert {p.device.type for p in net.parameters()} == {device.type}


@pytest.fixture
def precision() -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


ROUNDED = [("highest", torch.float32), ("high", torch.float16), ("medium", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)  # float16 has as many digits as TF32
@pytest.mark.usefixtures("precision")
def test_what_is_allowed_goes_with_the_precision_of_products(name: str, dtype: torch.dtype) -> None:
    """Products of rounded factors are let pass; three digits fewer are not."""
    torch.set_float32_matmul_precision(name)
    w = torch.randn(4, 256, 256, dtype=torch.float64) / 16
    right = w[0] @ w[1] @ w[2] @ w[3]
    errors = []
    for factors in (w.to(dtype).double(), w * (1 + 100 * torch.finfo(dtype).eps)):
        found = factors[0] @ factors[1] @ factors[2] @ factors[3]
        errors.append(((found - right).abs().max() / right.abs().max()).item())
    assert errors[0] <= allowance(4, 256) < errors[1]
