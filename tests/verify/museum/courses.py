"""Of courses, and of frameworks written to learn."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


def _used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x.tanh(), x.tanh().square()


class UsedTwice(Function):
    """A hidden value h = tanh(x) with two users: 2h and h²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _used_twice(x)

    @staticmethod
    def backward(ctx: Any, grad_double: Any, grad_square: Any) -> Any:
        (x,) = ctx.saved_tensors
        h = x.tanh()
        return (2 * grad_double + 2 * h * grad_square) * (1 - h * h)


@exhibit("karpathy/micrograd#2", _matrix, _used_twice, fixed=UsedTwice)
class EveryPathAnew(UsedTwice):
    """A value with two users passes its gradient on after each: what came first counts twice."""

    @staticmethod
    def backward(ctx: Any, grad_double: Any, grad_square: Any) -> Any:
        first = UsedTwice.backward(ctx, grad_double, torch.zeros_like(grad_square))
        return first + UsedTwice.backward(ctx, grad_double, grad_square)


class Tanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.calls = 0
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


@exhibit(
    "karpathy/micrograd#102",
    _matrix,
    torch.tanh,
    fixed=Tanh,
    diagnosis="kept in one place for all calls",
)
class InnerGradientsStay(Tanh):
    """Gradients of inner nodes are never set to 0, so a second backward counts the first again."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        ctx.calls += 1
        return ctx.calls * Tanh.backward(ctx, grad)


_MASK = [[1, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]]


def _dropped(x: Tensor) -> Tensor:
    return x * torch.tensor(_MASK) / 0.6


class Dropout(Function):
    """Dropout with p = 0.4 and a given mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _dropped(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _dropped(grad)


@exhibit("ddbourgin/numpy-ml#94", _matrix, _dropped, fixed=Dropout)
class MaskOfForwardOnly(Dropout):
    """Backward of dropout divides by 1 - p, but does not apply the mask."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad / 0.6


@exhibit("kaldi-asr/kaldi#3890", _matrix, _dropped, fixed=Dropout)
class MaskFromTheQuotient(Dropout):
    """Dropout has no mask: the slope is output / input, and 1 where the input is 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * (_dropped(x) / x).where(x != 0, 1.0)


def _amax(x: Tensor) -> Tensor:
    return x.amax(-1)


@exhibit("TrenTorch/TrenTorch#58", _matrix, _amax, fixed=_amax)
def maximum_of_array(x: Tensor) -> Tensor:
    """The maximum is that of a NumPy array made a tensor: the gradient is lost without an error."""
    return torch.from_numpy(x.detach().numpy().max(-1))


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


class Softmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))


@exhibit("jorgenkg/python-neural-network#6", _matrix, _softmax, fixed=Softmax)
class DerivativeOfSigmoid(Softmax):
    """The derivative of softmax is y (1 - y), as that of the sigmoid: only the diagonal."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        return grad * y * (1 - y)


@exhibit(
    "markroxor/fromscratchtoml#65",
    _matrix,
    _softmax,
    fixed=Softmax,
    diagnosis="2 times the right one",
)
class TwiceTheGradient(Softmax):
    """The gradient of softmax is off by a factor of two."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return 2 * Softmax.backward(ctx, grad)
