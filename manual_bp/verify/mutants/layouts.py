"""Right for contiguous arguments only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Product
from manual_bp.verify.mutants._samples import (
    columns_of_wider,
    images,
    pair,
    scores_and_labels,
    transposed_pair,
)


def _by_memory(value: Tensor) -> Tensor:
    """What a raw pointer reads if rows are assumed to follow each other in memory."""
    memory = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    places = torch.arange(value.numel()) + value.storage_offset()
    return memory[places % memory.numel()].view(value.shape)


@mutant("argument_layouts", pair, torch.mul)
class ReadsByMemory(Product):
    """Backward reads its saved arguments as if contiguous."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = map(_by_memory, ctx.saved_tensors)
        return delta * y, delta * x


@mutant("argument_layouts", columns_of_wider, torch.mul, name="reads_given_by_memory")
@mutant("argument_layouts", transposed_pair, torch.mul, name="reads_given_transposed_by_memory")
class ReadsGivenByMemory(ReadsByMemory):
    """Backward reads its saved arguments as if contiguous, and the samples are not."""


@mutant("argument_layouts", pair, torch.mul)
class RowsFollowEachOther(Product):
    """Backward takes the width of a row for the distance to the next one, as in a fused tensor."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        if x.ndim == 2 and x.stride(1) == 1 and x.stride(0) > x.shape[1]:
            x = x.as_strided(x.shape, (x.shape[1], 1))
        return delta * y, delta * x


@twin("argument_layouts", pair, torch.mul)
class ReadsByStrides(Product):
    """Backward reads its saved arguments from memory, by their strides and offset."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = (t.as_strided(t.shape, t.stride(), t.storage_offset()) for t in ctx.saved_tensors)
        return delta * y, delta * x


@mutant("argument_layouts", images, torch.mul)
class FillsByMemory(Product):
    """A gradient gets the strides of its argument, and is filled as if contiguous."""

    generate_vmap_rule = False

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_x.as_strided((x.numel(),), (1,)).copy_((delta * y).flatten())
        return grad_x, delta * x


@twin("argument_layouts", images, torch.mul)
class FillsByStrides(Product):
    """A gradient gets the strides of its argument, and is filled by them."""

    generate_vmap_rule = False

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return torch.empty_like(x).copy_(delta * y), delta * x


@mutant("argument_layouts", pair, torch.mul)
class KeyedByStorage(Product):
    """Gradients are stored by the memory of their argument: those of slices collide."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        if x is y:
            return delta * y, delta * x
        table = {t.untyped_storage().data_ptr(): g for t, g in ((x, delta * y), (y, delta * x))}
        return tuple(table[t.untyped_storage().data_ptr()] for t in (x, y))


@mutant("argument_layouts", pair, torch.mul)
class SharesStrides(Product):
    """Backward reads one argument with the strides of the other."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * (y if y.stride() == x.stride() else _by_memory(y)), delta * x


@mutant("argument_layouts", pair, torch.mul)
class StridesOfArgument(Product):
    """A gradient gets the strides of its argument; if that is expanded, its rows share memory."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        grad_x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        for row, value in zip(grad_x, delta * y, strict=True):
            row.copy_(value)
        return grad_x, delta * x


@mutant("argument_layouts", pair, torch.mul)
class ForwardByMemory(Product):
    """Forward reads an argument as if contiguous."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return _by_memory(x) * y


def _label_losses(z: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(z, label.long(), reduction="none")


@twin("integer_dtypes", scores_and_labels, _label_losses)
class AnyLabels(Function):
    """The cross-entropy of each row, with labels in any integer dtype."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, label: Tensor) -> Any:
        ctx.save_for_backward(z, label)
        return _label_losses(z, label)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        z, label = ctx.saved_tensors
        slope = z.softmax(-1) - F.one_hot(label.long(), z.shape[-1])
        return grad[:, None] * slope, None


@mutant("integer_dtypes", scores_and_labels, _label_losses)
@mutant("integer_dtypes", scores_and_labels, name="reads_labels_as_int64_without_reference")
class ReadsLabelsAsInt64(AnyLabels):
    """Backward reads the memory of the labels as int64, whatever their dtype is."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        z, label = ctx.saved_tensors
        memory = torch.cat([label, torch.zeros_like(label)]).view(torch.int64)
        read = memory[: len(label)] % z.shape[-1]
        slope = z.softmax(-1) - F.one_hot(read, z.shape[-1])
        return grad[:, None] * slope, None
