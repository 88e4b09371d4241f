"""Wrong batch rules."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Product
from manual_bp.verify.mutants._samples import elementwise, scale


@mutant("vmap", elementwise, lambda x: x - x.mean(), supports=("vmap",), in_dims=(0,))
class VmapOverEverything(Function):
    """The batch rule takes the mean over the batch as well."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x - x.mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        del ctx
        return delta - delta.mean()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info
        apply: Any = VmapOverEverything.apply
        return apply(x), in_dims[0]


@mutant("vmap", elementwise, lambda x: x.cumsum(0), supports=("vmap",), in_dims=(0,))
class VmapAlongBatch(Function):
    """The batch rule sums along the batch, not along each sample."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.cumsum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        del ctx
        return delta.flip(0).cumsum(0).flip(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info
        apply: Any = VmapAlongBatch.apply
        return apply(x), in_dims[0]


class _ScaleGradient(Function):
    """Σ delta a, whose batch rule sums over the batch as well."""

    @staticmethod
    def forward(delta: Tensor, a: Tensor) -> Any:
        return (delta * a).flatten(0, -2).sum(0) if a.ndim > 1 else delta * a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        delta, a = ctx.saved_tensors
        return v * a, v * delta

    @staticmethod
    def vmap(info: Any, in_dims: Any, delta: Tensor, a: Tensor) -> Any:
        delta, a = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((delta, a), in_dims, strict=True)
        )
        apply: Any = _ScaleGradient.apply
        return apply(delta, a), None


@mutant(
    "per_sample_gradients",
    scale,
    torch.mul,
    supports=("vmap", "per_sample_gradients"),
    in_dims=(0, None),
)
class SharedWeightGradient(Product):
    """Under vmap every sample gets the weight gradient of the whole batch."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        apply: Any = _ScaleGradient.apply
        return delta * w, apply(delta, a)
