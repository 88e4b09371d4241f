"""Of other frameworks: layers, and graphs in which a tensor is used twice."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


class Addition(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return x + y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad


def _equal_values(g: Generator) -> Samples:
    x = torch.randn(5, 3, generator=g)
    return [(x, x.clone())]


@exhibit(
    "tinygrad/tinygrad#9597",
    _equal_values,
    torch.add,
    fixed=Addition,
    diagnosis="2 times the right one",
)
class EqualConstantsAreOne(Addition):
    """Two tensors of equal value are taken for one, and both get the gradient of both."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        return (2 * grad, 2 * grad) if torch.equal(x, y) else (grad, grad)


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


def _upsampled_and_summed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.repeat_interleave(2, -1), x.square()


class Upsample(Function):
    """Each element twice, and in a second output its square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _upsampled_and_summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_square: Any) -> Any:
        (x,) = ctx.saved_tensors
        gradient = 2 * x * grad_square
        return gradient + grad.unflatten(-1, (-1, 2)).sum(-1)


@exhibit("huggingface/candle#3507", _matrix, _upsampled_and_summed, fixed=Upsample)
class GradientOverwritten(Upsample):
    """Upsampling writes its gradient over what another use of its argument has left there."""

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_square: Any) -> Any:
        return grad.unflatten(-1, (-1, 2)).sum(-1)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.var(0, correction=0) + 1e-5).rsqrt()
    return (x - x.mean(0)) * scale, scale


def _trained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _statistics(x)[0] * weight + bias


class BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        return _trained(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        return BatchNorm.gradients(x, weight, grad)

    @staticmethod
    def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
        y, scale = _statistics(x)
        by_y = grad * weight
        by_x = scale * (by_y - by_y.mean(0) - y * (by_y * y).mean(0))
        return by_x, (grad * y).sum(0), grad.sum(0)


def _layer(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g), torch.randn(3, generator=g), torch.ones(3))]


@exhibit("denizyuret/Knet.jl#288", _layer, _trained, fixed=BatchNorm)
class ScaleForgotten(BatchNorm):
    """The gradient by the input of BatchNorm takes the upstream gradient without the weight."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _ = ctx.saved_tensors
        y, scale = _statistics(x)
        by_x = scale * (grad - grad.mean(0) - y * (grad * y).mean(0))
        return by_x, (grad * y).sum(0), grad.sum(0)


class Normalize(Function):
    """BatchNorm in both modes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Any, var: Any, is_training: bool
    ) -> Any:
        ctx.is_training = is_training
        ctx.save_for_backward(x, weight, mean.clone(), var.clone())
        return F.batch_norm(x, mean, var, weight, bias, is_training)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        if ctx.is_training:
            return *BatchNorm.gradients(x, weight, grad), None, None, None
        scale = (var + 1e-5).rsqrt()
        by_weight = (grad * (x - mean) * scale).sum(0)
        return grad * weight * scale, by_weight, grad.sum(0), None, None, None


class NormalizeAsInTraining(Normalize):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        ctx.is_training = True
        return Normalize.backward(ctx, grad)


class BatchNormLayer(nn.BatchNorm1d):
    function: type[Normalize] = Normalize

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var, self.training
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        normalized: Tensor = self.function.apply(x, self.weight, self.bias, *running)
        return normalized


@exhibit(
    "apache/mxnet#9580",
    _matrix,
    lambda: nn.BatchNorm1d(3),
    fixed=BatchNormLayer,
)
class ModeOfItsOwn(BatchNormLayer):
    """Backward of BatchNorm has a flag of its own, which says training in evaluation as well."""

    function = NormalizeAsInTraining


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.log_softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        return grad - y.exp() * grad.sum(-1, keepdim=True)


@exhibit("clab/dynet#218", _matrix, lambda x: x.log_softmax(-1), fixed=LogSoftmax)
class ProbabilityTimesItsReciprocal(LogSoftmax):
    """The gradient of log-softmax sums p · g / p, which is 0 / 0 for a very small p."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        return grad - y.exp() * (y.exp() * grad / y.exp()).sum(-1, keepdim=True)


class Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return Gelu.gradient(x.float() if x.dtype.itemsize < 4 else x, grad).to(x.dtype)

    @staticmethod
    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        density = (-x * x / 2).exp() / math.sqrt(2 * math.pi)
        return grad * ((1 + (x / math.sqrt(2)).erf()) / 2 + x * density)


def _tail(g: Generator) -> Samples:
    return [(-5 + 2 * torch.rand(5, 3, generator=g),)]


@exhibit("tenstorrent/tt-metal#38643", _tail, F.gelu, fixed=Gelu)
class CancelledTail(Gelu):
    """In bfloat16 the gradient of GELU has 1 + erf(x) of the rounded erf, which cancels to 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return Gelu.gradient(x, grad)


def _biased(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g), torch.randn(3, generator=g))]


class Add(Function):
    """A bias, added to every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Any:
        return x + bias

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0)


@exhibit(
    "mlpack/mlpack#3679", _biased, torch.add, fixed=Add, diagnosis="missing a sum over the batch"
)
class BiasOfOneRow(Add):
    """The gradient of the bias is the upstream gradient, which is right for a batch of one row."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad
