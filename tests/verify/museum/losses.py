"""Losses of several projects."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32


def _logits(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 6, generator=g), torch.randint(6, (5,), generator=g))]


class Chunked(Function):
    """The mean loss, whose gradient is made chunk by chunk in forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        chunks = zip(logits.chunk(2), target.chunk(2), strict=True)
        slopes = [part.softmax(-1) - F.one_hot(t, part.shape[-1]) for part, t in chunks]
        ctx.save_for_backward(torch.cat(slopes) / len(target))
        return F.cross_entropy(logits, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


@exhibit(
    "pytorch/torchtitan#3250",
    _logits,
    F.cross_entropy,
    fixed=Chunked,
    diagnosis="upstream gradient is ignored",
)
class UpstreamIgnored(Chunked):
    """Backward returns the gradient made in forward, whatever the upstream gradient is."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        del grad
        return ctx.saved_tensors[0], None


SMOOTHING = 0.1


def _smoothed(logits: Tensor, target: Tensor) -> Tensor:
    log_p, share = logits.log_softmax(-1), SMOOTHING * 6 / 5
    right = log_p.gather(-1, target[:, None])[:, 0]
    return -(1 - share) * right - share * log_p.mean(-1)


class Smoothed(Function):
    """Cross-entropy with smoothed labels, of logits whose halves lie on two ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        ctx.save_for_backward(logits, target)
        return _smoothed(logits, target)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        return Smoothed.of_classes(ctx, grad, 6)

    @staticmethod
    def of_classes(ctx: Any, grad: Any, classes: int) -> Any:
        """The gradient, if there were so many classes."""
        logits, target = ctx.saved_tensors
        share = SMOOTHING * classes / (classes - 1)
        labels = (1 - share) * F.one_hot(target, 6).to(logits.dtype) + share / classes
        return grad[:, None] * (logits.softmax(-1) - labels), None


@exhibit("NVIDIA/Megatron-LM#7464", _logits, _smoothed, fixed=Smoothed)
class SizeOfOneRank(Smoothed):
    """Backward smooths the labels by the number of classes on one rank, not by that of all."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Smoothed.of_classes(ctx, grad, 3)


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the steps: float32, or float64 if the logits have it."""
    return torch.promote_types(dtype, torch.float32)


class InPlaceSteps(Function):
    """Cross-entropy that computes in float32, each step in place of the one before."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        losses = InPlaceSteps.steps(ctx, logits.to(_wide(logits.dtype), copy=True), target)
        return losses.to(logits.dtype)

    @staticmethod
    def steps(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """The losses. The logits are overwritten."""
        logits -= logits.amax(-1, keepdim=True)
        right = logits.gather(-1, target[:, None])[:, 0].clone()
        total = logits.exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(logits / total, target)
        return total[:, 0].log() - right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        p, target = ctx.saved_tensors
        slope = p - F.one_hot(target, p.shape[-1])
        return (grad[:, None] * slope).to(grad.dtype), None


@exhibit("NVIDIA/Megatron-LM#1594", _logits, _losses, fixed=InPlaceSteps)
class NoCopyOfWideLogits(InPlaceSteps):
    """The steps overwrite the logits themselves if a conversion to float32 makes no copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        return InPlaceSteps.steps(ctx, logits.to(_wide(logits.dtype)), target).to(logits.dtype)


def _soft_labels(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.rand(5, 3, generator=g))]


def _soft_losses(logits: Tensor, p: Tensor) -> Tensor:
    return -(p * logits.log_softmax(-1)).sum(-1)


class SoftCrossEntropy(Function):
    """Cross-entropy with soft labels p, which need not sum to 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor) -> Any:
        ctx.save_for_backward(logits, p)
        return _soft_losses(logits, p)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        logits, p = ctx.saved_tensors
        slope = p.sum(-1, keepdim=True) * logits.softmax(-1) - p
        return grad[:, None] * slope, -grad[:, None] * logits.log_softmax(-1)


@exhibit("NVIDIA-NeMo/Automodel#2428", _soft_labels, _soft_losses, fixed=SoftCrossEntropy)
class LabelsTakenToSumToOne(SoftCrossEntropy):
    """Backward is right only for labels that sum to 1, though forward takes others too."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, p = ctx.saved_tensors
        slope = logits.softmax(-1) - p
        return grad[:, None] * slope, SoftCrossEntropy.backward(ctx, grad)[1]


class CrossEntropy(Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        ctx.save_for_backward(logits, target)
        return _losses(logits, target)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        logits, target = ctx.saved_tensors
        slope = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        return grad[:, None] * slope, None


@exhibit(
    "ROCm/TransformerEngine#336",
    _logits,
    _losses,
    fixed=CrossEntropy,
    diagnosis="1/5 of the right one: a mean over 5 where a sum belongs",
)
class MeanOfUnreduced(CrossEntropy):
    """The gradient of a loss for each row is divided by the number of rows, as that of a mean."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return CrossEntropy.backward(ctx, grad / len(grad))


IGNORED = -100


def _some_ignored(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.tensor([2, IGNORED, 0, 1, IGNORED]))]


class MeanWithoutIgnored(Function):
    """The mean loss of the rows whose label is not -100."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        logits, target = ctx.saved_tensors
        counts = target != IGNORED
        labels = F.one_hot(target.clamp(min=0), logits.shape[-1])
        return grad * counts[:, None] * (logits.softmax(-1) - labels) / counts.sum(), None


@exhibit(
    "ROCm/TransformerEngine#409",
    _some_ignored,
    F.cross_entropy,
    fixed=MeanWithoutIgnored,
)
class IgnoredLabelsCounted(MeanWithoutIgnored):
    """Loss and gradient are divided by the number of all rows, those with ignored labels too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Any:
        share = (target != IGNORED).sum() / len(target)
        return MeanWithoutIgnored.forward(ctx, logits, target) * share

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, target = ctx.saved_tensors
        share = (target != IGNORED).sum() / len(target)
        return MeanWithoutIgnored.backward(ctx, grad * share)
