"""Wrong at special values."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Product, Relu
from manual_bp.verify.mutants._samples import elementwise, pair, scores_and_labels, with_zeros


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


@mutant("special_values", elementwise, nn.functional.relu6, special={0: [6]})
class Relu6OneAtSix(Relu):
    """The derivative of ReLU6 at 6 is 1, where PyTorch has 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp(0, 6)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where((z > 0) & (z <= 6), grad_a, 0)


@twin("special_values", elementwise, nn.functional.relu6, special={0: [6]})
class Relu6(Relu6OneAtSix):
    """ReLU6 with PyTorch's derivative at 6."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where((z > 0) & (z < 6), grad_a, 0)


@mutant("special_values", scores_and_labels, nn.functional.cross_entropy, special={1: [-100]})
class CountsIgnoredLabels(Function):
    """The mean of the cross-entropy is over all rows, those with the ignored label -100 too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, label: Tensor) -> Any:
        kept = label != -100
        delta = z.softmax(-1)
        delta[torch.arange(len(z)), label * kept] -= 1
        ctx.save_for_backward(delta * kept[:, None])
        return nn.functional.cross_entropy(z, label)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (delta,) = ctx.saved_tensors
        return grad * delta / len(delta), None


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


@mutant("at_zero", elementwise)
class SteepAtZero(Relu):
    """The derivative of ReLU at 0 is 2, and there is no reference."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, grad_a, 0) + torch.where(z == 0, 2 * grad_a, 0)


@twin("at_zero", elementwise)
class HalfAtZero(Relu):
    """The derivative of ReLU at 0 is 1/2, which is between 0 and 1, and there is no reference."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * torch.heaviside(z, z.new_tensor(0.5))


class _RowMaximum(Relu):
    """The largest element of each row."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.amax(-1)


def _row_maximum(z: Tensor) -> Tensor:
    return z.amax(-1)


@mutant("at_ties", elementwise, name="maximum_for_each_without_reference")
@mutant("at_ties", elementwise, _row_maximum)
class MaximumForEach(_RowMaximum):
    """Each of several largest elements gets the whole gradient of the maximum."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z == z.amax(-1, keepdim=True), delta.unsqueeze(-1), 0)


@twin("at_ties", elementwise, name="maximum_for_first_without_reference")
@twin("at_ties", elementwise, _row_maximum)
class MaximumForFirst(_RowMaximum):
    """The first of several largest elements gets the gradient; with PyTorch they share it."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), delta.unsqueeze(-1))


@mutant("at_ties", pair, torch.maximum)
class BothIfEqual(Product):
    """Of two equal arguments, each gets the whole gradient of the larger one."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return torch.maximum(x, y)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return torch.where(x >= y, delta, 0), torch.where(y >= x, delta, 0)


@mutant("no_nan", with_zeros)
class NanAtZero(Relu):
    """The derivative of the absolute value is z / |z|, which is nan at 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.abs()

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * z / z.abs()


@twin("no_nan", with_zeros)
class SignAtZero(NanAtZero):
    """The derivative of the absolute value is the sign."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * z.sign()


@mutant("small_values", elementwise, torch.abs)
class AbsoluteByRoot(Relu):
    """The derivative of the absolute value is z / √z², whose square underflows; it is 0 at 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.abs()

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z == 0, 0, grad_a * z / z.square().sqrt())


@mutant("small_values", elementwise, torch.sinh)
class LinearIfSmall(Relu):
    """sinh(z) is z where |z| < 0.002, and its derivative 1, which is right to five digits."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.where(z.abs() < 2e-3, z, torch.sinh(z))

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * torch.where(z.abs() < 2e-3, 1, torch.cosh(z))


@twin("small_values", elementwise, torch.sinh)
class SeriesIfSmall(Relu):
    """sinh(z) is a series where |z| < 0.002, to all digits."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.where(z.abs() < 2e-3, z + z**3 / 6 + z**5 / 120, torch.sinh(z))

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        series = 1 + z.square() / 2 + z**4 / 24
        return grad_a * torch.where(z.abs() < 2e-3, series, torch.cosh(z))


@twin("small_values", elementwise, torch.nn.functional.hardtanh)
class HardtanhOneAtBounds(Relu):
    """The derivative of hardtanh at its bounds is 1, where PyTorch has 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z.abs() <= 1, grad_a, 0)
