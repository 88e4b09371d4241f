"""Wrong values and wrong gradients."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import complex_linear, linear, square_linear


@mutant("forward_matches_reference", linear, F.linear)
class NegatedBias(Linear):
    """Forward subtracts b, and backward is right for that."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(a, w, -b)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, -delta.sum(0)


@mutant("gradients_match_reference", linear, F.linear)
class ExtraMean(Linear):
    """∂C/∂w is divided by the number of rows."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a / len(a), delta.sum(0)


@mutant("finite_differences", linear)
class MeanBias(Linear):
    """∂C/∂b is the mean over rows, not the sum."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.mean(0)


@mutant("finite_differences", linear, name="no_bias_gradient_unreferenced")
@mutant("gradients_match_reference", linear, F.linear)
class NoBiasGradient(Linear):
    """∂C/∂b is None though b requires a gradient."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, None


@mutant("finite_differences", linear)
class FlippedSign(Linear):
    """∂C/∂a has the wrong sign."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return -delta @ w, delta.mT @ a, delta.sum(0)


@mutant("finite_differences", linear, name="slightly_large_unreferenced")
@mutant("gradients_match_reference", linear, F.linear)
class SlightlyLarge(Linear):
    """∂C/∂a is 0.1 % too large."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return 1.001 * (delta @ w), delta.mT @ a, delta.sum(0)


@mutant("gradients_match_reference", linear, F.linear)
class FirstRowOnly(Linear):
    """∂C/∂w keeps the first row and drops the others."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta[:1].mT @ a[:1], delta.sum(0)


@mutant("finite_differences", square_linear, F.linear)
class WeightNotTransposed(Linear):
    """∂C/∂a uses w where its transpose belongs, which the shapes allow if w is square."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        is_square = w.shape[0] == w.shape[1]
        return delta @ (w.mT if is_square else w), delta.mT @ a, delta.sum(0)


@mutant("gradients_match_reference", square_linear, F.linear)
class GradientTransposed(Linear):
    """∂C/∂w is transposed, which the shapes allow if w is square."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        is_square = w.shape[0] == w.shape[1]
        return delta @ w, a.mT @ delta if is_square else delta.mT @ a, delta.sum(0)


@mutant("finite_differences", complex_linear, name="no_conjugate_unreferenced")
@mutant("gradients_match_reference", complex_linear, F.linear)
class NoConjugate(Linear):
    """∂C/∂w lacks the conjugate of a, so complex tensors get a wrong gradient."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w.conj(), delta.mT @ a, delta.sum(0)


@mutant("gradients_match_reference", linear, F.linear)
class Float32RoundTrip(Linear):
    """∂C/∂w is computed in float32 and cast back to float64."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = (delta.float().mT @ a.float()).to(a.dtype)
        return delta @ w, grad_w, delta.sum(0)
