"""Right for contiguous arguments only."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Product
from manual_bp.verify.mutants._samples import pair


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
