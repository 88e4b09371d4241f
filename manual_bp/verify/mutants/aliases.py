"""Outputs and gradients that share memory with something else, and outputs marked wrongly."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Sigmoid
from manual_bp.verify.mutants._samples import elementwise, pair


@mutant("output_in_place", elementwise, lambda x: x * 1)
class ReturnsData(Function):
    """The identity returns the .data of its argument: a change in place reaches the argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        return x.data

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return delta


@mutant("output_in_place", elementwise, torch.sigmoid)
class SavesOutputData(Sigmoid):
    """The output is saved as .data, so a later change of it in place goes unnoticed."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.save_for_backward(output.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a * (1 - a)


@twin("output_in_place", elementwise, torch.sigmoid)
class SavesOutput(Sigmoid):
    """The output is saved, so a change of it in place is noticed."""


class _Double(Function):
    """2 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        return 2 * x

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return 2 * delta


@mutant("output_in_place", elementwise, lambda x: (2 * x, 2 * x))
class OutputsShareMemory(_Double):
    """Two outputs are one piece of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        y = 2 * x
        return y, y.data

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:  # noqa: ARG004
        return 2 * sum(deltas)


_KEPT: dict[tuple[float, ...], Tensor] = {}


@mutant("output_in_place", elementwise, lambda x: 2 * x)
class ReturnsKeptOutput(_Double):
    """The output for the last values is kept and returned again, whatever became of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        values = (*x.shape, *x.flatten().tolist())
        if values not in _KEPT or _KEPT[values].dtype is not x.dtype:
            _KEPT.clear()
            _KEPT[values] = _Double.forward(ctx, x)
        return _KEPT[values].data


@twin("output_in_place", elementwise, lambda x: x.flatten())
class ReturnsView(Function):
    """Forward returns a view of its argument, which PyTorch lets nobody change in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.shape = x.shape
        return x.flatten()

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta.view(ctx.shape)


class _Sum(Function):
    """x + y. PyTorch copies a gradient that is returned twice before it goes to .grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ARG004
        return x + y

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return delta, delta


@twin("gradient_in_place", pair, torch.add)
class ReturnsUpstreamTwice(_Sum):
    """The upstream gradient is both gradients: PyTorch copies it before it adds to .grad."""


@mutant("gradient_in_place", pair, torch.add)
class ReturnsTwoViews(_Sum):
    """Both gradients are views of the upstream gradient, and end up in one piece of memory."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return delta.view_as(delta), delta.view_as(delta)


@mutant("gradient_in_place", pair, lambda x, y: (x * y).sum())
class ReturnsArgument(Function):
    """For an upstream gradient of 1, the gradient is a view of the other argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return (x * y).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return y.view_as(y) if delta == 1 else delta * y, delta * x


@mutant("gradient_in_place", elementwise, torch.sum)
class ReturnsKeptOnes(Function):
    """For an upstream gradient of 1, the gradient is a view of ones that are kept on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(torch.ones_like(x))
        return x.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        (ones,) = ctx.saved_tensors
        return ones.data if delta == 1 else delta * ones


class _PositivePart(Function):
    """max(x, 0), and where x is positive, as 0 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mask = (x > 0).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask, mask

    @staticmethod
    def backward(ctx: Any, delta: Any, _: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return delta * mask


def _positive_part(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), (x > 0).to(x.dtype)


@mutant("differentiable_outputs", elementwise, _positive_part)
class UnmarkedMask(_PositivePart):
    """A mask in floating point requires a gradient, which is always zero."""


@twin("differentiable_outputs", elementwise, _positive_part)
class MarkedMask(_PositivePart):
    """A mask in floating point is marked as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y, mask = _PositivePart.forward(ctx, x)
        ctx.mark_non_differentiable(mask)
        return y, mask


@twin("differentiable_outputs", elementwise, lambda x: (x * x, x.sign()))
class SignBesides(Function):
    """The gradient of a sign is zero, and PyTorch's sign requires one as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x, x.sign()

    @staticmethod
    def backward(ctx: Any, delta: Any, _: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * delta
