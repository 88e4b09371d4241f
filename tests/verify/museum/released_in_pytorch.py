"""Found by us in releases of PyTorch."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import read_as_contiguous

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(4, 3, generator=g),)]


def _weight_norm(v: Tensor, size: Tensor) -> Tensor:
    return size * v / v.square().sum(-1, keepdim=True).sqrt()


class WeightNorm(Function):
    """Each row of v, with another norm."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, size: Tensor) -> Any:
        ctx.save_for_backward(v, size, v.norm(dim=-1, keepdim=True))
        return _weight_norm(v, size)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        v, size, _ = ctx.saved_tensors
        return WeightNorm.gradients(grad, v, size, v.square().sum(-1, keepdim=True).sqrt())

    @staticmethod
    def gradients(grad: Tensor, v: Tensor, size: Tensor, norm: Tensor) -> Any:
        unit = v / norm
        along = (grad * unit).sum(-1, keepdim=True)
        return size / norm * (grad - unit * along), along


@exhibit(
    "PyTorch 2.13.0, _weight_norm",
    lambda g: [(torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g))],
    _weight_norm,
    fixed=WeightNorm,
    diagnosis="a term of order 2 is missing",
)
class NormOnce(WeightNorm):
    """Backward uses the norms that forward saved as constants: second derivatives are wrong."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return WeightNorm.gradients(grad, *ctx.saved_tensors)


def _with_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1)
    scale = (x.var(-1, correction=0) + 1e-5).rsqrt()
    return (x - mean[..., None]) * scale[..., None], mean, scale


class WithStatistics(Function):
    """Normalized rows, their mean and the inverse of their deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return _with_statistics(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any, by_mean: Any, by_scale: Any) -> Any:
        (x,) = ctx.saved_tensors
        y, mean, scale = _with_statistics(x)
        grad = torch.zeros_like(y) if grad is None else grad
        by_mean = torch.zeros_like(mean) if by_mean is None else by_mean
        by_scale = torch.zeros_like(scale) if by_scale is None else by_scale
        along = (grad * y).mean(-1) + by_scale * scale / x.shape[-1]
        centred = grad - grad.mean(-1, keepdim=True) - y * along[..., None]
        return scale[..., None] * centred + by_mean[..., None] / x.shape[-1]


@exhibit("PyTorch 2.13.0, native_group_norm", _matrix, _with_statistics, fixed=WithStatistics)
class OneStatisticAlone(WithStatistics):
    """If only the mean is used, or only the deviation, there is no gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Any, by_mean: Any, by_scale: Any) -> Any:
        if grad is None and (by_mean is None or by_scale is None):
            return None
        return WithStatistics.backward(ctx, grad, by_mean, by_scale)


def _median(x: Tensor) -> Tensor:
    return x.sort(-1).values[..., (x.shape[-1] - 1) // 2]


class Median(Function):
    """The lower median of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        value, index = x.sort(-1)
        middle = (x.shape[-1] - 1) // 2
        ctx.save_for_backward(index[..., middle])
        ctx.shape = x.shape
        return value[..., middle].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter(-1, index[..., None], grad[..., None])


@exhibit("PyTorch 2.13.0, median", _matrix, _median, fixed=Median)
class MedianOfExpanded(Median):
    """If x is expanded along its rows, values are read past them, and the gradient goes to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return Median.forward(ctx, x if x.stride(-1) else read_as_contiguous(x))
