"""Of linkedin/Liger-Kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import write
from tests.verify.museum._precision import in_float32
from tests.verify.museum._rms_norm import RmsNorm, rms_norm


def _head(g: Generator) -> list[tuple[Any, ...]]:
    x, w = torch.randn(5, 3, generator=g), torch.randn(4, 3, generator=g)
    return [(x, w, torch.randint(4, (5,), generator=g))]


def _losses(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target, reduction="none")


class LinearCrossEntropy(Function):
    """The loss of each row of x @ w.mT."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor) -> Any:
        ctx.save_for_backward(x, w, target)
        return _losses(x, w, target)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w, target = ctx.saved_tensors
        slope = F.linear(x, w).softmax(-1) - F.one_hot(target, len(w))
        delta = grad[:, None] * slope
        return delta @ w, delta.mT @ x, None


@exhibit("linkedin/Liger-Kernel#1298", _head, _losses, fixed=LinearCrossEntropy)
class FirstUpstreamForAllRows(LinearCrossEntropy):
    """The gradient of a loss per row takes the upstream gradient of the first row for all rows."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return LinearCrossEntropy.backward(ctx, grad[:1].expand(grad.shape))


def _logits(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randint(3, (5,), generator=g))]


class MeanCrossEntropy(Function):
    """The mean loss. Its gradient is made in forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        slope = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        ctx.save_for_backward(slope / len(target))
        return F.cross_entropy(logits, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


@exhibit("linkedin/Liger-Kernel#272", _logits, F.cross_entropy, fixed=MeanCrossEntropy)
class GradientInTheLogits(MeanCrossEntropy):
    """Forward stores the gradient in the memory of the logits, which other layers have saved."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        loss = F.cross_entropy(logits, target)
        slope = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        write(logits, slope / len(target))
        ctx.save_for_backward(logits)
        return loss


@exhibit(
    "liger-kernel 0.8.5, LigerCrossEntropyFunction",
    _logits,
    F.cross_entropy,
    fixed=MeanCrossEntropy,
    diagnosis="contiguous",
)
class CopyWithoutGradient(MeanCrossEntropy):
    """Transposed logits are copied. The copy needs no gradient, so it is returned as one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        loss = MeanCrossEntropy.forward(ctx, logits, target)
        rows = logits if logits.stride(-1) == 1 else logits.contiguous()
        if not rows.requires_grad:
            ctx.save_for_backward(rows)
        return loss


def _distributions(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.rand(5, 3, generator=g), torch.rand(5, 3, generator=g))]


def _variation(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum(-1)


class TotalVariation(Function):
    """Half the sum of |p - q| in each row."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Any:
        ctx.save_for_backward(p, q)
        return _variation(p, q)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        p, q = ctx.saved_tensors
        slope = 0.5 * torch.sign(p - q) * grad[:, None]
        return slope, -slope


NOT_YET = {"no_zero_at_ties"}  # the kit accepts any slope between the one-sided ones


@exhibit("linkedin/Liger-Kernel#1373", _distributions, _variation, fixed=TotalVariation)
class NoZeroAtTies(TotalVariation):
    """Where p = q the slope of the absolute difference is that of q - p; it should be 0 there."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        p, q = ctx.saved_tensors
        slope = torch.where(p > q, 0.5, -0.5).to(p.dtype) * grad[:, None]
        return slope, -slope


def _many_rows(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(1025, 2, generator=g), torch.randn(2, generator=g))]


@exhibit("linkedin/Liger-Kernel#950", _many_rows, rms_norm, fixed=RmsNorm, dtypes=[torch.bfloat16])
class SumInLowPrecision(RmsNorm):
    """The gradient of the weight is summed over the rows in bfloat16, and rounded at each."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        slope, exact = RmsNorm.backward(ctx, grad)
        if grad.dtype.itemsize > 2:
            return slope, exact
        normal = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        total = torch.zeros_like(w)
        for row in grad * normal:
            total += row
        return slope, total
