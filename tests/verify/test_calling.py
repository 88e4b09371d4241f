"""Calls that change their arguments in place, or give gradients by `.backward()` only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from manual_bp.verify import check_function, check_module
from manual_bp.verify._calling import gradients_by_backward

X, Y = torch.randn(5, 3), torch.randn(5, 3)


def in_place(slope: Callable[[Tensor], Tensor]) -> type[Function]:
    class AddSquare(Function):
        """x ← x + y²"""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.mark_dirty(x)
            ctx.save_for_backward(y)
            return x.add_(y * y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            (y,) = ctx.saved_tensors
            return grad, grad * slope(y)

    return AddSquare


def test_a_function_that_marks_its_argument_dirty_is_judged_on_copies() -> None:
    samples = [(X, Y)]
    right = check_function(in_place(lambda y: 2 * y), samples, lambda x, y: x + y * y, slow=False)
    assert right.ok, right
    assert right.notes == ("changes x in place and returns it: it is given a copy in each call",)
    assert torch.equal(samples[0][0], X)
    wrong = check_function(in_place(lambda y: 5 * y), samples, lambda x, y: x + y * y, slow=False)
    assert wrong.verdict == "NOT OK: gradient of y – 2.5 times the right one, everywhere"


def test_a_callable_may_change_its_argument_in_place() -> None:
    report = check_function(lambda x: x.mul_(2).tanh_(), [(X,)], lambda x: (2 * x).tanh())
    assert report.ok, report


def test_an_argument_that_is_changed_and_not_returned_is_a_mistake() -> None:
    def spoils(x: Tensor, y: Tensor) -> Tensor:
        y.detach().zero_()
        return x * 2

    report = check_function(spoils, [(X, Y)], lambda x, y: x * 2 + y * 0, slow=False)
    assert "writes_nothing" in [outcome.check for outcome in report.failures]
    assert not report.notes


def cube(slope: Callable[[Tensor], Tensor]) -> type[Function]:
    class Cube(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * slope(x)

    return Cube


@pytest.mark.parametrize("power", [3, 2])
def test_reentrant_checkpointing_is_judged_by_backward(power: int) -> None:
    function = cube(lambda x: power * x ** (power - 1))

    def checkpointed(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(function.apply, x, use_reentrant=True)
        return result

    report = check_function(checkpointed, [(X,)], lambda x: x**3, slow=False)
    assert report.notes == ("gives gradients by .backward() only: they are read from .grad",)
    assert report.ok == (power == 3), report


class Reversible(Function):
    """Runs a block without a graph, and again in backward, which adds to `.grad` of its weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.block, ctx.factor = block, factor
        with torch.no_grad():
            result: Tensor = block(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.block(x)
        torch.autograd.backward(result, grad * ctx.factor)
        return x.grad / ctx.factor, None, None


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.block, self.factor = nn.Linear(3, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Reversible.apply(x, self.block, self.factor)
        return result


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return result


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_gradients_that_backward_adds_to_grad_are_read_there(factor: float) -> None:
    report = check_module(
        lambda: Net(factor), [(X,)], lambda: Plain(factor), only=["gradients_match_reference"]
    )
    assert report.notes == ("gives gradients by .backward() only: they are read from .grad",)
    assert report.ok == (factor == 1.0), report


class Again(Function):
    """Runs a function again in backward, by `.backward()`."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, _: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad, None


class Checkpointed(nn.Module):
    """A layer that runs again in backward; if it is wrong, with the input of the last call."""

    def __init__(self, *, is_wrong: bool) -> None:
        super().__init__()
        self.layer, self.is_wrong = nn.Linear(3, 4), is_wrong

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()

        def run(t: Tensor) -> Tensor:
            is_stale = self.is_wrong and t.shape == self.last.shape
            result: Tensor = self.layer(t + (self.last - t).detach() if is_stale else t).tanh()
            return result

        result: Tensor = Again.apply(run, x, torch.zeros(1, requires_grad=True))
        return result


class Direct(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).tanh()
        return result


STATE_OF_MODULES = ["train_eval", "mode_switch", "optimizer_step", "module_left_alone"]


@pytest.mark.parametrize("reference", [lambda: Direct(is_wrong=False), None])
def test_all_checks_read_the_gradients_of_a_module_from_grad(reference: Any) -> None:
    samples = [(X,)]
    only = ["requires_grad_subsets", "interleaved_calls", "stale_caches", *STATE_OF_MODULES]
    if reference is not None:
        only += ["gradients_match_reference", "finite_differences"]
    report = check_module(lambda: Checkpointed(is_wrong=False), samples, reference, only=only)
    assert report.notes == ("gives gradients by .backward() only: they are read from .grad",)
    assert report.ok, report
    report = check_module(lambda: Checkpointed(is_wrong=True), samples, reference, only=only)
    assert [outcome.check for outcome in report.causes] == ["interleaved_calls"]


def test_a_wrong_factor_of_a_module_shows_in_both_modes() -> None:
    report = check_module(lambda: Net(2.0), [(X,)], lambda: Plain(2.0), only=STATE_OF_MODULES)
    assert "gradient of block.weight in mode train(True)" in report.causes[0].message


def test_parameters_that_a_reentrant_checkpoint_forgets_are_named_as_such() -> None:
    class Reentrant(Net):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.block, x * 1, use_reentrant=True)
            return result

    report = check_module(
        lambda: Reentrant(1.0), [(X,)], lambda: Plain(1.0), only=["requires_grad_subsets"]
    )
    assert "what runs again in backward, as in a reentrant checkpoint" in report.verdict


def test_grad_stays_as_it_was_also_if_backward_raises() -> None:
    class Fails(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("not today")

    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    x.grad, y.grad = before = torch.ones_like(x), torch.ones_like(y)
    result = Fails.apply(x) + y
    with pytest.raises(RuntimeError, match="not today"):
        gradients_by_backward(result, (x, y), [torch.ones_like(X)])
    assert x.grad is before[0]
    assert y.grad is before[1]
    assert torch.equal(y.grad, torch.ones_like(Y))
