import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import LinearSigmoid, linear, linear_sigmoid, sigmoid
from manual_bp.verify import CAPABILITIES, function_case, module_case, parametrize_with_checks
from tests.compatibility.subjects import Pair, pair
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

IN, OUT = 3, 4
LEADING = [(5,), (), (1,), (0,), (2, 3), (2, 0)]


def sample(*leading: int, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    options: Any = {"dtype": torch.float64, "device": device}
    return (
        torch.randn(*leading, IN, **options),
        torch.randn(OUT, IN, **options),
        torch.randn(OUT, **options),
    )


def draw(generator: torch.Generator) -> Any:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        (randn(5, IN), randn(OUT, IN), randn(OUT)),
        (randn(IN, IN), randn(IN, IN), randn(IN)),
    ]


def draw_without_bias(generator: torch.Generator) -> Any:
    return [arguments[:2] for arguments in draw(generator)]


def draw_inputs(generator: torch.Generator) -> Any:
    return [arguments[:1] for arguments in draw(generator)[:1]]


def ours(**options: Any) -> nn.Module:
    return LinearSigmoid(IN, OUT, **options)


def theirs(**options: Any) -> nn.Module:
    return Pair(IN, OUT, **options)


FUNCTION: Any = {"supports": CAPABILITIES - {"factory_kwargs"}}
CASES = [module_case(ours, draw_inputs, theirs, supports=CAPABILITIES, in_dims=(0,))]
for on in ("cpu", "cuda"):
    CASES += [
        function_case(linear_sigmoid, draw, pair, in_dims=(0, None, None), device=on, **FUNCTION),
        function_case(
            linear_sigmoid,
            draw_without_bias,
            pair,
            name="linear_sigmoid_without_bias",
            in_dims=(0, None),
            device=on,
            **FUNCTION,
        ),
    ]


@parametrize_with_checks(CASES)
def test_linear_sigmoid(check: Callable[[], None]) -> None:
    check()


def test_the_formulas_in_numbers() -> None:
    options: Any = {"dtype": torch.float64}
    a_prev = leaf(torch.tensor([[1.0, 2.0]], **options))
    w = leaf(torch.tensor([[2.0, -1.0], [4.0, 0.0]], **options))
    b = leaf(torch.tensor([0.0, -4.0], **options))
    a = linear_sigmoid(a_prev, w, b)  # z = 0 and 0, so a = 1/2 and σ' = 1/4
    assert a.tolist() == [[0.5, 0.5]]
    a.backward(torch.tensor([[4.0, 12.0]], **options))  # delta = 1 and 3
    assert a_prev.grad is not None
    assert w.grad is not None
    assert b.grad is not None
    assert a_prev.grad.tolist() == [[1 * 2 + 3 * 4, 1 * -1 + 3 * 0]]
    assert w.grad.tolist() == [[1, 2], [3, 6]]
    assert b.grad.tolist() == [1, 3]


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_derivatives_of_first_and_second_order(
    leading: tuple[int, ...], device: torch.device
) -> None:
    assert_gradchecks(linear_sigmoid, sample(*leading, device=device))


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    in_features=st.integers(0, 5),
    out_features=st.integers(0, 5),
    bias=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape(
    leading: list[int], in_features: int, out_features: int, bias: bool, layout: str
) -> None:
    options: Any = {"dtype": torch.float64}
    a = LAYOUTS[layout](torch.randn(*leading, in_features, **options))
    w = LAYOUTS[layout](torch.randn(out_features, in_features, **options))
    b = torch.randn(out_features, **options) if bias else None
    assert_matches(linear_sigmoid, pair, (a, w, b))


def test_keeps_its_input_its_weight_and_its_output(device: torch.device) -> None:
    arguments = [leaf(t) for t in sample(5, device=device)]
    kept = saved_tensors(linear_sigmoid, arguments)
    assert len(kept) == 3
    assert is_same_memory(kept[0], arguments[0])
    assert is_same_memory(kept[1], arguments[1])
    assert torch.equal(kept[2], linear_sigmoid(*arguments))


def test_frozen_arguments_keep_less(device: torch.device) -> None:
    a_prev, w, b = sample(5, device=device)
    for arguments, names in [
        ((a_prev, leaf(w), b), ["a_prev", "a"]),
        ((leaf(a_prev), w, b), ["w", "a"]),
        ((a_prev, w, leaf(b)), ["a"]),
    ]:
        assert len(saved_tensors(linear_sigmoid, arguments)) == len(names)


def test_an_undefined_gradient_costs_nothing(device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(linear_sigmoid, sample(5, device=device))


def test_backward_runs_no_derivative_kernel(device: torch.device) -> None:
    assert_no_derivative_kernel(linear_sigmoid, sample(5, device=device))


def test_an_output_changed_in_place_is_noticed(device: torch.device) -> None:
    a = linear_sigmoid(*[leaf(t) for t in sample(5, device=device)])
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


@pytest.mark.parametrize("create_graph", [True, False])
def test_backward_leaves_alone_what_it_was_given(create_graph: bool, device: torch.device) -> None:
    arguments = [leaf(t) for t in sample(5, device=device)]
    a = linear_sigmoid(*arguments)
    upstream = torch.randn_like(a)
    before = upstream.clone(), a.clone()
    torch.autograd.grad(a, arguments, upstream, create_graph=create_graph)
    assert torch.equal(upstream, before[0])
    assert torch.equal(a, before[1])


def test_a_graph_that_is_kept_can_be_run_again(device: torch.device) -> None:
    arguments = [leaf(t) for t in sample(5, device=device)]
    a = linear_sigmoid(*arguments)
    upstream = torch.randn_like(a)
    first = torch.autograd.grad(a, arguments, upstream, retain_graph=True)
    second = torch.autograd.grad(a, arguments, upstream)
    assert_same(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(a, arguments, upstream)


def test_batched_upstream_gradients(device: torch.device) -> None:
    arguments = [leaf(t) for t in sample(5, device=device)]
    a = linear_sigmoid(*arguments)
    upstream = torch.randn(7, *a.shape, dtype=a.dtype, device=device)
    found = torch.autograd.grad(a, arguments, upstream, is_grads_batched=True)
    for i, one in enumerate(upstream):
        expected = gradients(pair, arguments, one)[1]
        assert_same([grad[i] for grad in found], expected)


def test_saturated_neurons_keep_their_small_gradients(device: torch.device) -> None:
    z = torch.tensor([[-700.0], [-40], [-5], [0], [5], [20], [30]], dtype=torch.float64)
    z = z.to(device)
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    _, (found,) = gradients(lambda z: linear_sigmoid(z, one), [leaf(z)], torch.ones_like(z))
    right = torch.exp(-z.abs()) / (1 + torch.exp(-z.abs())) ** 2
    torch.testing.assert_close(found[:-2], right[:-2], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[-2:], right[-2:], rtol=1e-2, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_saturated_neurons_in_float32(compiled: bool, device: torch.device) -> None:
    """A formula that cancels would lose a third there, on machines that round in between."""
    torch._dynamo.reset()
    call = torch.compile(linear_sigmoid, backend="aot_eager") if compiled else linear_sigmoid
    z = leaf(torch.linspace(5, 16, 100, device=device)[:, None])
    one = torch.ones(1, 1, device=device)
    a = call(z, one)
    (found,) = torch.autograd.grad(a, z, torch.rand_like(a) + 1)
    exact = a.detach().double() * (1 - a.detach().double())
    assert ((found.double() / exact) > 0.999).all()
    (found,) = torch.autograd.grad(call(z, one), z, torch.ones_like(a))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_an_infinite_gradient_stays_infinite(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    found = gradients(linear_sigmoid, [a, w, leaf(b)], a.new_full((5, OUT), torch.inf))[1]
    assert_same(found, gradients(pair, [a, w, leaf(b)], a.new_full((5, OUT), torch.inf))[1])


def test_it_is_the_two_layers_bit_for_bit(device: torch.device) -> None:
    arguments = [leaf(t) for t in sample(2, 5, device=device)]
    upstream = torch.randn(2, 5, OUT, dtype=torch.float64, device=device)
    found, found_gradients = gradients(linear_sigmoid, arguments, upstream)
    two, two_gradients = gradients(lambda *t: sigmoid(linear(*t)), arguments, upstream)
    assert_same([found, *found_gradients], [two, *two_gradients], rtol=0, atol=0)


def test_module_has_the_parameters_of_nn_linear(device: torch.device) -> None:
    options: Any
    for options in ({}, {"bias": False}, {"dtype": torch.float64}):
        torch.manual_seed(7)
        module = LinearSigmoid(IN, OUT, device=device, **options)
        torch.manual_seed(7)
        linear = nn.Linear(IN, OUT, device=device, **options)
        assert repr(module) == repr(linear).replace("Linear", "LinearSigmoid")
        assert list(module.state_dict()) == list(linear.state_dict())
        for ours, theirs in zip(module.parameters(), linear.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        linear.load_state_dict(module.state_dict())
        a = torch.randn(5, IN, device=device, dtype=linear.weight.dtype)
        expected = torch.sigmoid(linear(a))
        for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(copied(a), expected)
    assert not issubclass(LinearSigmoid, nn.Linear)  # its output is not z


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(4, 3)), TypeError, "a must be a torch.Tensor; got list"),
        (
            (torch.ones(5, 2), torch.ones(4, 3)),
            ValueError,
            r"a must have last dimension 3, the second size of w; got \(5, 2\)",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(3)),
            ValueError,
            r"b must have shape \(4,\), the first size of w; got \(3,\)",
        ),
        (
            (torch.ones(5, 3).to(torch.complex64), torch.ones(4, 3).to(torch.complex64)),
            TypeError,
            "w must have a real floating-point dtype; got torch.complex64",
        ),
        (
            (torch.ones(5, 3).long(), torch.ones(4, 3).long()),
            TypeError,
            "w must have a real floating-point dtype; got torch.int64",
        ),
    ],
)
def test_bad_input(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_sigmoid(*arguments)


def test_the_module_calls_things_as_nn_linear_does() -> None:
    with pytest.raises(ValueError, match="input must have last dimension 3, the second size of we"):
        LinearSigmoid(IN, OUT)(torch.ones(5, 2))
