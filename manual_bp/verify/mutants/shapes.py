"""Wrong for some shapes, or in the shape of a gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import linear, stacked_linear


@mutant("no_rows", linear, F.linear, supports=("no_rows",), in_dims=(0, None, None))
class StacksRows(Linear):
    """Forward stacks its rows, which fails when there are none."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return torch.stack([F.linear(row, w, b) for row in a])


@mutant("no_rows", linear, F.linear, supports=("no_rows",), in_dims=(0, None, None))
class MeanTimesCount(Linear):
    """∂C/∂b is the mean times the number of rows: NaN for no rows."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.mean(0) * len(delta)


@mutant("one_row", linear, F.linear, supports=("one_row",), in_dims=(0, None, None))
class Squeezes(Linear):
    """∂C/∂b is summed from a squeezed upstream gradient, which loses a single row."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.squeeze().sum(0)


@mutant("one_row", linear, F.linear, supports=("one_row",), in_dims=(0, None, None))
class CorrectsForOneRow(Linear):
    """∂C/∂w has a stray factor (n - 1) / max(n - 1, 1), which is zero for one row."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        others = len(delta) - 1
        return delta @ w, delta.mT @ a * others / max(others, 1), delta.sum(0)


@mutant("one_dimensional", linear, F.linear, supports=("one_dimensional",), in_dims=(0, None, None))
class SumsOneSample(Linear):
    """∂C/∂b of one sample without a batch dimension is summed over its components."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = torch.outer(delta, a) if delta.ndim == 1 else delta.mT @ a
        return delta @ w, grad_w, delta.sum(0).expand(len(w))


@mutant("one_dimensional", linear, F.linear, supports=("one_dimensional",), in_dims=(0, None, None))
class NoOneDimensional(Linear):
    """Backward fails on one sample without a batch dimension."""


@mutant(
    "three_dimensional", linear, F.linear, supports=("three_dimensional",), in_dims=(0, None, None)
)
class FirstOfStack(Linear):
    """∂C/∂w of a three-dimensional input is that of the first matrix, not the sum."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        return (
            delta @ w,
            grad_w if grad_w.ndim == 2 else grad_w[0],
            delta.flatten(0, -2).sum(0),
        )


@mutant("raw_backward", stacked_linear, F.linear, supports=("three_dimensional",))
class LeadingKept(Linear):
    """∂C/∂w and ∂C/∂b keep the leading dimension; the autograd engine sums it away."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(-2)


@mutant("raw_backward", linear, F.linear)
class UnsummedBias(Linear):
    """∂C/∂b is not summed over the rows; the autograd engine does it."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta


@mutant("raw_backward", linear, F.linear)
class ReturnsFloat32(Linear):
    """∂C/∂a is returned in float32 for a float64 input."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return (delta @ w).float(), delta.mT @ a, delta.sum(0)


@mutant("sizes", linear, F.linear, in_dims=(0, None, None))
class DropsTheRemainder(Linear):
    """∂C/∂b sums blocks of 128 rows, and drops the rows that fill no block."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        rows = len(delta) if len(delta) < 128 else len(delta) // 128 * 128
        return delta @ w, delta.mT @ a, delta[:rows].sum(0)


@mutant("sizes", linear, F.linear, in_dims=(0, None, None), varying=[(1, 1, None)])
class DropsColumns(Linear):
    """∂C/∂a is filled in blocks of 16 columns; the columns that fill no block stay zero."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        columns = a.shape[1] if a.shape[1] < 16 else a.shape[1] // 16 * 16
        grad_a = torch.zeros_like(a)
        grad_a[:, :columns] = delta @ w[:, :columns]
        return grad_a, delta.mT @ a, delta.sum(0)
