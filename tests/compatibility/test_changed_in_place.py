"""Changing what a backward needs, in place: right or refused, never silently wrong."""

import copy
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import grad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from manual_bp import convert
from tests.activations import TABLE
from tests.compatibility.subjects import COSTS, LAYERS, Subject, every_subject
from tests.helpers import (
    IS_OLDEST,
    assert_same,
    differs_on_the_oldest,
    is_differentiable,
    leaf,
)

Call = Callable[..., Tensor]

pytestmark = [
    # Warnings of the compiler about itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# Each calls a function, then changes something in place, and returns a cost.


def output_scaled(call: Call, *arguments: Tensor) -> Tensor:
    output = call(*arguments)
    output.mul_(3)
    return output.square().sum()


def output_as_residual(call: Call, *arguments: Tensor) -> Tensor:
    output = call(*arguments)
    output += arguments[0].sum()
    return output.square().sum()


def output_through_exp(call: Call, *arguments: Tensor) -> Tensor:
    return call(*arguments).exp_().sum()


def view_of_output(call: Call, *arguments: Tensor) -> Tensor:
    output = call(*arguments)
    output.view(-1)[1:].zero_()
    return output.square().sum()


def inputs_scaled(call: Call, *arguments: Tensor) -> Tensor:
    output = call(*arguments)
    for argument in filter(is_differentiable, arguments):
        argument.mul_(2)
    return output.square().sum()


def view_of_input(call: Call, *arguments: Tensor) -> Tensor:
    output = call(*arguments)
    arguments[0][0].zero_()
    return output.square().sum()


def base_of_input(call: Call, *arguments: Tensor) -> Tensor:
    output = call(arguments[0].view(-1).view_as(arguments[0]), *arguments[1:])
    arguments[0].add_(1)
    return output.square().sum()


OF_OUTPUT = [output_scaled, output_as_residual, output_through_exp, view_of_output]
OF_INPUT = [inputs_scaled, view_of_input, base_of_input]
CHANGES = OF_OUTPUT + OF_INPUT
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def scaled(cost: Call, *arguments: Tensor) -> Tensor:
    """A cost of values computed from the arguments, because a leaf cannot be changed in place."""
    return cost(*(t * 1.5 if is_differentiable(t) else t for t in arguments))


def gradients(cost: Call, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    given = [leaf(t) if is_differentiable(t) else t for t in arguments]
    cost(*given).backward()
    return [t.grad for t in given if t.grad is not None]


def out_of_reach(call: Call) -> Call:
    """The same function on copies, so that no other code can change what it saves."""

    def apart(*arguments: Tensor) -> Tensor:
        return call(*(t.clone() for t in arguments)).clone()

    return apart


class Outcome(NamedTuple):
    is_refused: bool
    is_right: bool


def outcome(run: Callable[[], list[Tensor]], expected: list[Tensor]) -> Outcome:
    try:
        found = run()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return Outcome(is_refused=True, is_right=False)
    same = [torch.allclose(one, two) for one, two in zip(found, expected, strict=True)]
    return Outcome(is_refused=False, is_right=all(same))


@pytest.mark.skipif(IS_OLDEST, reason="refused there: the next test")
@every_subject
def test_a_change_within_a_compiled_region_is_right(subject: Subject, device: torch.device) -> None:
    def costs(call: Call, *arguments: Tensor) -> Tensor:
        return torch.stack([scaled(partial(change, call), *arguments) for change in CHANGES])

    arguments = subject.arguments(device=device)
    given = [leaf(t) if is_differentiable(t) else t for t in arguments]
    compiled = torch.compile(partial(costs, subject.ours), backend="aot_eager", fullgraph=True)
    found = compiled(*given)
    for change, cost in zip(CHANGES, found, strict=True):
        apart = partial(scaled, partial(change, out_of_reach(subject.theirs)))
        wanted = list(filter(is_differentiable, given))
        grads = torch.autograd.grad(cost, wanted, retain_graph=True)
        assert_same(list(grads), gradients(apart, arguments))


@pytest.mark.skipif(not IS_OLDEST, reason="right on newer versions: the test above")
@every_change
@every_subject
def test_on_the_oldest_a_compiled_change_is_right_or_refused(
    subject: Subject, change: Callable[..., Tensor], device: torch.device
) -> None:
    """Right, or refused as in eager code."""
    arguments = subject.arguments(device=device)
    cost = partial(scaled, partial(change, subject.ours))
    apart = partial(scaled, partial(change, out_of_reach(subject.theirs)))
    expected = gradients(apart, arguments)
    compiled = torch.compile(cost, backend="aot_eager", fullgraph=True)
    found = outcome(partial(gradients, compiled, arguments), expected)
    in_eager_code = outcome(partial(gradients, cost, arguments), expected)
    assert found.is_right or (found.is_refused and in_eager_code.is_refused)


@every_subject
def test_a_change_outside_of_a_compiled_region_is_right_or_refused(
    subject: Subject, device: torch.device
) -> None:
    arguments = subject.arguments(device=device)
    compiled = torch.compile(subject.ours, backend="aot_eager", fullgraph=True)
    for change in CHANGES:
        cost = partial(scaled, partial(change, compiled))
        apart = partial(scaled, partial(change, out_of_reach(subject.theirs)))
        found = outcome(partial(gradients, cost, arguments), gradients(apart, arguments))
        assert found.is_right or found.is_refused, change.__name__


def in_a_checkpoint(cost: Call) -> Call:
    def checkpointed(*arguments: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            result: Tensor = checkpoint(cost, *arguments, use_reentrant=False)
        return result

    return checkpointed


def under(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Call], Call]:
    def around(cost: Call) -> Call:
        def within(*arguments: Tensor) -> Tensor:
            with context():
                return cost(*arguments)

        return within

    return around


WAYS: dict[str, Callable[[Call], Call]] = {
    "eager": under(nullcontext),
    "hooks that keep the tensor itself": under(
        lambda: saved_tensors_hooks(lambda t: t, lambda t: t)
    ),
    "save_on_cpu": under(save_on_cpu),
    "checkpoint": in_a_checkpoint,
    "reentrant checkpoint": lambda cost: partial(checkpoint, cost, use_reentrant=True),
}


@pytest.mark.parametrize("way", WAYS)
@every_change
@every_subject
def test_a_change_is_handled_no_worse_than_by_pytorch(
    subject: Subject, change: Callable[..., Tensor], way: str, device: torch.device
) -> None:
    """Right where PyTorch's layers are right; where those refuse, right or refused."""
    if subject in COSTS and change in OF_INPUT:
        pytest.skip("PyTorch's costs keep other tensors than ours do")
    arguments = subject.arguments(device=device)
    expected = gradients(partial(scaled, partial(change, out_of_reach(subject.theirs))), arguments)

    def of(call: Call) -> Outcome:
        cost = WAYS[way](partial(scaled, partial(change, call)))
        return outcome(lambda: gradients(cost, arguments), expected)

    ours, theirs = of(subject.ours), of(subject.theirs)
    assert ours.is_right >= theirs.is_right
    assert ours.is_right or ours.is_refused or not theirs.is_refused


@every_change
@pytest.mark.parametrize("subject", LAYERS, ids=lambda subject: subject.name)
def test_a_change_under_func_is_right_or_refused(
    subject: Subject, change: Callable[..., Tensor], device: torch.device
) -> None:
    arguments = subject.arguments(device=device)

    def through(call: Call) -> list[Tensor]:
        cost = partial(scaled, partial(change, call))
        found: tuple[Tensor, ...] = grad(cost, tuple(range(len(arguments))))(*arguments)
        return list(found)

    expected = through(out_of_reach(subject.theirs))
    ours = outcome(lambda: through(subject.ours), expected)
    theirs = outcome(lambda: through(subject.theirs), expected)
    assert ours.is_right or (ours.is_refused and theirs.is_refused)


class Residual(nn.Module):
    """A block that adds its input to its output in place, as many do."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(4, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.activation(self.linear(x))
        a += x
        return a


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler"
)
@differs_on_the_oldest  # refused, as in eager code
@pytest.mark.parametrize("fuse", [False, True])
def test_inductor_is_right_for_a_model_that_changes_outputs(fuse: bool) -> None:
    theirs = nn.Sequential(
        *(Residual(activation.make_reference()) for activation in TABLE),
        nn.Linear(4, 4),
        nn.Sigmoid(),
        nn.Hardtanh(0.3, 0.6, inplace=True),  # changes the output of the sigmoid
        nn.Linear(4, 1),
    ).double()
    ours = copy.deepcopy(theirs)
    convert(ours, fuse=fuse)
    x = torch.randn(6, 4, dtype=torch.float64)

    def trained(net: nn.Module, call: Call) -> list[Tensor]:
        call(x).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    found = trained(ours, torch.compile(ours, fullgraph=True))
    with saved_tensors_hooks(Tensor.clone, lambda t: t):
        expected = trained(theirs, theirs)
    assert_same(found, expected)
