import copy
import gc
import pickle
import weakref
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import Linear, linear
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
    backward_operations,
    gradients,
    is_same_memory,
    leaf,
    saved_tensors,
)

IN, OUT = 3, 4
LEADING = [(5,), (), (1,), (0,), (2, 3), (2, 0)]
SUBSETS = [subset for subset in product([True, False], repeat=3) if any(subset)]


def sample(
    *leading: int, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    options: Any = {"dtype": dtype, "device": device}
    return (
        torch.randn(*leading, IN, **options),
        torch.randn(OUT, IN, **options),
        torch.randn(OUT, **options),
    )


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_of_first_and_second_order(
    leading: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    assert_gradchecks(linear, sample(*leading, dtype=dtype, device=device))


def test_derivatives_without_a_bias(device: torch.device) -> None:
    a, w, _ = sample(5, device=device)
    assert_gradchecks(linear, (a, w))
    assert_matches(linear, F.linear, (a, w))


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_derivatives_of_every_subset(wanted: tuple[bool, ...], device: torch.device) -> None:
    arguments = [
        leaf(t) if want else t for t, want in zip(sample(5, device=device), wanted, strict=True)
    ]
    upstream = torch.randn(5, OUT, dtype=torch.float64, device=device)
    z, found = gradients(linear, arguments, upstream)
    expected_z, expected = gradients(F.linear, arguments, upstream)
    assert_same([z, *found], [expected_z, *expected])
    for dtype in (torch.float64, torch.complex128):
        forward_ad = [t.to(dtype) for t in arguments]
        assert torch.autograd.gradcheck(linear, forward_ad, check_forward_ad=True)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upstream_layout", LAYOUTS)
def test_any_layout_of_input_and_gradient(
    leading: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    upstream_layout: str,
    device: torch.device,
) -> None:
    a, w, b = sample(*leading, dtype=dtype, device=device)
    upstream = LAYOUTS[upstream_layout](torch.randn(*leading, OUT, dtype=dtype, device=device))
    arguments = [LAYOUTS[layout](t) for t in (a, w, b)]
    assert_matches(linear, F.linear, arguments, upstream)
    assert torch.equal(linear(*arguments), F.linear(*arguments))


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
    assert_matches(linear, F.linear, (a, w, b))


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3)], ids=str)
def test_computes_and_keeps_only_what_was_asked_for(
    wanted: tuple[bool, bool, bool], leading: tuple[int, ...], device: torch.device
) -> None:
    a, w, b = (
        leaf(t) if want else t
        for t, want in zip(sample(*leading, device=device), wanted, strict=True)
    )
    needs_a, needs_w, _ = wanted
    operations = backward_operations(linear, (a, w, b))
    assert operations.matrix_products == needs_a + needs_w

    kept = saved_tensors(linear, (a, w, b))
    assert len(kept) == needs_a + needs_w
    assert any(is_same_memory(t, a) for t in kept) == needs_w
    assert any(is_same_memory(t, w) for t in kept) == needs_a


def test_an_undefined_gradient_costs_nothing(device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(linear, sample(5, device=device))


def test_backward_is_clean(device: torch.device) -> None:
    assert_backward_is_clean(linear, sample(5, device=device))


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_the_output_may_be_changed_in_place(
    leading: tuple[int, ...], count: int, device: torch.device
) -> None:
    def in_place(call: Any) -> Any:
        return lambda *arguments: call(*arguments).mul_(3).relu_()

    arguments = sample(*leading, device=device)[:count]
    assert_matches(in_place(linear), in_place(F.linear), arguments)
    assert_transforms(in_place(linear), in_place(F.linear), arguments)
    assert_compiles(in_place(linear), arguments, arguments)


def test_an_input_changed_in_place_is_noticed(device: torch.device) -> None:
    a, w, b = (leaf(t) for t in sample(5, device=device))
    z = linear(a, w, b)
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_nothing_outlives_the_graph(device: torch.device) -> None:
    gc.disable()
    try:
        a, w, b = (leaf(t) for t in sample(5, device=device))
        hidden = a * 2
        z = linear(hidden, w, b)
        watch = weakref.ref(hidden)
        z.sum().backward()
        del hidden, z
        assert watch() is None
    finally:
        gc.enable()


def test_a_frozen_weight_does_not_keep_its_input(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    hidden = leaf(a) * 2
    watch = weakref.ref(hidden)
    z = linear(hidden, w, leaf(b))
    del hidden
    assert z.requires_grad
    assert watch() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    a, w, b = (torch.randn(*shape, device=device) for shape in ((64, 50), (30, 50), (30,)))
    assert_as_accurate(linear, F.linear, (a, w, b), dtype)


def test_transforms(device: torch.device) -> None:
    assert_transforms(linear, F.linear, sample(2, device=device))


def test_per_sample_gradients(device: torch.device) -> None:
    a, w, b = sample(5, device=device)

    def per_sample(call: Any) -> Any:
        gradient = torch.func.grad(lambda w, b, a: call(a, w, b).pow(3).sum(), (0, 1))
        return torch.func.vmap(gradient, (None, None, 0))(w, b, a)

    assert_same(per_sample(linear), per_sample(F.linear))


@pytest.mark.parametrize("bias", [True, False])
def test_compiles(bias: bool, device: torch.device) -> None:
    count = 3 if bias else 2
    assert_compiles(linear, sample(5, device=device)[:count], sample(7, device=device)[:count])


def test_compiles_where_parameters_are_frozen(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for arguments in [(leaf(a), w, b), (a, leaf(w), b), (a, w, leaf(b))]:
        upstream = torch.randn(5, OUT, dtype=torch.float64, device=device)
        assert_same(
            gradients(compiled, arguments, upstream)[1], gradients(linear, arguments, upstream)[1]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    a, w, b = (leaf(t) for t in sample(5, dtype=torch.float32, device=device))
    results = []
    for call in (linear, F.linear):
        with torch.autocast(device.type, dtype):
            z = call(a, w, b)
        results.append([z, *torch.autograd.grad(z, (a, w, b), torch.ones_like(z))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    with torch.autocast(device.type):
        assert linear(a, w, b).dtype is torch.float64


def test_module_is_nn_linear_but_for_its_backward(device: torch.device) -> None:
    torch.manual_seed(7)
    ours = Linear(IN, OUT, device=device, dtype=torch.float64)
    torch.manual_seed(7)
    theirs = nn.Linear(IN, OUT, device=device, dtype=torch.float64)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)

    a = torch.randn(5, IN, dtype=torch.float64, device=device)
    upstream = torch.randn(5, OUT, dtype=torch.float64, device=device)
    for module in (ours, theirs):
        module(a).backward(upstream)
    assert type(ours(a).grad_fn).__name__ == "LinearFunctionBackward"
    assert ours.weight.grad is not None
    assert ours.bias.grad is not None
    assert theirs.weight.grad is not None
    assert theirs.bias.grad is not None
    assert_same([ours.weight.grad, ours.bias.grad], [theirs.weight.grad, theirs.bias.grad])


def test_module_without_bias_on_meta_and_in_other_dtypes() -> None:
    assert Linear(IN, OUT, bias=False).bias is None
    assert Linear(IN, OUT, False).extra_repr().endswith("bias=False")
    meta = Linear(IN, OUT, device="meta", dtype=torch.float16)
    assert meta(torch.empty(5, IN, device="meta", dtype=torch.float16)).shape == (5, OUT)


def test_module_survives_pickle_deepcopy_and_state_dict() -> None:
    module = Linear(IN, OUT)
    a = torch.randn(5, IN)
    other = Linear(IN, OUT)
    other.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(copied(a), module(a))
        nn.Linear(IN, OUT).load_state_dict(copied.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(4, 3)), TypeError, "a must be a torch.Tensor; got list"),
        (
            (torch.ones(5, 3, dtype=torch.int64), torch.ones(4, 3)),
            TypeError,
            "a must have the dtype of w, torch.float32; got torch.int64",
        ),
        (
            (torch.ones(5, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64)),
            TypeError,
            "w must have a floating-point or complex dtype; got torch.int64",
        ),
        ((torch.ones(5, 3), [[1.0]]), TypeError, "w must be a torch.Tensor; got list"),
        (
            (torch.ones(5, 3), torch.ones(4, 3, dtype=torch.float64)),
            TypeError,
            "a must have the dtype of w, torch.float64; got torch.float32",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3, device="meta")),
            ValueError,
            "a must be on the device of w, meta; got cpu",
        ),
        (
            (torch.ones(5, 3), torch.ones(3)),
            ValueError,
            r"w must have shape \(out, in\); got \(3,\)",
        ),
        (
            (torch.ones(5, 2), torch.ones(4, 3)),
            ValueError,
            r"a must have last dimension 3, the second size of w; got \(5, 2\)",
        ),
        ((torch.ones(()), torch.ones(4, 3)), ValueError, "a must have at least one dimension"),
        (
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(1)),
            ValueError,
            r"b must have shape \(4,\), the first size of w; got \(1,\)",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(5, 4)),
            ValueError,
            r"b must have shape \(4,\), the first size of w; got \(5, 4\)",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(4, dtype=torch.float16)),
            TypeError,
            "b must have the dtype of w",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3), 1.0),
            TypeError,
            "b must be a torch.Tensor; got float",
        ),
    ],
)
def test_bad_input(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear(*arguments)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.ones(5, 3).to_sparse(), "a must be a dense tensor; got layout torch.sparse_coo"),
        (
            torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged),
            "a must be a dense tensor; got a nested tensor",
        ),
        (torch.ones(5, 3).numpy(), "got ndarray, which torch.from_numpy turns into one"),
    ],
)
def test_other_kinds_of_tensor(a: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        linear(a, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        (
            torch.ones(5, 3, dtype=torch.float64),
            TypeError,
            "input must have the dtype of weight, torch.float32; got torch.float64",
        ),
        (
            torch.ones(5, 2),
            ValueError,
            r"input must have last dimension 3, the second size of weight; got \(5, 2\)",
        ),
    ],
)
def test_the_module_calls_things_as_nn_linear_does(
    a: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Linear(IN, OUT)(a)
