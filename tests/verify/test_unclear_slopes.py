"""Where rounding is large: right calls pass without a reference, gross mistakes are found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from manual_bp.verify import Report, check_function

Call = Callable[..., Tensor]

ONLY = ("finite_differences", "argument_layouts", "linear_in_upstream", "create_graph")


def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Callable[[Generator], Any]:
    return lambda g: [(mean + scale * torch.randn(shape, generator=g),)]


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (16,))


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def variance(x: Tensor) -> Tensor:
    return x.var(-1)


def norm(x: Tensor) -> Tensor:
    result: Tensor = x.norm(dim=-1)
    return result


RIGHT: dict[str, tuple[Call, Callable[[Generator], Any], torch.dtype]] = {
    "batch_norm": (batch_norm, normal(9, 4), torch.float32),
    "var at 100": (variance, normal(6, 16, mean=100), torch.float32),
    "var at 100, bfloat16": (variance, normal(6, 16, mean=100), torch.bfloat16),
    "norm of 1e-3": (norm, normal(5, 7, scale=1e-3), torch.float32),
    "norm of 1e-3, float16": (norm, normal(5, 7, scale=1e-3), torch.float16),
    "norm of 1e-6, float64": (norm, normal(5, 7, scale=1e-6), torch.float64),
    "layer_norm at 1000": (layer_norm, normal(6, 16, mean=1000), torch.float32),
    "layer_norm of 1e-6, bfloat16": (layer_norm, normal(6, 16, scale=1e-6), torch.bfloat16),
    "bfloat16 inside": (lambda x: x.bfloat16().tanh().to(x.dtype), normal(5, 7), torch.float32),
    "float16 inside": (lambda x: x.half().tanh().to(x.dtype), normal(5, 7), torch.float32),
    "bfloat16 result": (lambda x: x.bfloat16().exp(), normal(5, 7), torch.float32),
}


def judge(fn: Any, name: str, **options: Any) -> Report:
    _, samples, dtype = RIGHT[name]
    return check_function(fn, samples, dtypes=[dtype], only=ONLY, **options)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_call_passes(name: str) -> None:
    for seed in range(3):
        judge(RIGHT[name][0], name, seed=seed).raise_if_failed()


def times(call: Call, factor: float) -> type[Function]:
    """A call whose gradient is so many times the right one."""

    class Times(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return call(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                found: Tensor = torch.autograd.grad(call(x), x, grad)[0]
            return found * factor

    return Times


# Near 100 the numbers of bfloat16 are multiples of 1/2, and only a wrong sign shows.
@pytest.mark.parametrize(
    ("name", "factor"),
    [*((name, -1.0) for name in RIGHT), *((name, 2.0) for name in RIGHT if "var" not in name)],
)
def test_a_gross_mistake_is_found(name: str, factor: float) -> None:
    report = judge(times(RIGHT[name][0], factor), name)
    assert "finite_differences" in [outcome.check for outcome in report.failures]


def test_what_rounding_hides_is_called_that() -> None:
    # In bfloat16 all numbers near 1000 are multiples of 4.
    report = check_function(
        layer_norm, normal(6, 16, mean=1000), dtypes=[torch.bfloat16], only=ONLY[:1]
    )
    assert not report.ok
    assert "or rounding hides its slope, and there is no reference" in report.causes[0].message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slopes_are_compared_as_exactly_as_the_reference_computes(dtype: torch.dtype) -> None:
    samples = normal(6, 16, mean=1000)
    options: Any = {"dtypes": [dtype], "only": ["finite_differences", "gradients_match_reference"]}
    check_function(layer_norm, samples, layer_norm, **options).raise_if_failed()
    assert len(check_function(times(layer_norm, 1.5), samples, layer_norm, **options).failures) == 2


@pytest.mark.parametrize("cast", [torch.Tensor.bfloat16, torch.Tensor.half])
@pytest.mark.parametrize("reference", [torch.tanh, None])
def test_rounding_to_half_precision_in_float64_is_called_that(cast: Call, reference: Any) -> None:
    report = check_function(
        lambda x: cast(x).tanh().to(x.dtype), normal(5, 7), reference, only=["full_precision"]
    )
    assert "rounded to half precision on the way" in report.verdict
    exact = check_function(torch.tanh, normal(5, 7), reference, only=["full_precision"])
    exact.raise_if_failed()


@pytest.mark.parametrize(
    ("call", "samples"),
    [
        (layer_norm, normal(6, 16, scale=1e-6)),
        (lambda x: x.cumprod(-1), normal(5, 7)),
        (norm, normal(5, 7, scale=1e-3)),
    ],
)
def test_nothing_is_asked_where_the_reference_overflows_too(call: Call, samples: Any) -> None:
    only = ["double_backward", "third_order", "forward_ad", "forward_over_reverse"]
    check_function(call, samples, call, dtypes=[torch.float16], only=only).raise_if_failed()


def test_an_intermediate_result_that_is_rounded_is_called_that() -> None:
    class RmsNorm(Function):
        """As Llama's: rounded before the weight is applied, in forward and in backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            r = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            ctx.save_for_backward(x, w, r)
            return w * (x.float() * r).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w, r = ctx.saved_tensors
            h, m = x.float() * r, (grad * w).float()
            grad_x = r * (m - h * (m * h).mean(-1, keepdim=True))
            return grad_x.to(x.dtype), (grad * h.to(x.dtype)).sum(0)

    def rounded(x: Tensor, w: Tensor) -> Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        return w * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)

    def samples(g: Generator) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(9, 64, generator=g), torch.randn(64, generator=g))]

    options: Any = {"dtypes": [torch.bfloat16], "only": ["gradients_match_reference"]}
    report = check_function(RmsNorm, samples, lambda x, w: F.rms_norm(x, (64,), w, 1e-6), **options)
    assert "no more than one rounding to torch.bfloat16: an intermediate result" in report.verdict
    check_function(RmsNorm, samples, rounded, **options).raise_if_failed()
