"""Wrong at special values."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Relu
from manual_bp.verify.mutants._samples import elementwise


@mutant("at_zero", elementwise, torch.relu)
class ReluOneAtZero(Relu):
    """The derivative of ReLU at 0 is 1, where PyTorch has 0."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z >= 0, grad_a, 0)


@twin("at_zero", elementwise, torch.relu)
class ReluByOutput(Relu):
    """ReLU saves its output and asks where that is positive."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.save_for_backward(output)


@mutant("at_zero", elementwise, torch.abs)
class AbsoluteOneAtZero(Relu):
    """The derivative of the absolute value at 0 is 1, where PyTorch has 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.abs()

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z >= 0, grad_a, -grad_a)


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


@mutant("infinite_values", elementwise, torch.relu, supports=("infinite_values",))
class ReluByProduct(Relu):
    """ReLU multiplies z by a mask: NaN at minus infinity."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z * (z > 0)


@mutant("infinite_values", elementwise, torch.tanh, supports=("infinite_values",))
class TanhByProduct(Relu):
    """The gradient of tanh adds 0 * z: NaN at infinity."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * (1 - torch.tanh(z) ** 2) + 0 * z
