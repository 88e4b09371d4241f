import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import Sigmoid, sigmoid
from manual_bp.layers.sigmoid import sigmoid_prime
from tests.helpers import (
    LAYOUTS,
    assert_as_accurate,
    assert_backward_is_clean,
    assert_compiles,
    assert_gradchecks,
    assert_matches,
    assert_same,
    assert_transforms,
    assert_undefined_gradient_costs_nothing,
    gradients,
    is_same_memory,
    leaf,
    saved_tensors,
)

SHAPES = [(5, 3), (), (3,), (1, 3), (0, 3), (2, 3, 2)]


def sample(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_of_first_and_second_order(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    arguments = [sample(*shape, device=device, dtype=dtype)]
    assert_gradchecks(sigmoid, arguments)
    assert_matches(sigmoid, torch.sigmoid, arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upstream_layout", LAYOUTS)
def test_any_layout_of_input_and_gradient(
    shape: tuple[int, ...], layout: str, upstream_layout: str, device: torch.device
) -> None:
    z = LAYOUTS[layout](sample(*shape, device=device))
    upstream = LAYOUTS[upstream_layout](sample(*shape, device=device))
    assert_matches(sigmoid, torch.sigmoid, [z], upstream)


@given(shape=st.lists(st.integers(0, 4), max_size=4), layout=st.sampled_from(sorted(LAYOUTS)))
def test_any_shape(shape: list[int], layout: str) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    assert_matches(sigmoid, torch.sigmoid, [LAYOUTS[layout](z)])


def test_saturated_neurons_keep_their_small_gradients(device: torch.device) -> None:
    # From z = 37 on 1 − a rounds to 0 in float64, here as in PyTorch's own sigmoid.
    z = torch.tensor([-700.0, -40, -20, -5, 0, 5, 20, 30], dtype=torch.float64, device=device)
    _, (found,) = gradients(sigmoid, [leaf(z)], torch.ones_like(z))
    right = torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())) ** 2
    torch.testing.assert_close(found[:-2], right[:-2], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-2:], right[-2:], rtol=1e-2, atol=0)


def test_extreme_values_as_pytorch(device: torch.device) -> None:
    z = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e308, -1e308], dtype=torch.float64)
    z = z.to(device)
    upstream = torch.ones_like(z)
    ours, theirs = (gradients(call, [leaf(z)], upstream) for call in (sigmoid, torch.sigmoid))
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    torch.testing.assert_close(ours[1], theirs[1], equal_nan=True)


def test_keeps_only_its_output(device: torch.device) -> None:
    z = leaf(sample(5, 3, device=device))
    a = sigmoid(z)
    (kept,) = saved_tensors(sigmoid, [z])
    assert torch.equal(kept, a)
    assert not is_same_memory(kept, z)


def test_an_undefined_gradient_costs_nothing(device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(sigmoid, [sample(5, 3, device=device)])


def test_backward_is_clean(device: torch.device) -> None:
    assert_backward_is_clean(sigmoid, [sample(5, 3, device=device)])


def test_an_output_changed_in_place_is_noticed(device: torch.device) -> None:
    a = sigmoid(leaf(sample(5, 3, device=device)))
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    assert_as_accurate(sigmoid, torch.sigmoid, [4 * torch.randn(500, device=device)], dtype)


def test_transforms(device: torch.device) -> None:
    assert_transforms(sigmoid, torch.sigmoid, [sample(2, 3, device=device)])


def test_compiles(device: torch.device) -> None:
    assert_compiles(sigmoid, [sample(5, 3, device=device)], [sample(7, 2, device=device)])


def test_autocast_leaves_it_alone_as_pytorch_does(device: torch.device) -> None:
    with torch.autocast(device.type):
        for dtype in (torch.float32, torch.bfloat16):
            z = sample(5, 3, device=device).to(dtype)
            assert sigmoid(z).dtype is torch.sigmoid(z).dtype is dtype


def test_sigmoid_prime_is_the_derivative() -> None:
    z = leaf(torch.linspace(-5, 5, 20, dtype=torch.float64))
    a = torch.sigmoid(z)
    (expected,) = torch.autograd.grad(a.sum(), z)
    assert_same([sigmoid_prime(a.detach()), Sigmoid().prime(a.detach())], [expected, expected])


def test_module_is_nn_sigmoid_but_for_its_backward() -> None:
    module = Sigmoid()
    assert isinstance(module, nn.Sigmoid)
    assert repr(module) == repr(nn.Sigmoid())
    assert not list(module.parameters())
    z = leaf(torch.randn(5, 3))
    assert type(module(z).grad_fn).__name__ == "SigmoidFunctionBackward"
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(z), torch.sigmoid(z))


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (1.0, "z must be a torch.Tensor; got float"),
        (torch.ones(3, dtype=torch.int32), "z must have a floating-point or complex dtype; got"),
        (torch.ones(3, dtype=torch.bool), "z must have a floating-point or complex dtype; got"),
    ],
)
def test_bad_input(z: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sigmoid(z)
    with pytest.raises(TypeError, match=message.replace("z must", "input must")):
        Sigmoid()(z)
