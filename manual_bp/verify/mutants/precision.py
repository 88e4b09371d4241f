"""Wrong in lower precision or under autocast."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear, Product, Sigmoid
from manual_bp.verify.mutants._samples import elementwise, far, linear, scale, uneven


@mutant("float32", elementwise, torch.sigmoid, supports=("float32",))
class PromotesFloat32(Sigmoid):
    """A constant in float64 turns a float32 output into float64."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        one = torch.ones(z.shape[-1], dtype=torch.float64, device=z.device)
        return one / (1 + torch.exp(-z))


@mutant("float32", linear, F.linear, supports=("float32",))
class OnlyFloat64(Linear):
    """Backward casts one operand to float64 and fails for float32."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w.double(), delta.mT @ a, delta.sum(0)


@mutant("bfloat16", uneven, lambda x: x.sum(0), supports=("float32", "bfloat16"))
class AddsRowByRow(Function):
    """Rows are added one by one in bfloat16, where small ones are lost to rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        total = torch.zeros_like(x[0])
        for row in x:
            total = total + row
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta.expand(ctx.shape)


@mutant(
    "sizes", scale, lambda x, s: x * s, in_dims=(0, None), dtypes=(torch.float32, torch.bfloat16)
)
class SumInBfloat16(Product):
    """The gradient of a factor sums rows one by one in bfloat16, where small ones are lost."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        total = torch.zeros_like(y)
        for row in delta * x:
            total = total + row
        return delta * y, total


@mutant("float16", far, lambda x: x.square().mean(), supports=("float32", "float16"))
class SumsThenDivides(Function):
    """The mean is a sum that is divided at the end, and the sum overflows float16."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.square().sum() / x.numel()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return delta * 2 * (x / x.numel())


@mutant("autocast", linear, F.linear, supports=("float32", "autocast"))
class FailsOutsideAutocast(Linear):
    """Autocast casts forward only, so backward, outside the region, meets two dtypes."""


@mutant("autocast", linear, F.linear, supports=("float32", "autocast"))
class GradientInUpstreamDtype(Linear):
    """Under autocast, gradients of float32 inputs are returned in bfloat16."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.to(delta.dtype) for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("autocast", linear, F.linear, supports=("float32", "autocast"))
class AlwaysFloat16(Linear):
    """The output is float16 under autocast, whatever dtype the region asks for."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        z = F.linear(a, w, b)
        return z.half() if torch.is_autocast_enabled(a.device.type) else z

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = delta.to(a.dtype)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("full_precision", linear, F.linear)
class SavesFloat32(Linear):
    """What backward needs is saved in float32."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        ctx.save_for_backward(a.float(), w.float())

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.to(delta.dtype) for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("full_precision", elementwise)
class SigmoidInFloat32(Sigmoid):
    """The sigmoid is computed in float32, and there is no reference."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z.float()).to(z.dtype)


def _gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_slope(z: Tensor, factor: float) -> Tensor:
    """The derivative of `_gelu`, for sqrt(2 / pi) as the factor."""
    tanh = torch.tanh(factor * (z + 0.044715 * z**3))
    return (1 + tanh) / 2 + z * (1 - tanh.square()) / 2 * factor * (1 + 3 * 0.044715 * z.square())


class _Gelu(Sigmoid):
    """GELU by the hyperbolic tangent."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return _gelu(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)


@mutant("gradients_match_reference", elementwise, _gelu)
class SevenDigits(_Gelu):
    """A constant of the derivative is given with seven digits."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * _gelu_slope(z, 0.7978845)


@twin("gradients_match_reference", elementwise, _gelu, name="all_digits")
@twin("full_precision", elementwise, name="all_digits_without_reference")
class AllDigits(_Gelu):
    """The constant is given with all digits."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return (grad_a * _gelu_slope(wide, math.sqrt(2 / math.pi))).to(z.dtype)
