"""Calls that draw random numbers are judged with the same seeds before each."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function

from manual_bp.verify import check_function, check_module
from tests.verify.test_run import SAMPLES, message, status

NOTE = "draws random numbers: the same seeds are set before each call"


class Dropout(Function):
    """x ⊙ mask / (1 − p)"""

    forgets_p = False
    draws_again = False

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = F.dropout(torch.ones_like(x), p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return x * mask

    @classmethod
    def slope(cls, ctx: Any) -> Any:
        (mask,) = ctx.saved_tensors
        if cls.draws_again:
            mask = F.dropout(torch.ones_like(mask), ctx.p)
        return mask * (1 - ctx.p) if cls.forgets_p else mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * Dropout.slope(ctx), None


class ForgetsP(Dropout):
    forgets_p = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ForgetsP.slope(ctx), None


class DrawsAgain(Dropout):
    draws_again = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * DrawsAgain.slope(ctx), None


DROPOUT: Any = ([(SAMPLES[0][0], 0.4)], lambda x, p: F.dropout(x, p))


def test_dropout_is_judged_whole() -> None:
    report = check_function(Dropout, *DROPOUT, slow=False)
    report.raise_if_failed()
    assert report.notes == (NOTE,)
    assert f"note: {NOTE}" in str(report)
    assert report.to_dict()["notes"] == [NOTE]
    assert status(report, "double_backward") == status(report, "at_zero") == "passed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_is_right_without_a_reference(dtype: torch.dtype) -> None:
    for fn in (Dropout, F.dropout):
        report = check_function(fn, DROPOUT[0], dtypes=[dtype], in_dims=(0, None), slow=False)
        report.raise_if_failed()


@pytest.mark.parametrize("wrong", [ForgetsP, DrawsAgain])
@pytest.mark.parametrize("is_given", [True, False])
def test_a_wrong_dropout_is_found(wrong: Any, is_given: bool) -> None:
    samples, reference = DROPOUT
    report = check_function(wrong, samples, reference if is_given else None, slow=False)
    assert status(report, "deterministic") == "passed"
    assert status(report, "finite_differences") == "failed"
    assert status(report, "gradients_match_reference") == (
        "failed" if is_given else "not applicable"
    )


@pytest.mark.parametrize(
    "module",
    [lambda: nn.Dropout(0.3), lambda: nn.RReLU(), lambda: nn.AlphaDropout(0.3)],
    ids=["Dropout", "RReLU", "AlphaDropout"],
)
def test_no_false_alarm_on_random_modules(module: Any) -> None:
    report = check_module(module, SAMPLES, module, slow=False)
    report.raise_if_failed()
    assert report.notes == (NOTE,)


def test_a_compiled_and_an_exported_call_draw_the_same_numbers() -> None:
    only = ["compile", "export"]
    report = check_function(F.dropout, *DROPOUT, only=only, supports=only)
    report.raise_if_failed()


@pytest.mark.parametrize(
    "number",
    [random.random, lambda: float(np.random.rand())],  # noqa: NPY002
    ids=["random", "numpy"],
)
def test_numbers_of_python_and_numpy_are_seeded_and_go_on_afterwards(number: Any) -> None:
    before = random.getstate()
    np_before = np.random.get_state()  # noqa: NPY002

    def scaled(x: Tensor) -> Any:
        return x * number()

    report = check_function(scaled, SAMPLES, scaled, slow=False)
    report.raise_if_failed()
    assert report.notes == (NOTE,)
    assert random.getstate() == before
    now = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(one, other) for one, other in zip(now, np_before, strict=True))


def test_a_call_that_remembers_earlier_ones_is_not_random() -> None:
    generator = Generator()
    report = check_function(lambda x: x * torch.rand(3, generator=generator), SAMPLES, slow=False)
    assert report.notes == ()
    assert [outcome.check for outcome in report.failures] == ["deterministic"]
    assert "random, or it remembers" in message(report, "deterministic")


def test_no_seed_is_set_for_a_call_that_draws_nothing() -> None:
    states = []

    def square(x: Tensor) -> Tensor:
        states.append(torch.random.get_rng_state())
        torch.rand(1)
        return x * x

    assert check_function(square, SAMPLES, only=["deterministic"]).notes == ()
    of_the_check = [bytes(state.numpy()) for state in states[-3:]]
    assert len(set(of_the_check)) == 3


def test_a_result_in_a_class_that_pytorch_does_not_know_is_refused() -> None:
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    with pytest.raises(TypeError, match=r"result must hold its tensors in .* got some in a Box"):
        check_function(lambda x: (x, Box(x * x)), SAMPLES)
