"""Of other frameworks: TensorFlow, MXNet, Chainer, JAX's forerunners and their like."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


def _pair(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g))]


class Cumprod(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.cumprod(-1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        one, end = torch.ones_like(x[..., :1]), torch.zeros_like(x[..., 0])
        before = torch.cat([one, x[..., :-1]], -1).cumprod(-1)
        after = [end]
        for i in reversed(range(x.shape[-1])):
            after.append(grad[..., i] + (x[..., i + 1] * after[-1] if i + 1 < x.shape[-1] else 0))
        return before * torch.stack(after[:0:-1], -1)


def _suffix_sums(t: Tensor) -> Tensor:
    return t.flip(-1).cumsum(-1).flip(-1)


@exhibit(
    "tensorflow/tensorflow#119430",
    _matrix,
    lambda x: x.cumprod(-1),
    fixed=Cumprod,
    diagnosis="zero",
)
class CumprodWithoutNan(Cumprod):
    """The gradient of cumprod divides by x, and what becomes 0 / 0 is replaced by 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return (_suffix_sums(grad * x.cumprod(-1)) / x).where(x != 0, 0.0)


@exhibit("tracel-ai/burn#5141", _matrix, lambda x: x.cumprod(-1), fixed=Cumprod)
class CumprodDivided(Cumprod):
    """The gradient of cumprod divides by x, and is nan where x = 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return _suffix_sums(grad * x.cumprod(-1)) / x


def _ties(g: Generator) -> Samples:
    return [(torch.randint(3, (5, 4), generator=g).double(),)]


class Amax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        top = x.amax(-1, keepdim=True)
        ctx.save_for_backward(x, top)
        return top

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, top = ctx.saved_tensors
        return grad * (x == top) / (x == top).sum(-1, keepdim=True)


def _amax(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True)


@exhibit("chelsea0x3b/dfdx#111", _ties, _amax, fixed=Amax)
class EveryTieInFull(Amax):
    """Each of several equal maxima gets the whole gradient, so that it counts several times."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, top = ctx.saved_tensors
        return grad * (x == top)


_TIMES = 7_000


def _many_ties(g: Generator) -> Samples:
    return [(torch.rand(1, generator=g).expand(10),)]


def _long_amax(x: Tensor) -> Tensor:
    return _amax(x.repeat(_TIMES))


class LongAmax(Function):
    """The maximum of numbers that are repeated 7000 times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _long_amax(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        is_top = x == x.amax()
        return grad * is_top / is_top.sum()


@exhibit("tinygrad/tinygrad#12296", _many_ties, _long_amax, fixed=LongAmax)
class TiesCountedInHalf(LongAmax):
    """The equal maxima are counted in the gradient's dtype; in float16, 70000 of them are ∞."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        is_top = (x == x.amax()).repeat(_TIMES)
        slope = grad * is_top / is_top.to(grad.dtype).sum()
        return slope.unflatten(0, (_TIMES, -1)).sum(0)


class SquaredDifference(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return (x - y).square()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        return 2 * (x - y) * grad, 2 * (y - x) * grad


@exhibit(
    "SciSharp/TensorFlow.NET#787",
    _pair,
    lambda x, y: (x - y).square(),
    fixed=SquaredDifference,
)
class ArgumentsAsGradients(SquaredDifference):
    """The gradients of (x - y)² are x and y themselves; the upstream gradient is ignored."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.saved_tensors


class Quadratic(Function):
    """3x² + 2x + 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return 3 * x**2 + 2 * x + 1

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return (6 * x + 2) * grad


@exhibit("apache/mxnet#16938", _matrix, lambda x: 3 * x**2 + 2 * x + 1, fixed=Quadratic)
class BackwardIsForward(Quadratic):
    """Backward was registered with the function of forward, and applies it to its first input."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return 3 * grad**2 + 2 * grad + 1


class Exponential(Function):
    """3 to the power of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return 3.0**x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * 3.0**x * np.log(3.0)


@exhibit("tenstorrent/tt-metal#52144", _matrix, lambda x: 3.0**x, fixed=Exponential)
class BaseAndExponentSwapped(Exponential):
    """Forward computes 3^x, backward the derivative of x³, with nan for x < 0."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return (grad * 3 * x**2).where(x >= 0, torch.nan)


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@exhibit("ahrefs/ocannl#73", _matrix, torch.square, fixed=Square)
class CopiedFromRelu(Square):
    """The gradient of a power is that of relu, from which its code was copied."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class Gram(Function):
    """x xᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad @ x + grad.mT @ x


@exhibit("NervanaSystems/neon#169", _matrix, lambda x: x @ x.mT, fixed=Gram)
class TransposeForgotten(Gram):
    """The gradient of x xᵀ lacks what comes through xᵀ."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad @ x


def _complex(g: Generator) -> Samples:
    return [(torch.randn(4, 3, generator=g, dtype=torch.complex128),)]


class SingularValues(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Any:
        u, values, vh = torch.linalg.svd(a, full_matrices=False)
        ctx.save_for_backward(u, vh)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        u, vh = ctx.saved_tensors
        return (u * grad) @ vh


@exhibit("HIPS/autograd#538", _complex, torch.linalg.svdvals, fixed=SingularValues)
class TransposedNotConjugated(SingularValues):
    """The gradient of singular values has V transposed, without the conjugation it needs."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        u, vh = ctx.saved_tensors
        return (u * grad) @ vh.conj()


@exhibit("chainer/chainer#4114", _matrix, F.silu, fixed=F.silu, diagnosis="a term of order 2")
class OldStyleFunction(Function):
    """Backward computes with arrays, so a second derivative finds a constant and no error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = (t.detach() for t in ctx.saved_tensors)
        return grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))
