"""Of unslothai/unsloth and unslothai/unsloth-zoo."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import read_as_contiguous, write
from tests.verify.museum._precision import in_float32
from tests.verify.museum._rms_norm import RmsNorm, rms_norm


def _scaled(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(3, generator=g))]


@exhibit("unslothai/unsloth#4533", _scaled, rms_norm, fixed=RmsNorm)
class WeightWithoutGradient(RmsNorm):
    """The backward of a norm returns None for its weight, which therefore never learns."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return RmsNorm.backward(ctx, grad)[0], None


@exhibit("unslothai/unsloth#10617", _scaled, rms_norm, fixed=RmsNorm, diagnosis="upstream gradient")
class UpstreamTakenAsContiguous(RmsNorm):
    """The kernel ignores the strides of the upstream gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return RmsNorm.backward(ctx, read_as_contiguous(grad))


def _logits(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randint(3, (5,), generator=g))]


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


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


@exhibit("unslothai/unsloth#5002", _logits, _losses, fixed=CrossEntropy)
class GradientInTheSavedLogits(CrossEntropy):
    """Backward writes the gradient into the saved logits; a second backward reads it as logits."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, _ = ctx.saved_tensors
        write(logits, CrossEntropy.backward(ctx, grad)[0])
        return logits, None


def _queries(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 6, generator=g),)]


def _rotate(q: Tensor, sign: int = 1) -> Tensor:
    angle = torch.arange(len(q), dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1, 0.01]).to(q)
    first, second = q.chunk(2, -1)
    cos, sin = angle.cos(), sign * angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Rope(Function):
    """Rotary position embedding."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Any:
        del ctx
        return _rotate(q)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        del ctx
        return _rotate(grad, -1)


@exhibit("unslothai/unsloth#5001", _queries, _rotate, fixed=Rope)
class QueriesRotatedInPlace(Rope):
    """Forward writes the rotated queries over its argument, which others may have saved."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Any:
        del ctx
        write(q, _rotate(q))
        return q.clone()


def _hidden(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(4, 3, generator=g))]


def _log_softmax(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).log_softmax(-1)


class Recomputed(Function):
    """log_softmax(x @ w.mT), which backward computes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _log_softmax(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(_log_softmax(x, w), (x, w), grad)


@exhibit(
    "unslothai/unsloth-zoo#892",
    _hidden,
    _log_softmax,
    fixed=Recomputed,
    diagnosis="kept in one place for all calls",
)
class BackwardIntoGrad(Recomputed):
    """Backward adds to .grad of the weight itself, and then returns that, so it counts twice."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved, w = ctx.saved_tensors
        x = saved.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(_log_softmax(x, w), grad)
        return x.grad, w.grad


def _experts(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), 0.1 + torch.rand(5, generator=g))]


def _weighted(hidden: Tensor, gate: Tensor) -> Tensor:
    return hidden * gate[..., None]


class GateGradient(Function):
    """The hidden states as they are; backward finds the gate's gradient, divided by the gate."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor) -> Any:
        ctx.save_for_backward(hidden, gate)
        return hidden.clone()

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        hidden, gate = ctx.saved_tensors
        return grad, (grad * hidden).sum(-1) / gate


@exhibit(
    "unslothai/unsloth-zoo#858",
    _experts,
    _weighted,
    fixed=_weighted,
    diagnosis="a term of order 2 is missing",
)
def gate_detached(hidden: Tensor, gate: Tensor) -> Any:
    """The gate is detached where it multiplies, so the gradient does not depend on it."""
    return _weighted(GateGradient.apply(hidden, gate), gate.detach())
