"""Operators made with torch.library: judged like functions, and by the tests of opcheck."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manual_bp.verify import check_function, function_case
from tests.verify.test_run import SAMPLES, message, status


def made(name: str, factor: float = 2.0, *, has_fake: bool = True) -> Any:
    """An operator s x², with its gradient if the factor is 2."""

    def forward(x: Tensor, s: float) -> Tensor:
        return s * x * x

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.save_for_backward(inputs[0])
        ctx.s = inputs[1]

    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return factor * ctx.s * x * grad, None

    operator = torch.library.custom_op(f"manual_bp_tests::{name}", forward, mutates_args=())
    operator.register_autograd(backward, setup_context=setup)
    if has_fake:
        operator.register_fake(lambda x, s: torch.empty_like(x))  # noqa: ARG005
    return operator


def reference(x: Tensor, s: float) -> Tensor:
    return s * x * x


GIVEN: Any = ([(SAMPLES[0][0], 3.0)], reference)
RIGHT = made("right")
OPCHECKS = ["opcheck_schema", "opcheck_autograd_registration", "opcheck_faketensor"]


def test_an_operator_is_judged_like_a_function_and_by_opcheck() -> None:
    report = check_function(RIGHT, *GIVEN, slow=False, in_dims=(0, None))
    report.raise_if_failed()
    assert report.case == "manual_bp_tests::right"
    for check in (*OPCHECKS, "raw_backward", "saves_nothing_on_ctx", "finite_differences"):
        assert status(report, check) == "passed", check


def test_a_wrong_gradient_of_an_operator_is_found() -> None:
    report = check_function(made("wrong", 2.002), *GIVEN, only=["gradients_match_reference"])
    assert message(report, "gradients_match_reference").startswith("gradient of x, at index")


def test_an_operator_may_be_given_as_pytorch_finds_it() -> None:
    packet = torch.ops.manual_bp_tests.right
    for operator in (RIGHT, packet, packet.default):
        case = function_case(operator, GIVEN[0])
        assert case.operator is packet.default
        assert case.labels == ("x", "s")


@pytest.mark.parametrize("check", ["forward_ad", "forward_over_reverse"])
def test_a_dropped_tangent_is_the_fault_of_pytorch(check: str) -> None:
    for call in (RIGHT, lambda x, s: RIGHT(x, s) + x):
        report = check_function(call, *GIVEN, only=[check])
        assert "a fault of PyTorch" in message(report, check)


def test_an_operator_without_a_fake_refuses_to_be_traced() -> None:
    report = check_function(made("nofake", has_fake=False), *GIVEN, only=["opcheck_faketensor"])
    assert "it refuses: RuntimeError: There was no fake impl" in message(
        report, "opcheck_faketensor"
    )


def test_opcheck_is_only_for_operators() -> None:
    report = check_function(reference, *GIVEN, slow=False)
    assert not {outcome.check for outcome in report.outcomes} & set(OPCHECKS)
