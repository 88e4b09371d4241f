"""Without a reference: large arguments. And what depends on a dtype: integers, shared rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from manual_bp.verify import check_function
from manual_bp.verify._report import Outcome

Draw = Callable[[Generator], list[tuple[Any, ...]]]


def rows(generator: Generator) -> list[tuple[Any, ...]]:
    return [(torch.rand(5, 3, generator=generator) - 0.5,)]


def judged(check: str, call: Any, samples: Any = rows, **options: Any) -> Outcome:
    (outcome,) = check_function(call, samples, only=[check], **options).outcomes
    return outcome


class Gradient(torch.autograd.Function):
    """Any function with any slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Any, slope: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return value(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.slope(*ctx.saved_tensors), None, None


RIGHT = {
    "outside of the domain": torch.acos,
    "steps": lambda x: torch.round(x, decimals=3),
    "overflows": lambda x: x.cosh() - x.sinh(),
    "kinks": F.relu6,
    "waves": torch.sin,
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_check_accuses_a_right_call_far_out(name: str) -> None:
    for check in ("no_nan", "slopes_far_out"):
        assert judged(check, RIGHT[name]).status != "failed", check


@pytest.mark.parametrize("cut", [3.0, 6.0, 10.0])
def test_a_derivative_that_is_cut_off_too_early_is_found(cut: float) -> None:
    def call(x: Tensor) -> Any:
        return Gradient.apply(x, F.softplus, lambda x: torch.where(x > cut, 1, x.sigmoid()))

    outcome = judged("slopes_far_out", call, [(torch.linspace(0.1, 0.9, 20),)])
    assert outcome.status == "failed"
    assert "at 30 times" in outcome.message


@pytest.mark.parametrize(
    ("dtype", "status"), [(torch.bfloat16, "failed"), (torch.float16, "passed")]
)
def test_nan_is_asked_for_only_where_squares_do_not_overflow(
    dtype: torch.dtype, status: str
) -> None:
    def call(x: Tensor) -> Any:
        return Gradient.apply(x, torch.tanh, lambda x: torch.where(x > 1e3, torch.nan, 1))

    assert judged("no_nan", call, dtypes=[dtype]).status == status


def labels(*values: int) -> Draw:
    return lambda g: [(torch.randn(len(values), 4, generator=g), torch.tensor(values))]


def test_labels_that_are_refused_in_int32_are_not_judged() -> None:
    outcome = judged("integer_dtypes", F.nll_loss, labels(0, 3, 1))
    assert outcome.status == "not applicable"
    assert "refuses another integer dtype: RuntimeError" in outcome.message


def test_integers_too_large_for_int32_are_not_judged() -> None:
    outcome = judged("integer_dtypes", lambda x, n: x * (n % 3)[:, None], labels(2**40, 1))
    assert outcome.status == "not applicable"
    assert "fit into int32" in outcome.message


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_that_are_read_in_one_dtype_only_are_found(dtype: torch.dtype) -> None:
    def call(x: Tensor, n: Tensor) -> Tensor:
        return x * (n[:, None] if n.dtype == dtype else 1)

    def samples(generator: Generator) -> list[tuple[Any, ...]]:
        return [(torch.randn(2, 4, generator=generator), torch.tensor([2, 3], dtype=dtype))]

    outcome = judged("integer_dtypes", call, samples)
    assert outcome.status == "failed"
    assert f"diagnosis: right only for {dtype}" in outcome.message


class LayerNorm(torch.autograd.Function):
    """Its gradient takes 1/σ rounded to bfloat16, as PyTorch's on a CPU does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return in_float32(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, grad = ctx.saved_tensors[0].float(), grad.float()
        exact = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        scale = exact.to(torch.bfloat16).float()
        y = (x - x.mean(-1, keepdim=True)) * scale
        centred = grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True)
        return (scale * centred).to(torch.bfloat16)


def in_float32(x: Tensor) -> Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    return F.layer_norm(wide, x.shape[-1:]).to(x.dtype)


@pytest.mark.parametrize(
    ("reference", "status"),
    [(in_float32, "failed"), (lambda x: F.layer_norm(x, x.shape[-1:]), "passed")],
    ids=["in_float32", "pytorchs"],
)
def test_what_a_row_shares_may_be_rounded_early_if_the_reference_does_so_too(
    reference: Any, status: str
) -> None:
    outcome = judged(
        "unbiased",
        LayerNorm.apply,
        lambda g: [(torch.randn(6, 256, generator=g),)],
        reference=reference,
        dtypes=[torch.bfloat16],
    )
    assert outcome.status == status
    assert status == "passed" or "rounded too early" in outcome.message
