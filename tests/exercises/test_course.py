"""What the course calls right is what autograd computes, and no known mistake is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Mistake, Values, flat
from manual_bp.exercises._explain import fields, is_right
from manual_bp.exercises._judge import _problems
from manual_bp.exercises.course import COURSE
from tests.helpers import assert_same

RIGHT: dict[str, Callable[[Values], Any]] = {}


def right(function: Callable[[Values], Any]) -> Callable[[Values], Any]:
    RIGHT[function.__name__] = function
    return function


def derivatives(call: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    return list(torch.autograd.grad(call(*leaves), leaves))


def quadratic(a: Tensor, y: Tensor) -> Tensor:
    return (y - a).square().sum(1).mean() / 2


def net(x: Tensor, parameters: list[Tensor]) -> Tensor:
    for w, b in zip(parameters[::2], parameters[1::2], strict=True):
        x = torch.sigmoid(F.linear(x, w, b))
    return x


@right
def sigmoid_prime(v: Values) -> Any:
    return derivatives(lambda z: z.sigmoid().sum(), v.z)


@right
def output_delta(v: Values) -> Any:
    assert_same([v.a], [v.z.sigmoid()])
    return derivatives(lambda z: quadratic(z.sigmoid(), v.y), v.z)


@right
def hidden_delta(v: Values) -> Any:
    return derivatives(lambda z: (F.linear(z.sigmoid(), v.w_next) * v.delta_next).sum(), v.z)


@right
def grad_b(v: Values) -> Any:
    b = torch.zeros_like(v.delta[0])
    return derivatives(lambda b: ((torch.ones_like(v.delta) + b) * v.delta).sum(), b)


@right
def grad_w(v: Values) -> Any:
    w = torch.zeros(v.sizes["out"], v.sizes["in"], dtype=v.delta.dtype)
    return derivatives(lambda w: (F.linear(v.a_prev, w) * v.delta).sum(), w)


@right
def backprop(v: Values) -> Any:
    parameters = [t for pair in zip(v.weights, v.biases, strict=True) for t in pair]
    found = derivatives(lambda *p: quadratic(net(v.x, list(p)), v.y), *parameters)
    return [found[::2], found[1::2]]


@right
def numerical_gradient(v: Values) -> Any:
    return derivatives(v.f, v.x)


@right
def per_sample_grad_w(v: Values) -> Any:
    w = torch.zeros(v.sizes["out"], v.sizes["in"], dtype=v.delta.dtype)
    pairs = zip(v.delta, v.a_prev, strict=True)
    return torch.stack([derivatives(lambda w, d=d, a=a: d @ w @ a, w)[0] for d, a in pairs])


def with_value(call: Callable[[Tensor], Tensor], z: Tensor) -> Any:
    return [call(z), *derivatives(call, z)]


@right
def cross_entropy(v: Values) -> Any:
    def cost(z: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(z, v.y, reduction="none")
        return losses.sum(1).mean()

    return with_value(cost, v.z)


@right
def softmax_cross_entropy(v: Values) -> Any:
    return with_value(lambda z: F.cross_entropy(z, v.labels), v.z)


def fused(a_prev: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z: Tensor = F.linear(a_prev, w, b)
    return z.sigmoid()


@right
def linear_sigmoid_backward(v: Values) -> Any:
    assert_same([v.a], [fused(v.a_prev, v.w, v.b)])
    return derivatives(lambda *p: (fused(*p) * v.grad_a).sum(), v.a_prev, v.w, v.b)


@right
def linear_sigmoid_second(v: Values) -> Any:
    def s(grad_a: Tensor, *arguments: Tensor) -> Tensor:
        a = fused(*arguments)
        (grad,) = torch.autograd.grad(a, arguments[0], grad_a, create_graph=True)
        total: Tensor = (grad * v.v).sum()
        return total

    return derivatives(s, v.grad_a, v.a_prev, v.w, v.b)


@pytest.mark.parametrize("exercise", COURSE, ids=lambda exercise: exercise.function)
def test_the_right_results_are_those_of_autograd(exercise: Exercise) -> None:
    for values in _problems(exercise, seed=3):
        assert_same(flat(values.right), flat(RIGHT[exercise.function](values)), 1e-9, 1e-12)


def outcome(mistake: Mistake, values: Values) -> bool | None:
    """Whether what a mistake gives is right; None if it asks for other sizes."""
    try:
        found = flat(mistake.gives(values))
    except (RuntimeError, IndexError):
        return None
    expected = flat(values.right)
    return len(found) == len(expected) and all(map(is_right, found, expected))


# Far out a formula fails, or the step decides.
NEARLY_RIGHT = ("right for moderate z", "the step h is too short", "the difference to one side")


@pytest.mark.parametrize("exercise", COURSE, ids=lambda exercise: exercise.function)
def test_no_known_mistake_is_right_and_each_has_a_sentence(exercise: Exercise) -> None:
    first, *_ = _problems(exercise, seed=3)
    square = exercise.problem(dict.fromkeys(exercise.size_names(), 3), seed=3)
    for mistake in exercise.mistakes:
        if not any(nearly in mistake.says for nearly in NEARLY_RIGHT):
            assert outcome(mistake, first) is not True, mistake.says
        assert outcome(mistake, square) is not None, mistake.says
        says = mistake.says.format_map(fields(square, columns=False))
        assert says
        assert not says.endswith(".")


def test_each_size_differs_from_all_others_in_most_problems() -> None:
    for exercise in COURSE:
        problems = [values for values in _problems(exercise, seed=0) if values.nearby is None]
        assert len(problems) == 3
        assert all(len(set(v.sizes.values())) == len(v.sizes) for v in problems)
        assert len({tuple(v.sizes.values()) for v in problems}) > 1
