"""Attention with a hand-written backward, from which the wrong ones inherit."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._precision import in_float32

SCALE = 0.5


def qkv(g: Generator) -> list[tuple[Any, ...]]:
    """Queries, keys and values of two heads."""
    return [
        (
            torch.randn(2, 5, 3, generator=g),
            torch.randn(2, 6, 3, generator=g),
            torch.randn(2, 6, 4, generator=g),
        )
    ]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference."""
    return (SCALE * q @ k.mT).softmax(-1) @ v


class Attention(Function):
    """softmax(q kᵀ / 2) v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v = ctx.saved_tensors
        return gradients(q, k, v, grad)


def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None = None) -> Any:
    """The gradients of attention, where mask tells the scores that are left out."""
    scores = SCALE * q @ k.mT
    p = (scores if mask is None else scores.masked_fill(mask, -torch.inf)).softmax(-1)
    slope = softmax_gradient(p, grad @ v.mT)
    return SCALE * slope @ k, SCALE * slope.mT @ q, p.mT @ grad


def softmax_gradient(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient by the scores, from the probabilities and the gradient by them."""
    return grad * p - p * (grad * p).sum(-1, keepdim=True)
