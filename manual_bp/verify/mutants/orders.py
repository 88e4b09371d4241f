"""Wrong higher derivatives, and wrong forward mode."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Cube, CubeGradient, Linear, Product, Sigmoid, cube
from manual_bp.verify.mutants._samples import elementwise, linear, scale


@mutant("double_backward", linear, F.linear, supports=("double_backward",))
class SavesDetached(Linear):
    """Backward detaches what was saved, so second derivatives lack terms."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.detach() for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("double_backward", elementwise, name="saves_prime_without_reference")
@mutant("double_backward", elementwise, torch.sigmoid, name="saves_prime_undeclared")
@mutant("double_backward", elementwise, torch.sigmoid, supports=("double_backward",))
class SavesPrime(Function):
    """An intermediate of forward is saved, so second derivatives are zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Any:
        a = torch.sigmoid(z)
        ctx.save_for_backward(a * (1 - a))
        return a

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (prime,) = ctx.saved_tensors
        return grad_a * prime


@mutant("double_backward", elementwise, cube, supports=("double_backward",))
class DropsCurvature(Cube):
    """The double backward returns None where a second-order term belongs."""

    class Gradient(CubeGradient):
        """3 x² delta, with this mistake."""

        @staticmethod
        def backward(ctx: Any, v: Any) -> Any:
            x, _ = ctx.saved_tensors
            return None, 3 * x.square() * v

    backward = Cube.backward_by(Gradient)


@mutant("third_order", elementwise, name="drops_third_order_without_reference")
@mutant("third_order", elementwise, cube, supports=("double_backward", "third_order"))
class DropsThirdOrder(Cube):
    """First and second derivatives are right, but the third lacks a term."""

    class Gradient(CubeGradient):
        """3 x² delta, with this mistake."""

        @staticmethod
        def backward(ctx: Any, v: Any) -> Any:
            x, delta = ctx.saved_tensors
            return 6 * x.detach() * delta * v, 3 * x.square() * v

    backward = Cube.backward_by(Gradient)


@mutant("forward_ad", elementwise, name="wrong_jvp_without_reference")
@mutant("forward_ad", elementwise, torch.sigmoid, supports=("double_backward", "forward_ad"))
class WrongJvp(Sigmoid):
    """The jvp multiplies by the sigmoid, not by its derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        Sigmoid.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, dz: Any) -> Any:
        (a,) = ctx.saved_tensors
        return dz * a


@mutant("forward_ad", linear, F.linear, supports=("double_backward", "forward_ad"))
class JvpWithoutBias(Linear):
    """The jvp forgets the tangent of b."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, da: Any, dw: Any, db: Any) -> Any:
        del db
        a, w = ctx.saved_tensors
        return da @ w.mT + a @ dw.mT


@mutant("forward_over_reverse", elementwise, name="wrong_jvp_of_gradient_without_reference")
@mutant(
    "forward_over_reverse",
    elementwise,
    cube,
    supports=("double_backward", "third_order", "forward_ad", "forward_over_reverse"),
)
class WrongJvpOfGradient(Cube):
    """jvp and backward are right, but the jvp of the backward is not."""

    class Gradient(CubeGradient):
        """3 x² delta, with this mistake."""

        @staticmethod
        def jvp(ctx: Any, dx: Any, ddelta: Any) -> Any:
            x, delta = ctx.saved_tensors
            return 3 * x * delta * dx + 3 * x.square() * ddelta

    backward = Cube.backward_by(Gradient)


@twin("double_backward", elementwise, name="right_double_backward")
@twin("third_order", elementwise, name="right_third_order")
@twin("forward_ad", elementwise, name="right_forward_ad")
@twin("forward_over_reverse", elementwise, name="right_forward_over_reverse")
class RightCube(Cube):
    """All derivatives are right, and there is no reference."""

    backward = Cube.backward_by(CubeGradient)


class _SquareTimes(Product):
    """x² s."""

    @staticmethod
    def forward(x: Tensor, s: Tensor) -> Any:
        return x.square() * s


def _square_times(x: Tensor, s: Tensor) -> Tensor:
    return x.square() * s


@mutant("double_backward", scale, _square_times, supports=("double_backward",))
class SlopeForFrozen(_SquareTimes):
    """If only x requires a gradient, forward saves the slope, which is constant in backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        x, s = inputs
        ctx.save_for_backward(x, s, None if ctx.needs_input_grad[1] else 2 * x * s)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, s, slope = ctx.saved_tensors
        if slope is not None:
            return slope * delta, None
        return 2 * x * s * delta, (x.square() * delta).sum(0)


@twin("double_backward", scale, _square_times, supports=("double_backward",))
class SkipsFrozen(_SquareTimes):
    """Backward skips the gradient that is not required."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, s = ctx.saved_tensors
        grad_x = 2 * x * s * delta if ctx.needs_input_grad[0] else None
        grad_s = (x.square() * delta).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_s


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@twin("third_order", elementwise, _layer_norm, supports=("double_backward", "third_order"))
def normalizes_rows(x: Tensor) -> Tensor:
    """Layer normalization, whose third derivative is right where that of PyTorch's is wrong."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(x.dtype)
