import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import Sigmoid, sigmoid
from manual_bp.layers.sigmoid import sigmoid_prime
from manual_bp.verify import (
    CAPABILITIES,
    function_case,
    module_case,
    parametrize_with_checks,
)
from tests.helpers import (
    LAYOUTS,
    assert_gradchecks,
    assert_matches,
    assert_no_derivative_kernel,
    assert_same,
    assert_undefined_gradient_costs_nothing,
    gradients,
    is_same_memory,
    leaf,
    saved_tensors,
)

SHAPES = [(5, 3), (), (3,), (1, 3), (0, 3), (2, 3, 2)]


def sample(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def draw(generator: torch.Generator) -> Any:
    return [(torch.randn(5, 3, generator=generator, dtype=torch.float64),)]


def draw_complex(generator: torch.Generator) -> Any:
    return [(torch.randn(5, 3, generator=generator, dtype=torch.complex128),)]


NOT_FOR_COMPLEX = {
    "autocast",
    "bfloat16",
    "factory_kwargs",
    "float16",
    "float32",
    "infinite_values",
}
CASES = [
    case
    for on in ("cpu", "cuda")
    for case in (
        function_case(
            sigmoid,
            draw,
            torch.sigmoid,
            supports=CAPABILITIES - {"factory_kwargs"},
            in_dims=(0,),
            device=on,
        ),
        function_case(
            sigmoid,
            draw_complex,
            torch.sigmoid,
            name="complex_sigmoid",
            supports=CAPABILITIES - NOT_FOR_COMPLEX,
            in_dims=(0,),
            device=on,
        ),
    )
] + [
    module_case(
        Sigmoid, draw, nn.Sigmoid, supports=CAPABILITIES - {"factory_kwargs"}, in_dims=(0,)
    ),
]


@parametrize_with_checks(CASES)
def test_sigmoid(check: Callable[[], None]) -> None:
    check()


def test_the_formula_in_numbers() -> None:
    z = leaf(torch.tensor([0.0, math.log(3)], dtype=torch.float64))  # a = 1/2 and 3/4
    a = sigmoid(z)
    assert a.tolist() == pytest.approx([1 / 2, 3 / 4], rel=1e-15)
    a.backward(torch.tensor([16.0, 32.0], dtype=torch.float64))
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([4, 6], rel=1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_of_first_and_second_order(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    arguments = [sample(*shape, device=device, dtype=dtype)]
    assert_gradchecks(sigmoid, arguments)
    assert_matches(sigmoid, torch.sigmoid, arguments)


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


def test_keeps_only_its_output(device: torch.device) -> None:
    z = leaf(sample(5, 3, device=device))
    a = sigmoid(z)
    (kept,) = saved_tensors(sigmoid, [z])
    assert torch.equal(kept, a)
    assert not is_same_memory(kept, z)


def test_an_undefined_gradient_costs_nothing(device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(sigmoid, [sample(5, 3, device=device)])


def test_backward_runs_no_derivative_kernel(device: torch.device) -> None:
    assert_no_derivative_kernel(sigmoid, [sample(5, 3, device=device)])


def test_an_output_changed_in_place_is_noticed(device: torch.device) -> None:
    a = sigmoid(leaf(sample(5, 3, device=device)))
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


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
