"""The right RMSNorm, which several exhibits spoil."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tests.verify.museum._precision import in_float32


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """x / rms(x) * w, over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


class RmsNorm(Function):
    """x / rms(x) * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return rms_norm(x, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normal, delta = x * scale, grad * w
        slope = scale * (delta - normal * (delta * normal).mean(-1, keepdim=True))
        return slope, (grad * normal).sum(0)
