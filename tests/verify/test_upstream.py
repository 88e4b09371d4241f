"""Upstream gradients that are undefined."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify import check_function


class TwoMultiples(Function):
    """2 x and 3 x, of which one gradient or both may be undefined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None or second is None:
            return 3 * second if second is not None else 2 * first if first is not None else None
        return 2 * first + 3 * second


class ForgetsNone(TwoMultiples):
    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor:
        grads: Any = first, second
        return 2 * grads[0] + 3 * grads[1]  # type: ignore[no-any-return]


def hooked(function: type[Function]) -> Any:
    def call(x: Tensor) -> Any:
        first, second = function.apply(x)
        if first.requires_grad:
            first.register_hook(lambda grad: grad * 1.0)
        return first, second

    return call


CHECKS = ["upstream_undefined", "outputs_alone"]
SAMPLES = [(torch.randn(5, 3),)]


def test_a_hook_that_meets_an_undefined_gradient_is_not_the_fault_of_the_call() -> None:
    report = check_function(hooked(TwoMultiples), SAMPLES, lambda x: (2 * x, 3 * x), slow=False)
    report.raise_if_failed()
    messages = {outcome.check: outcome.message for outcome in report.outcomes}
    for check in CHECKS:
        assert messages[check].startswith("PyTorch calls a hook with None")


@pytest.mark.parametrize("call", [ForgetsNone.apply, hooked(ForgetsNone)])
def test_a_backward_that_meets_an_undefined_gradient_is_at_fault(call: Any) -> None:
    report = check_function(call, SAMPLES, lambda x: (2 * x, 3 * x), only=CHECKS)
    assert not report.ok
    assert "raised TypeError: unsupported operand" in report.verdict
    assert check_function(TwoMultiples, SAMPLES, only=CHECKS).ok
