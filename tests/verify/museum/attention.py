"""Attention of other projects."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._attention import SCALE, gradients, qkv, softmax_gradient
from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32


def _sometimes_causal(g: Generator) -> list[tuple[Any, ...]]:
    return [(*qkv(g)[0], True), (*qkv(g)[0], False)]


def _upper(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = SCALE * q @ k.mT
    return (scores.masked_fill(_upper(q, k), -torch.inf) if causal else scores).softmax(-1) @ v


class CausalOrNot(Function):
    """Attention, causal if asked for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return _attend(q, k, v, causal)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v = ctx.saved_tensors
        return *gradients(q, k, v, grad, _upper(q, k) if ctx.causal else None), None


@exhibit("triton-lang/triton#4541", _sometimes_causal, _attend, fixed=CausalOrNot)
class AlwaysCausalInBackward(CausalOrNot):
    """Backward masks the future although forward was asked not to."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v = ctx.saved_tensors
        return *gradients(q, k, v, grad, _upper(q, k)), None


def _padded(g: Generator) -> list[tuple[Any, ...]]:
    return [(*qkv(g)[0], 4)]


def _padding(k: Tensor, length: int) -> Tensor:
    return torch.arange(k.shape[-2], device=k.device) >= length


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    scores = (SCALE * q @ k.mT).masked_fill(_padding(k, length), -torch.inf)
    return scores.softmax(-1) @ v


class PaddedAttention(Function):
    """Attention to the first keys of a block; the others are padding."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, length: int) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.length = length
        return _attend_padded(q, k, v, length)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v = ctx.saved_tensors
        return *gradients(q, k, v, grad, _padding(k, ctx.length)), None


@exhibit("hao-ai-lab/FastVideo#925", _padded, _attend_padded, fixed=PaddedAttention)
class PaddingCountsInBackward(PaddedAttention):
    """Backward takes a wrong block size for its mask, and counts the padding as keys."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v = ctx.saved_tensors
        scores = SCALE * q @ k.mT
        valid = scores.masked_fill(_padding(k, ctx.length), -torch.inf)
        p, delta = (scores - valid.logsumexp(-1, keepdim=True)).exp(), grad @ v.mT
        slope = p * (delta - (delta * valid.softmax(-1)).sum(-1, keepdim=True))
        return SCALE * slope @ k, SCALE * slope.mT @ q, p.mT @ grad, None


KEY_HEADS = 2


def _grouped(g: Generator) -> list[tuple[Any, ...]]:
    shapes = ((6, 4, 3), (KEY_HEADS, 5, 3), (KEY_HEADS, 5, 7))
    return [tuple(torch.randn(*shape, generator=g) for shape in shapes)]


def _interleaved(t: Tensor, heads: int) -> Tensor:
    return t[torch.arange(heads) % KEY_HEADS]


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = _interleaved(k, len(q)), _interleaved(v, len(q))
    return (SCALE * q @ k.mT).softmax(-1) @ v


class GroupedAttention(Function):
    """Attention whose query heads take turns at the key heads: head h looks at h modulo 2."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        return _attend_grouped(q, k, v)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        return GroupedAttention.collected(ctx, grad, KEY_HEADS)

    @staticmethod
    def collected(ctx: Any, grad: Any, modulus: int) -> Any:
        """The gradients, where those of k and v go to the key head h modulo this."""
        q, k, v = ctx.saved_tensors
        spread = _interleaved(k, len(q)), _interleaved(v, len(q))
        of_q, *others = gradients(q, *spread, grad)
        head = torch.arange(len(q)) % modulus
        sums = [t.new_zeros(modulus, *t.shape[1:]).index_add(0, head, t) for t in others]
        return of_q, *[t[:KEY_HEADS] for t in sums]


@exhibit(
    "XunhaoLai/native-sparse-attention-triton#27",
    _grouped,
    _attend_grouped,
    fixed=GroupedAttention,
)
class WrongKeyHead(GroupedAttention):
    """The gradient of a key head is collected from the wrong query heads."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, _, _ = ctx.saved_tensors
        return GroupedAttention.collected(ctx, grad, len(q) // KEY_HEADS)


def _scores(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 5, 3, generator=g), torch.randn(2, generator=g))]


def _all_shares(scores: Tensor, sink: Tensor) -> Tensor:
    column = sink[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)


def _softmax_with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    return _all_shares(scores, sink)[..., :-1]


class SoftmaxWithSink(Function):
    """Probabilities of the keys, of which a learned sink for each head takes a share."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sink: Tensor) -> Any:
        ctx.save_for_backward(scores, sink)
        return _softmax_with_sink(scores, sink)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        shares = _all_shares(*ctx.saved_tensors)
        slope = softmax_gradient(shares, F.pad(grad, (0, 1)))
        return slope[..., :-1], slope[..., -1].sum(-1)


@exhibit("NVIDIA/cudnn-frontend#421", _scores, _softmax_with_sink, fixed=SoftmaxWithSink)
class SinkForgottenInBackward(SoftmaxWithSink):
    """Backward computes the probabilities without the sink, and gives the sink a gradient of 0."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        scores, sink = ctx.saved_tensors
        return softmax_gradient(scores.softmax(-1), grad), torch.zeros_like(sink)
