"""Wrong at large values, where functions saturate and exponentials overflow."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Relu
from manual_bp.verify.mutants._samples import elementwise


@mutant("large_values", elementwise, torch.sigmoid, name="flat_beyond_15")
class FlatBeyond15(Relu):
    """The derivative of the sigmoid is set to zero for |z| > 15."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        a = torch.sigmoid(z)
        return torch.where(z.abs() > 15, 0, grad_a * a * (1 - a))


@mutant("large_values", elementwise, torch.sigmoid)
class OverflowingPrime(Relu):
    """The derivative of the sigmoid is a ratio of exponentials: NaN if z is large and negative."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        e = torch.exp(-z)
        return grad_a * e / (1 + e) ** 2


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


@mutant("large_values", elementwise, _softplus)
class OverflowingSoftplus(Relu):
    """Softplus takes the exponential first and overflows."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.log1p(torch.exp(z))

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * torch.sigmoid(z)


class _LogSigmoid(Relu):
    """log σ(z)."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return F.logsigmoid(z)


@mutant("no_nan", elementwise)
class NanFarOut(_LogSigmoid):
    """The derivative is a ratio of exponentials: nan if z is large, and there is no reference."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        e = torch.exp(-z)
        return grad_a * e / (1 + e)


@twin("no_nan", elementwise)
class NumbersFarOut(_LogSigmoid):
    """The derivative is a sigmoid."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * torch.sigmoid(-z)


class _Softplus(Relu):
    """log(1 + exp(z))."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return _softplus(z)

    @staticmethod
    def slope(z: Tensor, cut: float) -> Tensor:
        """The derivative, taken to be 1 from a value on."""
        return torch.where(z > cut, 1, torch.sigmoid(z))


@twin("slopes_far_out", elementwise)
class CutAt37(_Softplus):
    """The derivative of softplus is taken to be 1 from 37 on, as it is to all digits of float64."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * _Softplus.slope(z, 37.0)


@mutant("slopes_far_out", elementwise)
class CutAt8(_Softplus):
    """The derivative of softplus is taken to be 1 from 8 on, and there is no reference."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * _Softplus.slope(z, 8.0)
