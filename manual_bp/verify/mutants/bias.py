"""Errors as small as the rounding of half precision that do not average out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._samples import elementwise, long_rows


@twin("unbiased", elementwise, torch.tanh, dtypes=(torch.bfloat16,))
class TanhInBfloat16(Function):
    """The gradient is rounded once, at the end."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.tanh(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        return _tanh_slope(ctx, grad_a).to(grad_a.dtype)


def _tanh_slope(ctx: Any, grad_a: Tensor) -> Tensor:
    (z,) = ctx.saved_tensors
    return grad_a * (1 - torch.tanh(z.float()).square())


@mutant("unbiased", elementwise, torch.tanh, dtypes=(torch.bfloat16,))
class OnePercentInBfloat16(TanhInBfloat16):
    """The gradient is 1 % too large, as much as the rounding of bfloat16."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        return (1.01 * _tanh_slope(ctx, grad_a)).to(grad_a.dtype)


@mutant("unbiased", elementwise, torch.tanh, dtypes=(torch.bfloat16,))
class OffsetInBfloat16(TanhInBfloat16):
    """2^-9 of the largest element is added to all, as much as the rounding of bfloat16."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        slope = _tanh_slope(ctx, grad_a)
        largest = slope.abs().max() if slope.numel() else 0
        return (slope + 2**-9 * largest).to(grad_a.dtype)


def _normalized(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype)


@twin("unbiased", long_rows, _normalized, dtypes=(torch.bfloat16,))
class RmsInFloat32(Function):
    """1 / rms of each row is saved in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return _normalized(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        scale = (inputs[0].float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        ctx.save_for_backward(*inputs, scale)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, scale = ctx.saved_tensors
        normal = x * scale
        along = (grad * normal).mean(-1, keepdim=True)
        return (scale * (grad - normal * along)).to(x.dtype)


@mutant("unbiased", long_rows, _normalized, dtypes=(torch.bfloat16,))
class RmsInBfloat16(RmsInFloat32):
    """1 / rms of each row is saved in bfloat16, so whole rows of the gradient are off."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        RmsInFloat32.setup_context(ctx, inputs, output)
        x, scale = ctx.to_save
        ctx.save_for_backward(x, scale.to(x.dtype).float())
