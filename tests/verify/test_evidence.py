"""A verdict needs evidence: samples at which no mistake could show judge nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp.verify import Report, check_function, check_module
from manual_bp.verify.checks import CHECKS

FULL = torch.randn(5, 3, dtype=torch.float64)
NAMES = [check.name for check in CHECKS if not check.for_modules]


class Seventeen(Function):
    """x ⊙ x, with a gradient 17 times too large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 34 * x * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 34 * x * tangent


def statuses(report: Report) -> dict[str, str]:
    return {outcome.check: outcome.status for outcome in report.outcomes}


def message(report: Report, check: str) -> str:
    (found,) = [outcome.message for outcome in report.outcomes if outcome.check == check]
    return found


BLIND = {
    "no rows": ([FULL[:0]], "the gradient of x has no elements at every sample"),
    "no columns": ([FULL[:, :0]], "the gradient of x has no elements at every sample"),
    "zeros": ([FULL * 0], "the gradient of x is zero at every sample"),
    "nan": ([FULL * torch.nan], "the gradient of x is not finite at every sample"),
    "several reasons": (
        [FULL[:0], FULL * 0],
        "the gradient of x has no elements or is zero at every sample",
    ),
}


@pytest.mark.parametrize(("samples", "why"), BLIND.values(), ids=BLIND)
def test_gradients_that_cannot_show_a_mistake_are_not_judged(
    samples: list[Tensor], why: str
) -> None:
    report = check_function(Seventeen, [(x,) for x in samples], torch.square, slow=False)
    assert not report.ok
    assert "passed" not in statuses(report).values(), report
    assert message(report, "informative_samples").startswith(why)
    assert message(report, "gradients_match_reference").startswith(f"inconclusive: {why}")


@pytest.mark.parametrize("samples", [[FULL[:1, :1]], [FULL[:1, 0], FULL[1:2, 1]]])
def test_one_element_cannot_tell_a_sum_from_a_mean(samples: list[Tensor]) -> None:
    report = check_function(torch.exp, [(x,) for x in samples], torch.exp, slow=False)
    assert not report.ok
    assert "passed" not in statuses(report).values(), report
    assert message(report, "informative_samples").startswith("every gradient has one element only")


@pytest.mark.parametrize("check", [name for name in NAMES if name != "device_parity"])
def test_an_empty_sample_passes_no_check(check: str) -> None:
    empty = [(FULL[:0],)]
    report = check_function(F.relu, empty, F.relu, in_dims=(0,), only=[check])
    assert not report.ok
    assert "refuses" not in report.outcomes[0].message


def test_a_declared_capability_without_evidence_fails() -> None:
    report = check_function(
        torch.tanh, [(FULL[:0],)], torch.tanh, supports=["float32"], only=["float32"]
    )
    assert statuses(report) == {"float32": "failed"}
    assert message(report, "float32").startswith("declared, but it cannot be judged: inconclusive")


@pytest.mark.parametrize("hidden", ["x", "w"])
def test_every_argument_needs_a_nonzero_gradient(hidden: str) -> None:
    """Inputs of zero hide ∂C/∂w, weights of zero hide ∂C/∂x; ∂C/∂b shows in both cases."""
    x, w = FULL, torch.randn(4, 3)
    if hidden == "w":
        x = x * 0
    else:
        w = w * 0

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b)

    report = check_function(linear, [(x, w, torch.randn(4))], linear, slow=False)
    assert not report.ok
    assert message(report, "informative_samples").startswith(
        f"the gradient of {hidden} is zero at every sample"
    )


def test_no_gradient_in_case_and_reference_is_not_judged() -> None:
    for call in (torch.Tensor.detach, lambda x: x > 0):
        report = check_function(call, [(FULL,)], call, slow=False)
        assert not report.ok
        assert "no output of the reference depends on an argument" in message(
            report, "informative_samples"
        )


def test_an_absolute_tolerance_must_leave_something_to_judge() -> None:
    samples = [(FULL, 1e6 * FULL)]
    for atol, blind in ((1e-3, ""), (1e3, "argument 1"), (1e9, "argument 0")):
        report = check_function(torch.mul, samples, torch.mul, atol=atol, slow=False)
        assert report.ok == (not blind)
        if blind:
            assert f"the gradient of {blind} is within atol = {atol:g} of zero" in report.verdict


def test_only_kinks_without_a_reference_is_a_failure() -> None:
    def wrong(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.3)

    at_kinks = [(torch.zeros(5, 3),)]
    report = check_function(wrong, at_kinks, only=["finite_differences"])
    assert not report.ok
    assert "every direction starts at a kink" in message(report, "finite_differences")


def test_a_module_without_rows_is_not_judged() -> None:
    report = check_module(
        lambda: nn.Linear(3, 4), [(FULL[:0],)], lambda: nn.Linear(3, 4), slow=False
    )
    assert not report.ok
    assert "passed" not in statuses(report).values()


RIGHT: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "a scalar": (torch.exp, [(torch.tensor(0.3),)]),
    "two scalars": (torch.mul, [(torch.tensor(0.3), torch.tensor(2.0))]),
    "one parameter of one element": (torch.mul, [(FULL, torch.ones(1))]),
    "one row": (torch.exp, [(FULL[:1],)]),
    "no gradient for the mask": (lambda x, mask: x * (mask > 0), [(FULL, FULL.flip(0))]),
    "an empty one first": (torch.exp, [(FULL[:0],), (FULL,)]),
    "an empty one last": (torch.exp, [(FULL,), (FULL[:0],)]),
    "each argument at another sample": (torch.mul, [(FULL, FULL * 0), (FULL * 0, FULL)]),
}


@pytest.mark.parametrize(("call", "samples"), RIGHT.values(), ids=RIGHT)
def test_one_informative_sample_is_enough(
    call: Callable[..., Any], samples: list[tuple[Any, ...]]
) -> None:
    dims = tuple(0 if t.ndim > 1 else None for t in samples[0])
    in_dims = dims if 0 in dims else None
    report = check_function(call, samples, call, in_dims=in_dims, slow=False)
    assert report.ok, report
    assert statuses(report)["gradients_match_reference"] == "passed"


@pytest.mark.parametrize("check", ["compile", "compile_dynamic", "export"])
def test_the_compiler_checks_take_the_most_informative_sample(check: str) -> None:
    def wrong_when_compiled(x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_compiling() else x * x

    samples = [(FULL[:0],), (FULL,)]
    report = check_function(wrong_when_compiled, samples, in_dims=(0,), only=[check])
    assert statuses(report) == {check: "failed"}
    assert check_function(torch.tanh, samples, in_dims=(0,), only=[check]).ok


def test_only_samples_with_two_arguments_of_one_shape_are_evidence_for_tied_inputs() -> None:
    def once_when_tied(x: Tensor, y: Tensor) -> Tensor:
        return x * (y.detach() if x is y else y)

    samples = [(FULL[:0], FULL[:0]), (FULL, FULL[0])]
    report = check_function(once_when_tied, samples, torch.mul, only=["tied_inputs"])
    assert not report.ok
    assert "inconclusive" in message(report, "tied_inputs")


def test_a_gradient_that_is_zero_everywhere_can_be_declared() -> None:
    known = {"informative_samples": "the gradient is zero everywhere"}
    report = check_function(torch.sign, [(FULL,)], torch.sign, expected_failures=known, slow=False)
    assert report.ok
    assert statuses(report)["gradients_match_reference"] == "passed"
    assert not check_function(torch.sign, [(FULL,)], torch.sign, slow=False).ok


SAMPLES: dict[str, Tensor] = {
    "transposed": torch.randn(4, 5, dtype=torch.float64).mT,
    "sliced": torch.randn(5, 8, dtype=torch.float64)[:, ::2],
    "shifted": torch.randn(6, 4, dtype=torch.float64)[1:],
    "expanded": torch.randn(1, 4, dtype=torch.float64).expand(5, 4),
}


@pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)
def test_samples_can_have_any_strides(x: Tensor) -> None:
    w = torch.randn(3, 4, dtype=torch.float64)
    assert check_function(F.linear, [(x, w)], F.linear, in_dims=(0, None), slow=False).ok
