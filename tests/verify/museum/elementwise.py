"""Activations, gathers and convolutions of several projects."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32

SLOPE = 5.0


def _potentials(g: Generator) -> list[tuple[Any, ...]]:
    return [(0.02 * torch.randn(5, 3, generator=g),)]


def _steep(x: Tensor) -> Tensor:
    return torch.sigmoid(SLOPE * x)


class SteepSigmoid(Function):
    """A sigmoid as steep as those that stand in for a spike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _steep(x)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        s = _steep(x)
        return grad * SLOPE * s * (1 - s)


@exhibit("jeshraghian/snntorch#433", _potentials, _steep, fixed=SteepSigmoid)
class InfinityByInfinity(SteepSigmoid):
    """The slope exp(-x) / (1 + exp(-x))² is nan where the exponential overflows."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        power = torch.exp(-SLOPE * x)
        return grad * SLOPE * power / (1 + power).square()


def _table(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(4, 3, generator=g), torch.tensor([2, 0, 2, 3, 2]))]


def _gather(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


class Gather(Function):
    """Rows of a table; some are taken several times, one never."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Any:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return _gather(table, index)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_add(0, index, grad), None


@exhibit("ooples/AiDotNet.Tensors#894", _table, _gather, fixed=Gather)
class GradientsGathered(Gather):
    """The gradients are gathered by the same indices, and not added up where they came from."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (index,) = ctx.saved_tensors
        return grad[index[torch.arange(ctx.rows)] % len(grad)], None


def _signal(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(7, 2, generator=g), torch.randn(3, generator=g))]


def _taps(x: Tensor) -> Tensor:
    """Every row with the one before and the one after."""
    edge = torch.zeros_like(x[:1])
    return torch.stack([torch.cat([edge, x[:-1]]), x, torch.cat([x[1:], edge])])


def _convolve(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("k,k...->...", w, _taps(x))


class Convolution(Function):
    """A convolution with three taps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _convolve(x, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return _convolve(grad, w.flip(0)), torch.einsum("...,k...->k", grad, _taps(x))


@exhibit("jmschrei/cherimoya#25", _signal, _convolve, fixed=Convolution)
class LostUpdates(Convolution):
    """Several threads add to one element without atomics, and only the last addition stays."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, w = ctx.saved_tensors
        last = torch.cat([w[1] * grad[:1], w[2] * grad[:-1]])
        return last, Convolution.backward(ctx, grad)[1]
