"""Mixed precision: values, dtypes and gradients match those of PyTorch's layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import convert
from tests.compatibility.subjects import LAYERS, Subject, every_subject

DTYPES = [torch.bfloat16, torch.float16]


def run(call: Any, arguments: list[Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    arguments = [t.detach().requires_grad_() if t.is_floating_point() else t for t in arguments]
    with torch.autocast(device.type, dtype):
        output = call(*arguments)
    output.float().pow(2).sum().backward()  # outside of the region, as in training
    return output, [t.grad for t in arguments if t.is_floating_point()]


@every_subject
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [torch.float32, None], ids=["float32", "low"])
def test_autocast(
    subject: Subject, dtype: torch.dtype, given: torch.dtype | None, device: torch.device
) -> None:
    arguments = [
        t.to(given or dtype) if t.is_floating_point() else t
        for t in subject.arguments(device=device)
    ]
    output, grads = run(subject.ours, arguments, device, dtype)
    expected, expected_grads = run(subject.theirs, arguments, device, dtype)
    tolerance = torch.finfo(dtype).eps * 4
    if subject in LAYERS:  # there our costs are float32, like PyTorch's losses
        assert output.dtype is expected.dtype
    torch.testing.assert_close(
        output, expected, rtol=tolerance, atol=tolerance, check_dtype=subject in LAYERS
    )
    for found, right in zip(grads, expected_grads, strict=True):
        assert (found is None) == (right is None)
        if found is not None:
            assert found.dtype is right.dtype
            scale = float(right.abs().max()) if right.numel() else 1.0
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * scale)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.ReLU(True), nn.Linear(16, 4)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_training_with_a_gradient_scaler(
    dtype: torch.dtype, fuse: bool, device: torch.device
) -> None:
    losses = []
    for converted in (True, False):
        net = model().to(device)
        if converted:
            convert(net, fuse=fuse)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
        torch.manual_seed(2)
        for _ in range(5):
            x = torch.randn(6, 8, device=device)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = net(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(losses[:5], losses[5:], rtol=tolerance, atol=tolerance)


def test_nested_and_disabled_regions_cast_as_pytorch_does(device: torch.device) -> None:
    nets = [model().to(device), model().to(device)]
    convert(nets[0])
    x = torch.randn(6, 8, device=device)
    found = []
    for net in nets:
        with torch.autocast(device.type, torch.bfloat16):
            low = net[0](x)
            with torch.autocast(device.type, enabled=False):
                full = net[0](x)
            low_again = net[2](torch.sigmoid(low))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            cold = net[0](x)
        found.append([low, full, low_again, cold])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
