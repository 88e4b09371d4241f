"""What every activation must do: the same tests for all of them."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functionalize, jacfwd

from manual_bp import LeakyReLU, ReLU, Softplus
from manual_bp.layers._activation import ACTIVATIONS
from tests.activations import IN_PLACE, TABLE, Facts
from tests.helpers import (
    LAYOUTS,
    Operations,
    assert_gradchecks,
    assert_matches,
    assert_no_derivative_kernel,
    assert_same,
    assert_undefined_gradient_costs_nothing,
    is_same_memory,
    leaf,
    saved_tensors,
)

SHAPES = [(5, 3), (), (3,), (1, 3), (0, 3), (2, 3, 2)]


every_activation = pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.name)
keeps_a = pytest.mark.parametrize(
    "kind", [kind for kind in TABLE if kind.saves == "a"], ids=lambda kind: kind.name
)
keeps_z = pytest.mark.parametrize(
    "kind", [kind for kind in TABLE if kind.saves == "z"], ids=lambda kind: kind.name
)
in_place = pytest.mark.parametrize("kind", IN_PLACE, ids=lambda kind: kind.name)


def sample(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def test_every_activation_has_a_row_in_the_table() -> None:
    assert {kind.module for kind in TABLE} == set(ACTIVATIONS)
    assert [len(kind.options) for kind in TABLE] == [len(kind.module.options) for kind in TABLE]


@every_activation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_of_first_and_second_order(
    kind: Facts, shape: tuple[int, ...], device: torch.device
) -> None:
    arguments = [sample(*shape, device=device)]
    assert_gradchecks(kind.call, arguments)
    assert_matches(kind.call, kind.reference, arguments)


@every_activation
@given(shape=st.lists(st.integers(0, 4), max_size=4), layout=st.sampled_from(sorted(LAYOUTS)))
def test_any_shape(kind: Facts, shape: list[int], layout: str) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    assert_matches(kind.call, kind.reference, [LAYOUTS[layout](z)])


@keeps_a
def test_keeps_only_its_output(kind: Facts, device: torch.device) -> None:
    z = leaf(sample(5, 3, device=device))
    a = kind.call(z)
    (kept,) = saved_tensors(kind.call, [z])
    assert torch.equal(kept, a)
    assert not is_same_memory(kept, z)


@keeps_z
def test_keeps_only_its_input(kind: Facts, device: torch.device) -> None:
    z = leaf(sample(5, 3, device=device))
    (kept,) = saved_tensors(kind.call, [z])
    assert is_same_memory(kept, z)


@every_activation
def test_an_undefined_gradient_costs_nothing(kind: Facts, device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(kind.call, [sample(5, 3, device=device)])


@every_activation
def test_backward_runs_no_derivative_kernel(kind: Facts, device: torch.device) -> None:
    assert_no_derivative_kernel(kind.call, [sample(5, 3, device=device)])


@keeps_z
def test_an_output_may_be_changed_in_place(kind: Facts, device: torch.device) -> None:
    z = sample(5, 3, device=device)
    assert_matches(lambda z: kind.call(z).mul_(3), lambda z: kind.reference(z) * 3, [z])


@keeps_a
def test_an_output_changed_in_place_is_noticed(kind: Facts, device: torch.device) -> None:
    a = kind.call(leaf(sample(5, 3, device=device)))
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


@every_activation
def test_an_infinite_gradient_gives_what_pytorch_gives(kind: Facts, device: torch.device) -> None:
    z = sample(5, 3, device=device)
    assert_matches(kind.call, kind.reference, [z], torch.full_like(z, torch.inf))


@every_activation
def test_strides_are_those_of_pytorch(kind: Facts, device: torch.device) -> None:
    z = sample(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    ours, theirs = leaf(z), leaf(z)
    a, expected = kind.call(ours), kind.reference(theirs)
    assert a.stride() == expected.stride()
    upstream = torch.randn_like(a)
    (grad,) = torch.autograd.grad(a, ours, upstream)
    (expected_grad,) = torch.autograd.grad(expected, theirs, upstream)
    assert grad.stride() == expected_grad.stride()


@every_activation
def test_autocast_does_what_pytorch_does(kind: Facts, device: torch.device) -> None:
    with torch.autocast(device.type):
        for dtype in (torch.float32, torch.bfloat16):
            z = sample(5, 3, device=device).to(dtype)
            assert kind.call(z).dtype is kind.reference(z).dtype


@every_activation
def test_prime_is_the_derivative(kind: Facts) -> None:
    z = leaf(torch.linspace(-5, 5, 20, dtype=torch.float64))
    a = kind.reference(z)
    (expected,) = torch.autograd.grad(a.sum(), z)
    found = kind.module().sigma_prime(a.detach())
    assert found.dtype is torch.float64
    assert_same([found], [expected])


@every_activation
def test_module_is_pytorchs_except_for_its_backward(kind: Facts) -> None:
    module = kind.module()
    assert isinstance(module, kind.reference_module)
    assert repr(module) == repr(kind.reference_module())
    assert not module.state_dict()
    z = leaf(torch.randn(5, 3))
    assert type(module(z).grad_fn).__name__ == f"{kind.module.__name__}FunctionBackward"
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(z), kind.reference(z))


@in_place
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(kind: Facts, shape: tuple[int, ...], device: torch.device) -> None:
    z = sample(*shape, device=device)
    overwritten = z.clone()
    assert kind.call(overwritten, inplace=True) is overwritten
    assert torch.equal(overwritten, kind.reference(z))
    module = kind.module(inplace=True)
    assert repr(module) == repr(kind.reference_module(inplace=True))
    for call in (lambda z: kind.call(z * 1, inplace=True), lambda z: module(z * 1)):
        assert_gradchecks(call, [z])
        assert_matches(call, kind.reference, [z])


@in_place
def test_in_place_without_a_graph_gives_back_the_tensor_itself(kind: Facts) -> None:
    z = leaf(torch.randn(5)) * 1
    with torch.no_grad():
        a = kind.call(z, inplace=True)
    assert a is z
    assert a.requires_grad


@in_place
def test_in_place_keeps_no_second_tensor(kind: Facts, device: torch.device) -> None:
    z = leaf(sample(5, 3, device=device)) * 1
    (kept,) = saved_tensors(lambda z: kind.call(z, inplace=True), [z])
    assert kept.data_ptr() == z.data_ptr()


@in_place
def test_in_place_is_refused_where_pytorch_refuses_it(kind: Facts) -> None:
    z = leaf(torch.randn(5, 3))
    for call in (kind.call, kind.reference):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            call(z, inplace=True)
    squared = (needed := leaf(torch.randn(5))).square().exp()
    kind.call(squared, inplace=True)  # exp needs its own output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    assert needed.grad is None


@in_place
@pytest.mark.parametrize("compiled", [True, False])
def test_in_place_compiled_and_transformed(
    kind: Facts, compiled: bool, device: torch.device
) -> None:
    def net(call: Any) -> Callable[[Tensor], Tensor]:
        def run(z: Tensor) -> Tensor:
            z = z * 2
            a = call(z, inplace=True)
            total: Tensor = (a + z).pow(2).sum()
            return total

        return run

    z = sample(5, 3, device=device)
    ours = torch.func.vmap(torch.func.grad(net(kind.call)))
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same([ours(z)], [torch.func.vmap(torch.func.grad(net(kind.reference)))(z)])
    if compiled:
        ours = torch.compile(net(kind.call), fullgraph=True, backend="aot_eager")
        assert_matches(ours, net(kind.reference), [z])


@in_place
def test_in_place_functionalized(kind: Facts, device: torch.device) -> None:
    def functionalized(call: Any) -> Callable[[Tensor], Tensor]:
        result: Callable[[Tensor], Tensor] = functionalize(lambda z: call(z * 2, inplace=True))
        return result

    z = sample(5, 3, device=device)
    ours, theirs = functionalized(kind.call), functionalized(kind.reference)
    assert_matches(ours, theirs, [z])
    assert_same([jacfwd(ours)(z)], [jacfwd(theirs)(z)])


@every_activation
def test_bad_input(kind: Facts) -> None:
    for z, error, message in [
        (1.0, TypeError, "z must be a torch.Tensor; got float"),
        (torch.ones(3).to_sparse(), TypeError, "z must be a dense tensor; got layout"),
    ]:
        with pytest.raises(error, match=message):
            kind.call(z)
        with pytest.raises(error, match=message.replace("z must", "input must")):
            kind.module()(z)


@every_activation
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16], ids=str
)
def test_other_dtypes_are_taken_or_refused_as_by_pytorch(kind: Facts, dtype: torch.dtype) -> None:
    z = torch.tensor([0, 1, 1]).to(dtype)
    try:
        expected = kind.reference(z)
    except (RuntimeError, NotImplementedError):
        with pytest.raises(TypeError, match=rf"z must have a real .*; got {dtype}"):
            kind.call(z)
        with pytest.raises(TypeError, match=rf"input must have a real .*; got {dtype}"):
            kind.module()(z)
    else:
        assert kind.call(z).dtype is expected.dtype
        assert torch.equal(kind.module()(z), expected)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sigma_prime_from_z_is_exact_however_far_out(
    kind: Facts, dtype: torch.dtype, device: torch.device
) -> None:
    far = torch.tensor([0.5, 3, 8.75, 17, 30, 80], dtype=dtype, device=device)
    z = torch.cat([far, -far])
    found = kind.module().sigma_prime_from_z(z)
    assert (found.dtype, found.shape) == (dtype, z.shape)
    expected = torch.tensor([kind.slope(value) for value in z.tolist()], dtype=torch.float64)
    smallest = torch.finfo(dtype).tiny if kind.slope(-80) else 0.0
    eps = torch.finfo(dtype).eps
    assert_same([found.double().cpu()], [expected.clamp(min=smallest)], rtol=64 * eps, atol=0)


@every_activation
def test_slopes_are_the_bounds_of_sigma_prime(kind: Facts) -> None:
    z = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    module = kind.module()
    prime = module.sigma_prime_from_z(z)
    assert (prime.min().item(), prime.max().item()) == pytest.approx(module.slope_bounds, abs=1e-12)


def test_slopes_of_a_leaky_relu_that_is_steeper_below() -> None:
    assert LeakyReLU(3.0).slope_bounds == (1.0, 3.0)


def test_sigma_prime_from_z_where_a_does_not_determine_it() -> None:
    module = Softplus(threshold=1.0)
    z = torch.tensor([-1.0, 0.5, 1.5])
    assert_same(
        [module.sigma_prime_from_z(z)], [torch.tensor([0.26894142, 0.62245933, 1.0])], rtol=1e-6
    )
    assert module.sigma_prime_from_z(torch.tensor(-500.0)) > 0


EXTREMES = [0.0, -0.0, 1e-30, 0.3, -0.3, 5.0, -5.0, 12.0, -12.0, 16.5, -16.5, 40.0, -40.0, 100.0]


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_in_place_is_the_same(kind: Facts, dtype: torch.dtype, device: torch.device) -> None:
    """σ is bit for bit that of forward; grad_a ⊙ σ' is prime's, rounded at most once more."""
    module = kind.module()
    z = torch.cat([sample(30, device=device), torch.tensor(EXTREMES, device=device).double()])
    z = z.to(dtype).view(4, 11)
    grad_a = sample(4, 11, device=device).to(dtype)
    a = module(z)
    expected = (grad_a.double() * module.sigma_prime(a).double()).to(dtype)
    buffer, delta = z.clone(), grad_a.clone()
    sigma_, times_sigma_prime_ = module.bind(buffer)
    for _ in range(2):  # the calls may be used again
        buffer.copy_(z)
        delta.copy_(grad_a)
        sigma_()
        assert torch.equal(buffer, a)
        times_sigma_prime_(delta)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(delta, expected, rtol=3 * eps, atol=0)


@every_activation
def test_in_place_needs_no_derivative_kernel(kind: Facts) -> None:
    a = sample(3, 4, device=torch.device("cpu"))
    sigma_, times_sigma_prime_ = kind.module().bind(a)
    operations = Operations()
    with operations:
        sigma_()
        times_sigma_prime_(torch.ones_like(a))
    assert operations.names
    assert not [name for name in operations.names if name.endswith("_backward")]


def test_bind_turns_infinite_errors_into_0_where_a_relu_is_off() -> None:
    a = torch.tensor([0.0, 2.0])
    _, times_sigma_prime_ = ReLU().bind(a)
    delta = torch.tensor([math.inf, math.inf])
    times_sigma_prime_(delta)
    assert delta.tolist() == [0, math.inf]


def test_a_softplus_with_a_low_threshold_cannot_be_bound() -> None:
    with pytest.raises(ValueError, match=r"threshold must be at least 20\.0; got 5"):
        Softplus(1, 5).bind(torch.zeros(2))
