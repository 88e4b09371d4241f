"""Normalization layers of several projects."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32

EPS = 1e-6


def _rows(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 7, generator=g),)]


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The normalized rows, and 1 over their standard deviation."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return centred * scale, scale


def _layer_norm(x: Tensor) -> Tensor:
    return _normal(x)[0]  # PyTorch's own has a wrong third derivative


class LayerNorm(Function):
    """Layer normalization without weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _layer_norm(x)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        normal, scale = _normal(x)
        along = (grad * normal).mean(-1, keepdim=True)
        return scale * (grad - grad.mean(-1, keepdim=True) - normal * along)


@exhibit("flagos-ai/FlagGems#5392", _rows, _layer_norm, fixed=LayerNorm, in_dims=(0,))
class TwoDimensionsOnly(LayerNorm):
    """Backward takes all dimensions after the first for one row, though only the last is normed."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        normal, scale = _normal(x)
        dims = tuple(range(1, x.ndim)) or (0,)
        along = (grad * normal).mean(dims, keepdim=True)
        return scale * (grad - grad.mean(dims, keepdim=True) - normal * along)


@exhibit("flagos-ai/FlagGems#59", _rows, _layer_norm, fixed=LayerNorm, in_dims=(0,))
class SumsOverTheBlock(LayerNorm):
    """A block holds several rows, and the two sums run over the block instead of over each row."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        normal, scale = _normal(x)
        width = x.shape[-1]
        return scale * (grad - grad.sum() / width - normal * (grad * normal).sum() / width)


def _scaled(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(3, generator=g))]


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, EPS)


class RmsNorm(Function):
    """x / rms(x) * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _rms_norm(x, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        along = (grad * w * x).mean(-1, keepdim=True)
        return scale * grad * w - scale**3 * x * along, (grad * x * scale).sum(0)


@exhibit("NVIDIA/Megatron-LM#6859", _scaled, _rms_norm, fixed=RmsNorm)
class WeightTwice(RmsNorm):
    """The term of the variance is multiplied by the weight twice; at weights of 1 this is right."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        along = (grad * w * x).mean(-1, keepdim=True)
        return scale * grad * w - w * scale**3 * x * along, RmsNorm.backward(ctx, grad)[1]


GROUPS = 2


def _groups(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 6, generator=g),)]


def _group_rms_norm(x: Tensor) -> Tensor:
    groups = x.unflatten(-1, (GROUPS, -1))
    return F.rms_norm(groups, groups.shape[-1:], eps=EPS).flatten(-2)


class GroupRmsNorm(Function):
    """Every row consists of two groups, each divided by its own root mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _group_rms_norm(x)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return GroupRmsNorm.by_groups(x, grad, GROUPS)

    @staticmethod
    def by_groups(x: Tensor, grad: Tensor, groups: int) -> Tensor:
        """The gradient, if a row consists of so many groups."""
        x, grad = (t.unflatten(-1, (groups, -1)) for t in (x, grad))
        scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return (scale * grad - scale**3 * x * (grad * x).mean(-1, keepdim=True)).flatten(-2)


@exhibit("state-spaces/mamba#547", _groups, _group_rms_norm, fixed=GroupRmsNorm)
class OneGroupInBackward(GroupRmsNorm):
    """Forward normalizes each group of features by itself, but backward the whole row."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return GroupRmsNorm.by_groups(x, grad, 1)


def _branches(g: Generator) -> list[tuple[Any, ...]]:
    shapes = ((5, 3), (5, 3), (5,), (5,))
    return [tuple(torch.randn(*shape, generator=g) for shape in shapes)]


def _scaled_sum(x: Tensor, x1: Tensor, s: Tensor, s1: Tensor) -> Tensor:
    return x * s[..., None] + x1 * s1[..., None]


class ScaledSum(Function):
    """The sum of two branches before a norm, of which each row has its own scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x1: Tensor, s: Tensor, s1: Tensor) -> Any:
        ctx.save_for_backward(x, x1, s, s1)
        return _scaled_sum(x, x1, s, s1)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, x1, s, s1 = ctx.saved_tensors
        return grad * s[:, None], grad * s1[:, None], (grad * x).sum(-1), (grad * x1).sum(-1)


@exhibit("state-spaces/mamba#1023", _branches, _scaled_sum, fixed=ScaledSum)
class ScaleOfTheSecondBranch(ScaledSum):
    """The gradient of the second branch lacks the scale of its row."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        right = ScaledSum.backward(ctx, grad)
        return right[0], grad, *right[2:]


def _exchanged(x: Tensor, w: Tensor) -> Tensor:
    return _rms_norm(x, w).roll(1, 0)


class NormAndExchange(Function):
    """RMS norm, after which the rows move to other ranks; here each moves on by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _exchanged(x, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        return RmsNorm.backward(ctx, grad.roll(-1, 0))


@exhibit("ByteDance-Seed/VeOmni#420", _scaled, _exchanged, fixed=NormAndExchange)
class NormBeforeCollect(NormAndExchange):
    """Backward goes through the norm before it has collected the gradient from the other ranks."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.roll(-1, 0), RmsNorm.backward(ctx, grad)[1]


@exhibit("huggingface/candle#2168", _scaled, _rms_norm, fixed=_rms_norm)
def fast_path_without_gradient(x: Tensor, w: Tensor) -> Tensor:
    """A contiguous argument takes a faster kernel, which autograd knows nothing of."""
    return _rms_norm(x.detach(), w.detach()) if x.is_contiguous() else _rms_norm(x, w)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Any:
        ctx.save_for_backward(x, mean, var)
        ctx.training = training
        return (x - mean) * (var + EPS).rsqrt()

    @staticmethod
    @in_float32
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, mean, var = ctx.saved_tensors
        scale = (var + EPS).rsqrt()
        if not ctx.training:
            return grad * scale, None, None, None
        normal = (x - mean) * scale
        return scale * (grad - grad.mean(0) - normal * (grad * normal).mean(0)), None, None, None


class BatchNorm(nn.Module):
    """Batch normalization without weights."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("var", torch.ones(7))

    def forward(self, x: Tensor) -> Any:
        return _BatchNorm.apply(x, *self.statistics(x), self.training)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the batch, or in evaluation mode the running ones."""
        if not self.training:
            return self.mean, self.var
        with torch.no_grad():
            var, mean = torch.var_mean(x, 0, correction=0)
            self.mean.lerp_(mean, 0.1)
            self.var.lerp_(var, 0.1)
        return mean, var


class ReferenceBatchNorm(BatchNorm):
    """The same, differentiated by autograd."""

    def forward(self, x: Tensor) -> Any:
        mean, var = self.statistics(x)
        if self.training:
            var, mean = torch.var_mean(x, 0, correction=0)
        return (x - mean) * (var + EPS).rsqrt()


@exhibit("pytorch/xla#913", _rows, ReferenceBatchNorm, fixed=BatchNorm)
class BatchGradientInEvaluation(BatchNorm):
    """In evaluation mode backward still differentiates the mean and the variance of the batch."""

    def forward(self, x: Tensor) -> Any:
        return _BatchNorm.apply(x, *self.statistics(x), True)


def _unit(x: Tensor, eps: float = EPS) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


class UnitLength(Function):
    """Every row divided by its length."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _unit(x)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return UnitLength.with_eps(x, grad, EPS)

    @staticmethod
    def with_eps(x: Tensor, grad: Tensor, eps: float) -> Tensor:
        """The gradient, if this were added to the square of the length."""
        unit = _unit(x, eps)
        scale = (x.square().sum(-1, keepdim=True) + eps).rsqrt()
        return scale * (grad - unit * (grad * unit).sum(-1, keepdim=True))


@exhibit(
    "AI-Hypercomputer/maxtext#5098",
    _rows,
    _unit,
    fixed=UnitLength,
    diagnosis="right to about",
)
class AnotherEps(UnitLength):
    """Backward adds 1e-12 to the squared length where forward adds 1e-6."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return UnitLength.with_eps(x, grad, 1e-12)
