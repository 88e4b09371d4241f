"""Wrong batch rules."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant, twin
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


class _Cumsum(Function):
    """The cumulative sum of a row."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.cumsum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        del ctx
        return delta.flip(-1).cumsum(-1).flip(-1)


def _cumsum(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@mutant("vmap", elementwise, _cumsum, supports=("vmap",), in_dims=(0,))
class VmapOverFirst(_Cumsum):
    """The batch rule takes the first dimension for the batch, whatever in_dims says."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info, in_dims
        apply: Any = VmapOverFirst.apply
        return apply(x), 0


@twin("vmap", elementwise, _cumsum, supports=("vmap",), in_dims=(0,))
class VmapOverAny(_Cumsum):
    """The batch rule moves the batch to the first dimension."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info
        apply: Any = VmapOverAny.apply
        return apply(x.movedim(in_dims[0], 0)), 0


class _AddsReversed(Function):
    """x + s, with s in reverse order."""

    @staticmethod
    def forward(x: Tensor, s: Tensor) -> Any:
        return x + s.flip(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta, delta.sum_to_size(ctx.shape).flip(0)


def _adds_reversed(x: Tensor, s: Tensor) -> Tensor:
    return x + s.flip(0)


@mutant("vmap", scale, _adds_reversed, supports=("vmap",), in_dims=(0, None))
class VmapOverInputsOnly(_AddsReversed):
    """The batch rule takes it that x is batched and s is not, and reverses a batch of s."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, s: Tensor) -> Any:
        del info
        apply: Any = VmapOverInputsOnly.apply
        return apply(x if in_dims[0] is None else x.movedim(in_dims[0], 0), s), 0


@twin("vmap", scale, _adds_reversed, supports=("vmap",), in_dims=(0, None))
class RefusesBatchesOfScales(_AddsReversed):
    """The batch rule refuses a batch of s."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, s: Tensor) -> Any:
        del info
        if in_dims[0] is None or in_dims[1] is not None:
            raise NotImplementedError("s must not be batched")
        apply: Any = RefusesBatchesOfScales.apply
        return apply(x.movedim(in_dims[0], 0), s), 0
