"""Gradients that are, on purpose, not the derivative."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp.verify import check_function, check_module, function_case, module_case
from manual_bp.verify._run import run
from tests.verify.test_run import SAMPLES, message, status

NOTE = "the right gradient is that of gradient_of, not the derivative"


class Sign(Function):
    """sign(x), whose gradient passes where |x| ≤ 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad.where(x.abs() <= 1, 0)


class SignWithoutLimit(Sign):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


class Reversal(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -ctx.strength * grad, None


class Spike(Function):
    """1 where x > 0, with the gradient of a sigmoid of 4 x."""

    is_written = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(4 * x)
        return 4 * grad * s * (1 - s)


class SpikeWithoutCurvature(Spike):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        s = torch.sigmoid(4 * ctx.saved_tensors[0]).detach()
        return 4 * grad * s * (1 - s)


class ShiftedSpike(Spike):
    """Its value is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0.1).to(x.dtype)


def heaviside(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


SPIKE: Any = {"gradient_of": lambda x: torch.sigmoid(4 * x), "slow": False}


@pytest.mark.parametrize(
    ("fn", "samples", "reference", "gradient_of"),
    [
        (Sign, SAMPLES, torch.sign, F.hardtanh),
        (Spike, SAMPLES, heaviside, SPIKE["gradient_of"]),
        (Reversal, [(SAMPLES[0][0], 0.5)], lambda x, _: x.clone(), lambda x, s: -s * x),
    ],
    ids=["straight-through", "surrogate", "reversal"],
)
def test_an_intended_gradient_is_right(
    fn: Any, samples: Any, reference: Any, gradient_of: Any
) -> None:
    report = check_function(fn, samples, reference, gradient_of=gradient_of, slow=False)
    report.raise_if_failed()
    assert report.notes == (NOTE,)
    for check in ("finite_differences", "gradients_match_reference", "double_backward"):
        assert status(report, check) == "passed", check
    assert not check_function(fn, samples, reference, slow=False).ok


def test_another_gradient_than_the_intended_one_is_found() -> None:
    report = check_function(
        SignWithoutLimit, [(2 * SAMPLES[0][0],)], torch.sign, gradient_of=F.hardtanh, slow=False
    )
    assert {"finite_differences", "gradients_match_reference"} <= {
        outcome.check for outcome in report.failures
    }


class SignUpTo(Function):
    """A binary activation whose gradient passes for |x| ≤ 1, and that at ±1 is chosen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at_one: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.at_one = at_one
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ((x.abs() < 1) + ctx.at_one * (x.abs() == 1)), None


def test_where_the_intended_gradient_jumps_any_in_between_is_right() -> None:
    def value(x: Tensor, at_one: float) -> Tensor:  # noqa: ARG001
        return x.sign()

    def detached(x: Tensor, at_one: float) -> Tensor:  # noqa: ARG001
        return F.hardtanh(x) - F.hardtanh(x).detach()

    for gradient_of in (lambda x, _: F.hardtanh(x), detached):
        given: Any = {"gradient_of": gradient_of, "only": ["small_values"]}
        for at_one in (0.0, 0.5, 1.0):
            check_function(SignUpTo, [(SAMPLES[0][0], at_one)], value, **given).raise_if_failed()
        report = check_function(SignUpTo, [(SAMPLES[0][0], 1.5)], value, **given)
        assert "at 1: expected one between" in message(report, "small_values")


def test_the_reference_is_not_blamed_for_an_intended_gradient() -> None:
    zero = check_function(
        lambda x: x.sign() + 0 * x, SAMPLES, torch.sign, gradient_of=F.hardtanh, slow=False
    )
    assert "reference's gradient is wrong" not in message(zero, "gradients_match_reference")


def test_everything_else_is_still_judged() -> None:
    report = check_function(SpikeWithoutCurvature, SAMPLES, heaviside, **SPIKE)
    assert next(outcome.check for outcome in report.failures) == "double_backward", report
    report = check_function(ShiftedSpike, [(torch.linspace(-1, 1, 31),)], heaviside, **SPIKE)
    assert "forward_matches_reference" in {outcome.check for outcome in report.failures}
    assert status(report, "gradients_match_reference") == "passed"


def test_a_random_value_and_its_intended_gradient_have_the_same_seed() -> None:
    def hard(x: Tensor) -> Tensor:
        return F.gumbel_softmax(x, hard=True)

    report = check_function(hard, SAMPLES, hard, gradient_of=F.gumbel_softmax, slow=False)
    report.raise_if_failed()
    assert len(report.notes) == 2


class Binary(nn.Linear):
    """A linear layer with the signs of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.sign(), self.bias)

    def sign(self) -> Any:
        return Sign.apply(self.weight)


class Exact(Binary):
    def sign(self) -> Tensor:
        return self.weight.sign()


class Straight(Binary):
    def sign(self) -> Tensor:
        return F.hardtanh(self.weight)


class Ideal(Binary):
    """The signs in the value and in the gradient by x, and |w| ≤ 1 in that by w."""

    def sign(self) -> Tensor:
        w = F.hardtanh(self.weight)
        return self.weight.sign().detach() + w - w.detach()


def test_a_module_may_have_an_intended_gradient() -> None:
    def made(kind: Any) -> Any:
        return lambda: kind(3, 4)

    given: Any = {"slow": False, "gradient_of": made(Ideal)}
    check_module(made(Binary), SAMPLES, made(Exact), **given).raise_if_failed()
    report = check_module(made(Binary), SAMPLES, made(Exact), slow=False)
    assert "gradient of weight" in message(report, "gradients_match_reference")
    given["gradient_of"] = made(Straight)  # whose gradient by the input takes w, not its sign
    report = check_module(made(Binary), SAMPLES, made(Exact), **given)
    assert "gradient of input 0" in message(report, "gradients_match_reference")


def test_unusable_input_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_of must come with a reference"):
        function_case(Sign, SAMPLES, gradient_of=F.hardtanh)
    with pytest.raises(TypeError, match="gradient_of must be callable; got int"):
        function_case(Sign, SAMPLES, torch.sign, gradient_of=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient_of must have the parameters of the module"):
        module_case(
            lambda: nn.Linear(3, 4),
            SAMPLES,
            lambda: nn.Linear(3, 4),
            gradient_of=lambda: nn.Linear(3, 4, bias=False),
        )


@pytest.mark.parametrize(
    ("gradient_of", "message"),
    [
        (torch.sum, r"shapes and dtypes of the reference's, .*; got \[\(\(\), torch.float64\)\]"),
        (lambda x: x.float(), r"shapes and dtypes of the reference's, .* torch.float32\)\]"),
        (lambda _: None, r"shapes and dtypes of the reference's, .*; got \[\]"),
        (lambda x: x @ x, "gradient_of must accept the samples; it raised RuntimeError"),
    ],
)
def test_a_function_that_cannot_have_the_intended_gradient_is_refused(
    gradient_of: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_function(Sign, SAMPLES, torch.sign, gradient_of=gradient_of, slow=False)


@pytest.mark.parametrize("reference", [torch.sign, None])
def test_a_gradient_where_the_value_does_not_change_leads_to_gradient_of(reference: Any) -> None:
    report = check_function(Sign, SAMPLES, reference, slow=False)
    assert "give a function that has the intended gradient as gradient_of" in report.verdict


def test_a_reference_with_the_same_gradient_that_is_no_slope_leads_to_gradient_of() -> None:
    def embedding() -> nn.Module:
        return nn.Embedding(6, 3, padding_idx=0)

    samples = [(torch.tensor([0, 2, 2, 5]),)]
    report = check_module(embedding, samples, embedding, slow=False)
    assert [outcome.check for outcome in report.causes] == ["finite_differences"]
    assert "the reference has the same gradient, which is not the slope" in report.verdict
    case = module_case(embedding, samples, embedding, gradient_of=embedding)
    assert run(case, slow=False).ok
