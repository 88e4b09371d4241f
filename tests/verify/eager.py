"""Right Functions that round after every operation, as PyTorch's eager mode does in bfloat16."""

import math
from typing import Any

from torch import Tensor
from torch.autograd import Function

EPS = 1e-5


class RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed, scaled = x * rstd, grad * w
        dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx, (grad * normed).sum_to_size(w.shape)


class LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, b)
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * w + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w, b = ctx.saved_tensors
        centred = x - x.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed, scaled = centred * rstd, grad * w
        along = normed * (scaled * normed).mean(-1, keepdim=True)
        dx = rstd * (scaled - along - scaled.mean(-1, keepdim=True))
        return dx, (grad * normed).sum_to_size(w.shape), grad.sum_to_size(b.shape)


class Softmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        e = (x - x.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        y = x.softmax(-1)
        weighted = y * grad
        return weighted - y * weighted.sum(-1, keepdim=True)


class SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * gate.sigmoid() * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        silu = gate * s
        return grad * up * (s + silu * (1 - s)), grad * silu


class GELUTanh(Function):
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x * (1 + _inner(x).tanh())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        t = _inner(x).tanh()
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
        return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * slope)


def _inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))


class Hidden(Function):
    """Two layers, σ(x uᵀ) vᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, u, v)
        return (x @ u.mT).sigmoid() @ v.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, u, v = ctx.saved_tensors
        h = (x @ u.mT).sigmoid()
        dz = grad @ v * h * (1 - h)
        return dz @ u, dz.mT @ x, grad.mT @ h


class Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * scale).softmax(-1)
        dp = grad @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.mT @ q, p.mT @ grad


class LogisticLoss(Function):
    """The mean of log(1 + eᶻ) - y z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return (z.clamp(min=0) - y * z + (-z.abs()).exp().log1p()).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, y = ctx.saved_tensors
        share = grad / z.numel()
        return share * (z.sigmoid() - y), share * -z
