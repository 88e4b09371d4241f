"""Right Functions that compute in float32 inside and round at the end, as fused kernels do."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPS = 1e-5


class RMSNorm(Function):
    """y = w ⊙ x / √(mean(x²) + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        rstd = (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        ctx.save_for_backward(x, w, rstd)
        return (x.float() * rstd * w.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w, rstd = ctx.saved_tensors
        normed, grad = x.float() * rstd, grad.float()
        scaled = grad * w.float()
        dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), (grad * normed).sum_to_size(w.shape).to(w.dtype)


class AddRMSNorm(Function):
    """The sum s = x + r, rounded, and w ⊙ s / √(mean(s²) + ε): two outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        rstd = (total.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        ctx.save_for_backward(total, w, rstd)
        return total, (total.float() * rstd * w.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, w, rstd = ctx.saved_tensors
        normed, grad = total.float() * rstd, grad.float()
        scaled = grad * w.float()
        through = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        dx = (grad_total.float() + through).to(total.dtype)
        return dx, dx.clone(), (grad * normed).sum_to_size(w.shape).to(w.dtype)


class LayerNorm(Function):
    """Keeps the mean and the reciprocal of the standard deviation in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean = x.float().mean(-1, keepdim=True)
        rstd = ((x.float() - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
        ctx.save_for_backward(x, w, b, mean, rstd)
        return ((x.float() - mean) * rstd * w.float() + b.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w, b, mean, rstd = ctx.saved_tensors
        normed, grad = (x.float() - mean) * rstd, grad.float()
        scaled = grad * w.float()
        along = normed * (scaled * normed).mean(-1, keepdim=True)
        dx = rstd * (scaled - along - scaled.mean(-1, keepdim=True))
        dw, db = (grad * normed).sum_to_size(w.shape), grad.sum_to_size(b.shape)
        return dx.to(x.dtype), dw.to(w.dtype), db.to(b.dtype)


class Softmax(Function):
    """Saves its rounded output, as kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.float().softmax(-1).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        weighted = y.float() * grad.float()
        return (weighted - y.float() * weighted.sum(-1, keepdim=True)).to(y.dtype)


class Sparsemax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ordered = x.float().sort(-1, descending=True).values
        rank = torch.arange(1, x.shape[-1] + 1)
        threshold = ((ordered.cumsum(-1) - 1) / rank).amax(-1, keepdim=True)
        y = (x.float() - threshold).clamp(min=0)
        ctx.save_for_backward(y > 0)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (positive,) = ctx.saved_tensors
        wide = grad.float() * positive
        mean = wide.sum(-1, keepdim=True) / positive.sum(-1, keepdim=True)
        return ((wide - mean) * positive).to(grad.dtype)


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        lse = x.float().logsumexp(-1, keepdim=True)
        ctx.save_for_backward(x, lse)
        return (x.float() - lse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, lse = ctx.saved_tensors
        wide = grad.float()
        return (wide - (x.float() - lse).exp() * wide.sum(-1, keepdim=True)).to(x.dtype)


class SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (t.float() for t in ctx.saved_tensors)
        s, wide = gate.sigmoid(), grad.float()
        d_gate = wide * up * s * (1 + gate * (1 - s))
        return d_gate.to(grad.dtype), (wide * gate * s).to(grad.dtype)


class GELU(Function):
    """x Φ(x), with the error function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].float()
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        pdf = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return (grad.float() * (cdf + x * pdf)).to(grad.dtype)


class L2Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rnorm = (x.float().square().sum(-1, keepdim=True) + EPS).rsqrt()
        y = (x.float() * rnorm).to(x.dtype)
        ctx.save_for_backward(y, rnorm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, rnorm = ctx.saved_tensors
        wide, y_wide = grad.float(), y.float()
        dx = rnorm * (wide - y_wide * (wide * y_wide).sum(-1, keepdim=True))
        return dx.to(y.dtype)


class DynamicTanh(Function):
    """γ tanh(α x) + β, with one α for all: its gradient has one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, gamma, beta)
        return (gamma.float() * (alpha.float() * x.float()).tanh() + beta.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, alpha, gamma, beta = ctx.saved_tensors
        t, wide = (alpha.float() * x.float()).tanh(), grad.float()
        inner = wide * gamma.float() * (1 - t.square())
        found = (alpha.float() * inner, x.float() * inner, wide * t, wide)
        return tuple(
            g.sum_to_size(of.shape).to(of.dtype)
            for g, of in zip(found, (x, alpha, gamma, beta), strict=True)
        )


class CrossEntropy(Function):
    """Finds the gradient in forward, in place of the logits' copy, and scales it in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        wide = logits.float()
        lse = wide.logsumexp(-1, keepdim=True)
        loss = (lse - wide.gather(-1, target[..., None])).mean()
        grad = (wide - lse).exp() - F.one_hot(target, logits.shape[-1])
        ctx.save_for_backward((grad / len(logits)).to(logits.dtype))
        return loss.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad, None


class LinearCrossEntropy(Function):
    """The logits of a few rows at a time; the weight's gradient adds up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        loss, dx, dw = (
            x.new_zeros((), dtype=torch.float32),
            torch.empty_like(x),
            torch.zeros_like(w).float(),
        )
        for rows, labels, into in zip(x.split(8), target.split(8), dx.split(8), strict=True):
            logits = (rows @ w.mT).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            grad = (logits.softmax(-1) - F.one_hot(labels, len(w))).to(x.dtype)
            into.copy_(grad @ w / len(x))
            dw += grad.float().mT @ rows.float()
        ctx.save_for_backward(dx, (dw / len(x)).to(w.dtype))
        return (loss / len(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None


class Attention(Function):
    """Softmax in float32; probabilities and their gradient are rounded before each product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
        out = scores.softmax(-1).to(q.dtype) @ v
        ctx.save_for_backward(q, k, v, out, scores.logsumexp(-1, keepdim=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        p = ((q @ k.mT).float() * scale - lse).exp()
        delta = (out.float() * grad.float()).sum(-1, keepdim=True)
        ds = (p * ((grad @ v.mT).float() - delta) * scale).to(q.dtype)
        return ds @ k, ds.mT @ q, p.to(q.dtype).mT @ grad


class Recurrence(Function):
    """h_t = a_t h_{t-1} + x_t along the first dimension, with a state in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        h, states = torch.zeros_like(x[0], dtype=torch.float32), []
        for now, decay in zip(x.float(), a.float(), strict=True):
            h = decay * h + now
            states.append(h)
        every = torch.stack(states)
        ctx.save_for_backward(a, every)
        return every.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, states = ctx.saved_tensors
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        dh, dx, da = torch.zeros_like(states[0]), torch.empty_like(states), torch.empty_like(states)
        for t in reversed(range(len(a))):
            dh = dh + grad[t].float()
            dx[t], da[t] = dh, dh * before[t]
            dh = dh * a[t].float()
        return dx.to(grad.dtype), da.to(a.dtype)


class Rotary(Function):
    """Rotates the halves of q and k by angles of their row. Its backward rotates back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(position)
        return _rotated(q, position, 1), _rotated(k, position, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None]:
        (position,) = ctx.saved_tensors
        return _rotated(dq, position, -1), _rotated(dk, position, -1), None


def _rotated(x: Tensor, position: Tensor, sign: int) -> Tensor:
    first, second = x.float().chunk(2, -1)
    angle = position[:, None] / 10 ** torch.linspace(0, 3, first.shape[-1], device=x.device)
    cos, sin = angle.cos(), sign * angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Divergence(Function):
    """Σ q (log q - p) for log-probabilities p and probabilities q, one value for each row."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        return (q.float() * (q.float().log() - p.float())).sum(-1).to(p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        p, q = (t.float() for t in ctx.saved_tensors)
        wide = grad.float()[..., None]
        return (-wide * q).to(grad.dtype), (wide * (q.log() - p + 1)).to(grad.dtype)


class Linear(Function):
    """Products of rounded matrices, which add up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.addmm(b, x, w.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.mT @ x, grad.sum(0)


class Embedding(Function):
    """The gradients of equal indices add up in float32."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = w.shape
        return w[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None
