"""What every cost has in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from manual_bp import (
    Cost,
    QuadraticCost,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    quadratic_cost,
    sigmoid_cross_entropy_cost,
    softmax_cross_entropy_cost,
)
from manual_bp.costs._cost import REDUCTIONS
from manual_bp.verify import CAPABILITIES, function_case, parametrize_with_checks
from manual_bp.verify import Case as KitCase
from tests.helpers import (
    LAYOUTS,
    assert_gradchecks,
    assert_matches,
    assert_no_derivative_kernel,
    assert_same,
    assert_undefined_gradient_costs_nothing,
    gradients,
    is_differentiable,
    is_same_memory,
    leaf,
    saved_tensors,
)


class Case(NamedTuple):
    """A cost, its losses computed by PyTorch, and how to make targets for an output."""

    cost: type[Cost]
    call: Callable[..., Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor], Tensor]


def random_indices(output: Tensor) -> Tensor:
    return torch.randint(output.shape[-1], output.shape[:-1], device=output.device)


def index_losses(z: Tensor, y: Tensor) -> Tensor:
    # PyTorch has the classes in the second dimension.
    losses = F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), reduction="none")
    return losses.reshape(y.shape)


CASES = {
    "quadratic": Case(
        QuadraticCost,
        quadratic_cost,
        lambda a, y: F.mse_loss(a, y, reduction="none").sum(-1) / 2,
        torch.rand_like,
    ),
    "sigmoid": Case(
        SigmoidCrossEntropyCost,
        sigmoid_cross_entropy_cost,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1),
        torch.rand_like,
    ),
    "softmax of probabilities": Case(
        SoftmaxCrossEntropyCost,
        softmax_cross_entropy_cost,
        lambda z, y: -(y * torch.log_softmax(z, -1)).sum(-1),
        lambda z: torch.softmax(torch.randn_like(z), -1),
    ),
    "softmax of indices": Case(
        SoftmaxCrossEntropyCost, softmax_cross_entropy_cost, index_losses, random_indices
    ),
}
LEADING = [(5,), (), (1,), (2, 3)]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def sample(
    case: Case,
    *leading: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    output = torch.randn(*leading, 4, dtype=dtype, device=device)
    return output, case.targets(output)


def ours(case: Case, reduction: str) -> Callable[..., Tensor]:
    return lambda output, y: case.call(output, y, reduction)


def reference(case: Case, reduction: str) -> Callable[..., Tensor]:
    reduces: Any = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}
    reduce = reduces[reduction]
    return lambda output, y: reduce(case.losses(output, y))


def kit_case(name: str, reduction: str, on: str) -> KitCase:
    case = CASES[name]

    def draw(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return [sample(case, 5)]

    return function_case(
        ours(case, reduction),
        draw,
        reference(case, reduction),
        name=f"{name}-{reduction}".replace(" ", "_"),
        supports=CAPABILITIES - {"factory_kwargs"},
        in_dims=(0, 0),
        device=on,
    )


@parametrize_with_checks(
    kit_case(name, reduction, on)
    for on in ("cpu", "cuda")
    for name in CASES
    for reduction in REDUCTIONS
)
def test_costs(check: Callable[[], None]) -> None:
    check()


@every_case
@every_reduction
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_derivatives_of_first_and_second_order(
    case: Case, reduction: str, leading: tuple[int, ...], device: torch.device
) -> None:
    assert_gradchecks(ours(case, reduction), sample(case, *leading, device=device))


@given(
    name=st.sampled_from(sorted(CASES)),
    reduction=st.sampled_from(REDUCTIONS),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape(name: str, reduction: str, shape: list[int], layout: str) -> None:
    case = CASES[name]
    output = torch.randn(*shape, dtype=torch.float64)
    arguments = (LAYOUTS[layout](output), case.targets(output))
    assert_matches(ours(case, reduction), reference(case, reduction), arguments)


@every_case
def test_cost_of_no_samples_is_zero_or_nan(case: Case, device: torch.device) -> None:
    arguments = sample(case, 0, device=device)
    for reduction, expected in (("sum", 0.0), ("mean", torch.nan)):
        output = leaf(arguments[0])
        cost = case.call(output, arguments[1], reduction)
        torch.testing.assert_close(cost.item(), expected, equal_nan=True)
        cost.backward()
        assert output.grad is not None
        assert output.grad.shape == (0, 4)
    assert case.call(*arguments, "none").shape == (0,)


@every_case
@every_reduction
def test_gradient_equals_that_of_autograd(case: Case, reduction: str, device: torch.device) -> None:
    output, y = sample(case, 5, device=device)
    cost = case.cost(reduction)  # type: ignore[arg-type]
    value, (expected,) = gradients(cost, (leaf(output), y), torch.ones_like(cost(output, y)))
    assert torch.equal(value, cost(output, y))
    assert torch.equal(cost.gradient(output, y), expected)


@every_case
def test_undefined_gradient_runs_no_backward(case: Case, device: torch.device) -> None:
    assert_undefined_gradient_costs_nothing(case.call, sample(case, 5, device=device))


@every_case
@every_reduction
def test_backward_runs_no_derivative_kernel(
    case: Case, reduction: str, device: torch.device
) -> None:
    assert_no_derivative_kernel(ours(case, reduction), sample(case, 5, device=device))


@every_case
def test_only_the_arguments_are_saved(case: Case) -> None:
    output, y = sample(case, 5)
    kept = saved_tensors(case.call, (leaf(output), y))
    assert [is_same_memory(one, two) for one, two in zip(kept, (output, y), strict=False)]
    assert len(kept) == 2


@every_case
@pytest.mark.parametrize("at", ["anywhere", "zero"])
def test_compiled_transforms_match_pytorch(case: Case, at: str, device: torch.device) -> None:
    """In these, PyTorch differentiates our forward, so that must be differentiable everywhere."""
    output, y = sample(case, 2, device=device)
    if at == "zero":
        output = torch.zeros_like(output)

    def derivatives(call: Callable[..., Tensor]) -> Callable[..., Any]:
        first = torch.func.grad(call)
        return lambda output: (first(output, y), torch.func.hessian(call)(output, y))

    torch._dynamo.reset()
    compiled = torch.compile(derivatives(case.call), fullgraph=True, backend="eager")
    assert_same(compiled(output), derivatives(reference(case, "mean"))(output))


@every_case
def test_autocast_computes_in_float32(case: Case, device: torch.device) -> None:
    output, y = sample(case, 5, dtype=torch.float32, device=device)
    low = leaf(output.to(torch.bfloat16))
    with torch.autocast(device.type, torch.bfloat16):
        cost = case.call(low, y)
        expected = case.call(low.detach().float(), y)
    assert cost.dtype is torch.float32
    assert torch.equal(cost, expected)
    cost.backward()
    assert low.grad is not None
    assert low.grad.dtype is torch.bfloat16


@every_case
def test_repr_and_state_dict_of_the_module(case: Case) -> None:
    assert repr(case.cost()) == f"{case.cost.__name__}()"
    assert repr(case.cost("sum")) == f"{case.cost.__name__}(reduction='sum')"
    assert not case.cost().state_dict()


@every_case
def test_bad_input_is_refused(case: Case) -> None:
    output, y = sample(case, 5)
    name = "a" if case.cost is QuadraticCost else "z"
    bad: list[tuple[Any, type[Exception], str]] = [
        ((1.0, y), TypeError, f"{name} must be a torch.Tensor; got float"),
        ((output, 1.0), TypeError, "y must be a torch.Tensor; got float"),
        ((output.long(), y), TypeError, f"{name} must have a real floating-point dtype; got"),
        (
            (output.to(torch.complex64), y),
            TypeError,
            f"{name} must have a real floating-point dtype; got",
        ),
        ((output[0, 0], y), ValueError, f"{name} must have at least one dimension"),
        ((output, y[:4]), ValueError, r"y must have shape \(5"),
        ((output, y.to("meta")), ValueError, f"y must be on the device of {name}, cpu; got meta"),
        (
            (output, y, "avg"),
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none'; got 'avg'",
        ),
    ]
    if is_differentiable(y):
        bad += [
            ((output, y.float()), TypeError, f"y must have the dtype of {name}, torch.float64"),
            ((output, y[:, :1]), ValueError, rf"y must have shape \(5, 4\), that of {name}"),
        ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            case.call(*arguments)
        if len(arguments) == 2:
            with pytest.raises(error, match=message):
                case.cost().gradient(*arguments)
    with pytest.raises(ValueError, match="reduction must be one of"):
        case.cost("avg")  # type: ignore[arg-type]


def test_user_cost_must_define_forward_and_gradient() -> None:
    class Unfinished(Cost):
        pass

    output = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match=r"Unfinished must define forward\(output, y\)"):
        Unfinished()(output, output)
    with pytest.raises(NotImplementedError, match=r"Unfinished must define gradient\(output, y\)"):
        Unfinished().gradient(output, output)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 3), (3,), (2, 4, 3), (0, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_bind_equals_forward_and_gradient(
    case: Case, reduction: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    cost = case.cost(reduction)
    output = torch.empty(shape, dtype=dtype, device=device)
    delta = torch.empty_like(output)
    error_, weight = cost.bind(output, delta)
    for _ in range(2):
        output.copy_(torch.rand(shape))
        y = case.targets(output)
        with torch.no_grad():
            found = error_(y)
        eps = torch.finfo(dtype).eps
        expected_cost = cost(output, y)
        torch.testing.assert_close(found, expected_cost, rtol=8 * eps, atol=8 * eps, equal_nan=True)
        expected = cost.gradient(output, y)
        torch.testing.assert_close(delta * weight, expected, rtol=8 * eps, atol=eps)


def test_bind_of_a_user_cost_needs_only_forward_and_gradient() -> None:
    class Absolute(Cost):
        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return (output - y).abs().sum()

        def gradient(self, output: Tensor, y: Tensor) -> Tensor:
            return (output - y).sign()

    output, delta = torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2)
    error_, weight = Absolute("sum").bind(output, delta)
    assert error_(torch.zeros(1, 2)).item() == 3
    assert (delta.tolist(), weight) == ([[1, -1]], 1)
