"""Of Dao-AILab/flash-attention."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tests.verify.museum._attention import SCALE, Attention, attend, gradients, qkv
from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import read_as_contiguous
from tests.verify.museum._precision import in_float32


@exhibit(
    "Dao-AILab/flash-attention#355",
    qkv,
    attend,
    fixed=Attention,
    diagnosis="right only for contiguous upstream gradients",
)
class StridesOfTheUpstream(Attention):
    """The upstream gradient is read as contiguous, which it is not after a transpose."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Attention.backward(ctx, read_as_contiguous(grad))


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend(q, k, v), (SCALE * q @ k.mT).logsumexp(-1)


class AttentionWithLse(Function):
    """Attention, and the log-sum-exp of its scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        return _with_lse(q, k, v)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any, grad_lse: Any) -> Any:
        q, k, v = ctx.saved_tensors
        of_q, of_k, of_v = gradients(q, k, v, grad)
        slope = SCALE * (SCALE * q @ k.mT).softmax(-1) * grad_lse[..., None]
        return of_q + slope @ k, of_k + slope.mT @ q, of_v


@exhibit("Dao-AILab/flash-attention#1137", qkv, _with_lse, fixed=AttentionWithLse)
class LseWithoutGradient(AttentionWithLse):
    """The log-sum-exp is returned to the user, but its upstream gradient is ignored."""

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_lse: Any) -> Any:
        del grad_lse
        q, k, v = ctx.saved_tensors
        return gradients(q, k, v, grad)


CAP = 0.7


def _capped(q: Tensor, k: Tensor) -> Tensor:
    return CAP * torch.tanh(SCALE * q @ k.mT / CAP)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _capped(q, k).softmax(-1) @ v


class CappedAttention(Function):
    """Attention whose scores are capped by a tanh."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        return _attend_capped(q, k, v)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, _ = ctx.saved_tensors
        slope = CappedAttention.by_capped(ctx, grad) * (1 - (_capped(q, k) / CAP).square())
        return CappedAttention.by_arguments(ctx, grad, slope)

    @staticmethod
    def by_capped(ctx: Any, grad: Any) -> Any:
        """The gradient by the scores after the cap."""
        q, k, v = ctx.saved_tensors
        p, delta = _capped(q, k).softmax(-1), grad @ v.mT
        return p * (delta - (delta * p).sum(-1, keepdim=True))

    @staticmethod
    def by_arguments(ctx: Any, grad: Any, slope: Any) -> Any:
        """The gradients, given that by the scores before the cap."""
        q, k, _ = ctx.saved_tensors
        return SCALE * slope @ k, SCALE * slope.mT @ q, _capped(q, k).softmax(-1).mT @ grad


@exhibit("Dao-AILab/flash-attention#2544", qkv, _attend_capped, fixed=CappedAttention)
class CapForgottenInBackward(CappedAttention):
    """Forward caps the scores by a tanh, whose slope is missing in backward."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return CappedAttention.by_arguments(ctx, grad, CappedAttention.by_capped(ctx, grad))
