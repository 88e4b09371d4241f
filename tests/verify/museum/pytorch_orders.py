"""Of pytorch/pytorch: statistics that several tensors share, and derivatives of higher order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        gate = x.sigmoid()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _ = ctx.saved_tensors
        return Swish.gradient(x, x.sigmoid(), grad)

    @staticmethod
    def gradient(x: Tensor, gate: Tensor, grad: Tensor) -> Tensor:
        return grad * gate * (1 + x * (1 - gate))


@exhibit(
    "pytorch/pytorch#76185",
    _matrix,
    torch.nn.functional.silu,
    fixed=Swish,
    diagnosis="a term of order 2 is missing",
)
class SavedIntermediate(Swish):
    """Forward saves what it computed on the way: for the second derivative it is a constant."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, gate = ctx.saved_tensors
        return Swish.gradient(x, gate, grad)


def _normalized(x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(0)
    return centred * (centred.square().mean(0) + eps).rsqrt()


def _slope(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    y = (x - mean) * scale
    return scale * (grad - grad.mean(0) - y * (grad * y).mean(0))


class BatchNorm(Function):
    """Each column minus its mean, divided by its standard deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mean, scale = x.mean(0), (x.var(0, correction=0) + 1e-5).rsqrt()
        ctx.save_for_backward(x, mean, scale)
        return (x - mean) * scale

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, *_ = ctx.saved_tensors
        return _slope(grad, x, x.mean(0), (x.var(0, correction=0) + 1e-5).rsqrt())


class _SlopeWithSavedStatistics(Function):
    """The gradient; its own backward knows how the statistics depend on x."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Any:
        ctx.save_for_backward(grad, x, mean, scale)
        return _slope(grad, x, mean, scale)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        is_recording = torch.is_grad_enabled()
        with torch.enable_grad():
            grad, x, mean, scale = [t.view_as(t) for t in ctx.saved_tensors]
            mean, scale = mean.detach().requires_grad_(), scale.detach().requires_grad_()
            grad, x = (t if t.requires_grad else t.requires_grad_() for t in (grad, x))
            by_grad, by_x, by_mean, by_scale = torch.autograd.grad(
                _slope(grad, x, mean, scale),
                (grad, x, mean, scale),
                upstream,
                create_graph=is_recording,
            )
        by_statistics = (by_mean - by_scale * scale**3 * (x - mean)) / len(x)
        return by_grad, by_x + by_statistics, None, None


@exhibit(
    "pytorch/pytorch#186256",
    _matrix,
    _normalized,
    fixed=BatchNorm,
    diagnosis="a term of order 3 is missing",
)
class ThirdOrderOfBatchNorm(BatchNorm):
    """Mean and deviation are saved without a graph: right to order 2, constants for order 3."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _SlopeWithSavedStatistics.apply(grad, *ctx.saved_tensors)


def _shards(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g), torch.randn(2, 3, generator=g))]


def _normalized_together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.cat([x, y])
    scale = (every.var(0, correction=0) + 1e-5).rsqrt()
    return scale * (x - every.mean(0)), scale * (y - every.mean(0))


class SyncBatchNorm(Function):
    """Two processes normalize their rows with the statistics of all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return _normalized_together(x, y)

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_y: Any) -> Any:
        shares = [len(grad) / (len(grad_x) + len(grad_y)) for grad in (grad_x, grad_y)]
        return SyncBatchNorm.gradients(ctx.saved_tensors, (grad_x, grad_y), shares)

    @staticmethod
    def gradients(shards: Sequence[Tensor], grads: Sequence[Tensor], shares: list[float]) -> Any:
        every = torch.cat(list(shards))
        scale = (every.var(0, correction=0) + 1e-5).rsqrt()
        pairs = [(scale * (t - every.mean(0)), g) for t, g in zip(shards, grads, strict=True)]
        mean = sum(s * grad.mean(0) for s, (_, grad) in zip(shares, pairs, strict=True))
        dot = sum(s * (t * grad).mean(0) for s, (t, grad) in zip(shares, pairs, strict=True))
        return tuple(scale * (grad - mean - t * dot) for t, grad in pairs)


@exhibit("pytorch/pytorch#36382", _shards, _normalized_together, fixed=SyncBatchNorm)
class EqualShares(SyncBatchNorm):
    """Synchronized BatchNorm averages the means of both processes as if they had as many rows."""

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_y: Any) -> Any:
        return SyncBatchNorm.gradients(ctx.saved_tensors, (grad_x, grad_y), [0.5, 0.5])
