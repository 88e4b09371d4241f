"""Wrong higher derivatives, and wrong forward mode."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Cube, CubeGradient, Linear, Sigmoid, cube
from manual_bp.verify.mutants._samples import elementwise, linear


@mutant("double_backward", linear, F.linear, supports=("double_backward",))
class SavesDetached(Linear):
    """Backward detaches what was saved, so second derivatives lack terms."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.detach() for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


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
