"""Of other frameworks: signs, and frozen arguments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


def _pair(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g))]


class SineTimes(Function):
    """sin(x) y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return x.sin() * y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        return x.cos() * y * grad, x.sin() * grad


@exhibit(
    "jax-ml/jax#3213",
    _pair,
    lambda x, y: x.sin() * y,
    fixed=SineTimes,
    diagnosis="a sign error",
)
class SignInTheExample(SineTimes):
    """The derivative of sin(x) y by y is -sin(x), in the documentation of custom derivatives."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        by_x, by_y = SineTimes.backward(ctx, grad)
        return by_x, -by_y


_STEP = 0.1


def _solved(start: Tensor, rate: Tensor) -> Tensor:
    """Twenty Euler steps of u' = rate · tanh(u)."""
    u = start
    for _ in range(20):
        u = u + _STEP * rate * u.tanh()
    return u


class Solve(Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, rate: Tensor) -> Any:
        ctx.save_for_backward(start, rate)
        return _solved(start, rate)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        start, rate = ctx.saved_tensors
        states = [start]
        for _ in range(19):
            states.append(states[-1] + _STEP * rate * states[-1].tanh())
        by_rate = torch.zeros_like(rate)
        for u in reversed(states):
            by_rate = by_rate + _STEP * grad * u.tanh()
            grad = grad + _STEP * grad * rate * (1 - u.tanh().square())
        return grad, by_rate


@exhibit("SciML/SciMLSensitivity.jl#543", _pair, _solved, fixed=Solve, diagnosis="a sign error")
class SignOfTheStart(Solve):
    """The adjoint state at the start is returned with the wrong sign as the gradient by it."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        by_start, by_rate = Solve.backward(ctx, grad)
        return -by_start, by_rate


def _channels(g: Generator) -> Samples:
    return [tuple(torch.randn(*shape, generator=g) for shape in ((2, 4, 5), (4,), (4,)))]


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 2, weight, bias)


class GroupNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        return _group_norm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        y, scale = GroupNorm.normalized(x)
        by_y = (grad * weight[:, None]).reshape(y.shape)
        means = by_y.mean(-1, keepdim=True), (by_y * y).mean(-1, keepdim=True)
        by_x = (scale * (by_y - means[0] - y * means[1])).view(x.shape)
        return by_x, (grad * y.view(x.shape)).sum((0, 2)), grad.sum((0, 2))

    @staticmethod
    def normalized(x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.reshape(len(x), 2, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale, scale


@exhibit("PaddlePaddle/Paddle#54244", _channels, _group_norm, fixed=GroupNorm)
class FrozenInput(GroupNorm):
    """Backward of GroupNorm writes the input's gradient, which does not exist if none is needed."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        buffer: Any = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        by_x, *rest = GroupNorm.backward(ctx, grad)
        return buffer.copy_(by_x), *rest
