from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify import Report, check_function, check_module, function_case
from manual_bp.verify._context import CheckContext

LOW = [torch.bfloat16, torch.float32]


class HalfPrecisionScale(Function):
    """s x, which refuses float64 as a kernel does, and computes in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise TypeError("x must be bfloat16 or float32; got float64")
        ctx.save_for_backward(x, s)
        return (x.float() * s.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return grad * s, (grad.float() * x.float()).sum(0).to(s.dtype)


def operands(g: Generator) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(3, generator=g))]


def scaled(x: Tensor, s: Tensor) -> Tensor:
    return x * s


def judge(
    fn: Any, *only: str, dtypes: Any = LOW, reference: Any = scaled, **options: Any
) -> Report:
    return check_function(
        fn,
        operands,
        reference,
        in_dims=(0, None),
        dtypes=dtypes,
        slow=False,
        only=only or None,
        **options,
    )


def messages(report: Report) -> dict[str, str]:
    return {outcome.check: outcome.message for outcome in report.failures}


@pytest.mark.parametrize("reference", [scaled, None])
def test_a_kernel_that_refuses_float64_is_judged_in_its_own_dtypes(reference: Any) -> None:
    report = judge(HalfPrecisionScale, reference=reference)
    assert report.ok, report
    assert report.dtypes == ("float32", "bfloat16")
    assert "on cpu in float32, bfloat16" in str(report)
    assert not judge(HalfPrecisionScale, dtypes=[torch.float64], reference=reference).ok


def test_the_reference_runs_in_float64_from_the_rounded_arguments() -> None:
    seen: set[torch.dtype] = set()

    def watched(x: Tensor, s: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            assert torch.equal(x, x.bfloat16().double())
        seen.add(x.dtype)
        return x * s

    report = judge(
        HalfPrecisionScale,
        "gradients_match_reference",
        dtypes=[torch.bfloat16],
        reference=watched,
    )
    assert report.ok
    assert seen == {torch.float64, torch.bfloat16}


@pytest.mark.parametrize(("dtype", "percent"), [(torch.bfloat16, 1.0), (torch.float32, 0.1)])
@pytest.mark.parametrize("argument", [0, 1])
def test_a_small_error_of_scale_in_a_gradient_is_found(
    dtype: torch.dtype, percent: float, argument: int
) -> None:
    class Wrong(HalfPrecisionScale):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            found = list(HalfPrecisionScale.backward(ctx, grad))
            found[argument] = found[argument] * (1 + percent / 100)
            return found[0], found[1]

    found = messages(judge(Wrong, dtypes=[dtype]))
    check = "unbiased" if dtype is torch.bfloat16 else "gradients_match_reference"
    assert f"gradient of {'xs'[argument]}" in found[check]
    assert "times the right one, everywhere" in found[check]


def many_rows(g: Generator) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(200, 10, generator=g), torch.randn(10, generator=g))]


def centred(x: Tensor, s: Tensor) -> Tensor:
    return x - x.mean(0) + s


class Centred(HalfPrecisionScale):
    """x less its mean over rows, plus s: what is left of two terms that cancel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return centred(x.float(), s.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        wide = grad.float()
        return (wide - wide.mean(0)).to(grad.dtype), wide.sum(0).to(grad.dtype)


@pytest.mark.parametrize(
    ("right", "reference", "error"),
    [(HalfPrecisionScale, scaled, (1.06, 0.0)), (Centred, centred, (1.0, 0.3))],
    ids=["relative", "absolute"],
)
def test_one_wrong_element_of_many_is_found(right: Any, reference: Any, error: Any) -> None:
    factor, added = error

    class Wrong(right):  # type: ignore[misc]
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_x, grad_s = right.backward(ctx, grad)
            grad_x[3, 4] = factor * grad_x[3, 4] + added
            return grad_x, grad_s

    options: Any = {"dtypes": [torch.bfloat16], "only": ["gradients_match_reference"]}
    assert check_function(right, many_rows, reference, **options).ok
    (outcome,) = check_function(Wrong, many_rows, reference, **options).failures
    assert "gradient of x, at index (3, 4)" in outcome.message
    assert "1 of 2000 elements differ" in outcome.message


def test_errors_too_small_for_one_element_are_found_in_all_of_them() -> None:
    class Wrong(HalfPrecisionScale):
        """Every second element is 2 % too large, the others as much too small."""

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_x, grad_s = HalfPrecisionScale.backward(ctx, grad)
            signs = torch.tensor([1.0, -1.0]).repeat(grad_x.numel() // 2).view(grad_x.shape)
            return (grad_x * (1 + 0.02 * signs)).to(grad_x.dtype), grad_s

    options: Any = {"dtypes": [torch.bfloat16], "only": ["gradients_match_reference"]}
    (outcome,) = check_function(Wrong, many_rows, scaled, **options).failures
    assert "gradient of x: expected a difference whose norm is at most" in outcome.message
    assert "larger rounding errors than the reference's" in outcome.message


def test_a_message_counts_units_in_the_last_place() -> None:
    class Wrong(HalfPrecisionScale):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_x, grad_s = HalfPrecisionScale.backward(ctx, grad)
            return 1.1 * grad_x, grad_s

    found = messages(judge(Wrong, "gradients_match_reference", dtypes=[torch.bfloat16]))
    assert " ulps of torch.bfloat16 where " in found["gradients_match_reference"]


def test_a_tuple_gives_each_argument_a_dtype() -> None:
    case = function_case(
        HalfPrecisionScale,
        operands,
        scaled,
        dtypes=[(torch.bfloat16, torch.float32), (torch.float16, None)],
    )
    samples = CheckContext(case, "vmap").samples
    dtypes = [tuple(t.dtype for t in sample) for sample in samples]
    assert set(dtypes) == {
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    }


def test_a_tolerance_excuses_what_a_solver_leaves() -> None:
    class Approximate(HalfPrecisionScale):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_x, grad_s = HalfPrecisionScale.backward(ctx, grad)
            return grad_x * 1.0005, grad_s

    only = ("gradients_match_reference", "finite_differences", "sizes")
    assert len(judge(Approximate, *only, dtypes=[torch.float32]).failures) == 3
    assert judge(Approximate, *only, dtypes=[torch.float32], rtol=1e-3).ok


@pytest.mark.parametrize("reference", [torch.square, None])
def test_a_tolerance_holds_for_all_orders(reference: Any) -> None:
    def approximate(first: float, second: float) -> type[Function]:
        class Slope(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
                ctx.save_for_backward(x, grad)
                return 2 * x * grad * (1 + first)

            @staticmethod
            def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
                x, grad = ctx.saved_tensors
                return 2 * grad * upstream * (1 + second), 2 * x * upstream * (1 + second)

        class SquareOf(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                result: Tensor = Slope.apply(*ctx.saved_tensors, grad)
                return result

        return SquareOf

    def failures(first: float, second: float, rtol: float) -> list[str]:
        samples = [(torch.randn(5, 3, generator=Generator().manual_seed(0)),)]
        report = check_function(
            approximate(first, second), samples, reference, rtol=rtol, slow=False
        )
        return [outcome.check for outcome in report.failures]

    assert failures(1e-4, 1e-4, rtol=1e-3) == []
    assert {"at_zero", "finite_differences"} <= set(failures(1e-4, 1e-4, rtol=0.0))
    assert "double_backward" in failures(0.0, 1e-2, rtol=1e-3)


def test_a_tolerance_holds_for_the_average_in_half_precision() -> None:
    class Approximate(HalfPrecisionScale):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_x, grad_s = HalfPrecisionScale.backward(ctx, grad)
            return grad_x, (grad_s.float() * 1.03).to(grad_s.dtype)

    options: Any = {"dtypes": [torch.bfloat16]}
    assert not judge(Approximate, "unbiased", **options).ok
    assert judge(Approximate, "unbiased", **options, rtol=0.05).ok


def test_the_spread_between_calls_is_told_apart_from_an_error() -> None:
    calls = 0

    class Atomic(HalfPrecisionScale):
        """Its sum rounds differently in every second call."""

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            grad_x, grad_s = HalfPrecisionScale.backward(ctx, grad)
            return grad_x, torch.nextafter(grad_s, grad_s + calls % 2)

    report = judge(Atomic, dtypes=[torch.float32])
    assert report.ok, report
    (outcome,) = [o for o in report.outcomes if o.check == "deterministic"]
    assert "two calls differ by up to" in outcome.message


def test_checks_of_lower_precision_do_not_apply_to_a_case_that_names_its_dtypes() -> None:
    report = judge(HalfPrecisionScale, "float16", "float32")
    assert {outcome.status for outcome in report.outcomes} == {"not applicable"}


def test_a_module_is_judged_in_bfloat16_with_its_parameters() -> None:
    def rows(g: Generator) -> list[tuple[Tensor]]:
        return [(torch.randn(5, 3, generator=g),)]

    def linear() -> nn.Module:
        return nn.Linear(3, 4)

    report = check_module(linear, rows, linear, in_dims=(0,), dtypes=LOW, slow=False)
    assert report.ok, report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": []}, "dtypes must list float64, float32, bfloat16 or float16"),
        ({"dtypes": torch.float32}, "dtypes must list float64, float32, bfloat16 or float16"),
        ({"dtypes": [torch.int64]}, "dtypes must list float64, float32, bfloat16 or float16"),
        ({"dtypes": [None]}, "dtypes must list float64, float32, bfloat16 or float16"),
        ({"dtypes": [(torch.float32,)]}, "dtypes must be a tuple with an entry for each argument"),
        ({"dtypes": [torch.float8_e4m3fn]}, r"float16, or tuples .* got \[torch.float8_e4m3fn\]"),
        ({"rtol": -1e-3}, "rtol must be a number from 0 to 0.1; got -0.001"),
        ({"rtol": 1e9}, "rtol must be a number from 0 to 0.1; got 1000000000.0"),
        ({"atol": float("nan")}, "atol must be a number that is not negative; got nan"),
        ({"varying": [(1,)]}, "varying must be a tuple with an entry for each argument"),
        ({"varying": [(1, "rows")]}, "varying must have a dimension or None for each argument"),
        ({"in_dims": (0,)}, "in_dims must be a tuple with an entry for each argument"),
    ],
)
def test_unusable_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function_case(HalfPrecisionScale, operands, scaled, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_call_that_rounds_as_its_reference_does_is_right(dtype: torch.dtype) -> None:
    """Its derivatives by the upstream gradient have the lower dtype too."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype) ** 2

    def samples(g: Generator) -> list[tuple[Tensor]]:
        return [(torch.randn(shape, generator=g),) for shape in ((5, 3), ())]

    for seed in range(3):
        check_function(rounded, samples, rounded, seed=seed, slow=False).raise_if_failed()


def test_a_missing_second_derivative_of_a_call_that_rounds_is_found() -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16() ** 2

    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return rounded(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            x: Tensor = ctx.saved_tensors[0]
            return 2 * x.detach().bfloat16() * grad

    report = check_function(Detached, [(torch.randn(5, 3),)], rounded, only=["double_backward"])
    assert not report.ok
