import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import Linear, linear
from manual_bp.verify import (
    CAPABILITIES,
    check_function,
    function_case,
    module_case,
    parametrize_with_checks,
)
from tests.helpers import (
    LAYOUTS,
    NOT_FOR_COMPLEX,
    assert_gradchecks,
    assert_matches,
    assert_no_derivative_kernel,
    assert_same,
    assert_undefined_gradient_costs_nothing,
    gradients,
    leaf,
)

IN, OUT = 3, 4
LEADING = [(5,), (), (1,), (0,), (2, 3), (2, 0)]


def sample(
    *leading: int, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    options: Any = {"dtype": dtype, "device": device}
    return (
        torch.randn(*leading, IN, **options),
        torch.randn(OUT, IN, **options),
        torch.randn(OUT, **options),
    )


def draw(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Any:
    """Not square, so that a missing transpose shows; and square, so that two can be tied."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return [
        (randn(5, IN), randn(OUT, IN), randn(OUT)),
        (randn(IN, IN), randn(IN, IN), randn(IN)),
    ]


def draw_complex(generator: torch.Generator) -> Any:
    return draw(generator, torch.complex128)


def draw_without_bias(generator: torch.Generator) -> Any:
    return [arguments[:2] for arguments in draw(generator)]


def draw_inputs(generator: torch.Generator) -> Any:
    return [arguments[:1] for arguments in draw(generator)[:1]]


def ours(**options: Any) -> nn.Module:
    return Linear(IN, OUT, **options)


def theirs(**options: Any) -> nn.Module:
    return nn.Linear(IN, OUT, **options)


CASES = [
    case
    for on in ("cpu", "cuda")
    for case in (
        function_case(
            linear,
            draw,
            F.linear,
            supports=CAPABILITIES - {"factory_kwargs"},
            in_dims=(0, None, None),
            device=on,
        ),
        function_case(
            linear,
            draw_without_bias,
            F.linear,
            name="linear_without_bias",
            supports=CAPABILITIES - {"factory_kwargs"},
            in_dims=(0, None),
            device=on,
        ),
        function_case(
            linear,
            draw_complex,
            F.linear,
            name="complex_linear",
            supports=CAPABILITIES - NOT_FOR_COMPLEX,
            in_dims=(0, None, None),
            device=on,
        ),
    )
] + [
    module_case(ours, draw_inputs, theirs, supports=CAPABILITIES, in_dims=(0,)),
]


@parametrize_with_checks(CASES)
def test_linear(check: Callable[[], None]) -> None:
    check()


def test_the_formulas_in_numbers() -> None:
    a, w, b = (leaf(torch.tensor(t)) for t in ([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], [7.0, 8.0]))
    z = linear(a, w, b)
    assert z.tolist() == [[1 * 3 + 2 * 4 + 7, 1 * 5 + 2 * 6 + 8]]
    z.backward(torch.tensor([[10.0, 100.0]]))
    assert a.grad is not None
    assert w.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [[10 * 3 + 100 * 5, 10 * 4 + 100 * 6]]
    assert w.grad.tolist() == [[10 * 1, 10 * 2], [100 * 1, 100 * 2]]
    assert b.grad.tolist() == [10, 100]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_of_first_and_second_order(
    leading: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    assert_gradchecks(linear, sample(*leading, dtype=dtype, device=device))


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


def test_an_undefined_gradient_costs_nothing(device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(linear, sample(5, device=device))


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_the_output_may_be_changed_in_place(
    leading: tuple[int, ...], count: int, device: torch.device
) -> None:
    def in_place(call: Any) -> Any:
        return lambda *arguments: call(*arguments).mul_(3).relu_()

    arguments = sample(*leading, device=device)[:count]
    assert_matches(in_place(linear), in_place(F.linear), arguments)
    has_samples = len(leading) == 1 and leading[0] > 0
    wanted = ["double_backward", "forward_ad", "compile"]
    wanted += ["per_sample_gradients"] if has_samples else []
    check_function(
        in_place(linear),
        [arguments, sample(5, device=device)[:count]],  # without samples there is nothing to judge
        in_place(F.linear),
        only=wanted,
        supports=wanted,
        in_dims=(0, None, None)[:count] if has_samples else None,
        device=device,
    ).raise_if_failed()


def test_backward_runs_no_derivative_kernel(device: torch.device) -> None:
    assert_no_derivative_kernel(linear, sample(5, device=device))


def test_a_frozen_weight_does_not_keep_its_input(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    hidden = leaf(a) * 2
    watch = weakref.ref(hidden)
    z = linear(hidden, w, leaf(b))
    del hidden
    assert z.requires_grad
    assert watch() is None


def test_compiles_where_parameters_are_frozen(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for arguments in [(leaf(a), w, b), (a, leaf(w), b), (a, w, leaf(b))]:
        upstream = torch.randn(5, OUT, dtype=torch.float64, device=device)
        assert_same(
            gradients(compiled, arguments, upstream)[1], gradients(linear, arguments, upstream)[1]
        )


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    a, w, b = sample(5, device=device)
    with torch.autocast(device.type):
        assert linear(a, w, b).dtype is torch.float64


def test_module_is_nn_linear_except_for_its_backward(device: torch.device) -> None:
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
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(4, device="meta")),
            ValueError,
            "b must be on the device of w, cpu; got meta",
        ),
        (
            (torch.ones(5, 3), torch.ones(4, 3), torch.ones(4).to_sparse()),
            TypeError,
            "b must be a dense tensor; got layout torch.sparse_coo",
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


def test_integers_pass_as_in_pytorch() -> None:
    a, w, b = torch.ones(5, 3).long(), torch.arange(12).view(4, 3), torch.arange(4)
    assert torch.equal(linear(a, w, b), F.linear(a, w, b))


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_of_the_older_kind() -> None:
    a = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    with pytest.raises(TypeError, match="a must be a dense tensor; got a nested tensor"):
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
