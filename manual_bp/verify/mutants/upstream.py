"""Mistakes in the use of the upstream gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import linear, pair


def _read_in_order(t: Tensor) -> Tensor:
    last = t.storage_offset() + t.numel()
    is_readable = t.untyped_storage().nbytes() >= last * t.element_size()
    strides = torch.empty(t.shape, device="meta").stride()
    return t.as_strided(t.shape, strides) if is_readable else t


@mutant("upstream_layouts", linear, F.linear)
class ReadsMemoryInOrder(Linear):
    """Backward reads the upstream gradient as if contiguous, which scrambles a transposed one."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = _read_in_order(delta)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("upstream_layouts", linear, F.linear)
class ViewsUpstream(Linear):
    """Backward calls view on the upstream gradient, which fails unless it is contiguous."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        rows = delta.view(-1).view(delta.shape)
        return rows @ w, rows.mT @ a, rows.sum(0)


@mutant("upstream_layouts", linear, F.linear)
class OneRowOfExpanded(Linear):
    """∂C/∂b is that of one row if the upstream gradient is expanded over the rows."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_b = delta[0] if delta.stride(0) == 0 else delta.sum(0)
        return delta @ w, delta.mT @ a, grad_b


@mutant("upstream_undefined", linear, F.linear)
class StumblesOverUndefined(Linear):
    """set_materialize_grads(False) is set, but backward cannot take None."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)


@mutant("upstream_undefined", linear, F.linear)
class UndefinedAsOne(Linear):
    """An undefined upstream gradient counts as 1, not as 0."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        if delta is None:
            delta = a.new_ones(len(a), len(w))
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("linear_in_upstream", linear, F.linear)
class ScaledByFirst(Linear):
    """Every gradient is multiplied by the first element of the upstream gradient."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        first = delta.flatten()[0]
        return first * (delta @ w), first * (delta.mT @ a), first * delta.sum(0)


@mutant("linear_in_upstream", linear, F.linear)
class ClipsUpstream(Linear):
    """The upstream gradient is clipped to [-1, 1]."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = delta.clamp(-1, 1)
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("linear_in_upstream", pair, lambda a, y: (a - y).square().sum() / 2)
class IgnoresUpstream(Function):
    """A cost ignores its upstream gradient, as if it were always 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor) -> Any:
        return (a - y).square().sum() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_cost: Any) -> Any:
        del grad_cost
        a, y = ctx.saved_tensors
        return a - y, y - a


@mutant("linear_in_upstream", linear, F.linear)
class DropsSmallUpstream(Linear):
    """Upstream gradients below 1e-10 count as zero."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = torch.where(delta.abs() < 1e-10, 0, delta)
        return delta @ w, delta.mT @ a, delta.sum(0)


@twin("linear_in_upstream", linear, F.linear)
class ScalesUpstream(Linear):
    """The upstream gradient is scaled by a power of two to about 1, and the gradients back."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        largest = delta.detach().abs().amax() if delta.numel() else delta.detach().sum()
        scale = torch.where(largest > 0, 2.0 ** torch.frexp(largest).exponent, 1).to(delta.dtype)
        delta = delta / scale
        return scale * (delta @ w), scale * (delta.mT @ a), scale * delta.sum(0)


class _SumAndProduct(Function):
    """x + y and x * y, whose upstream gradients may be None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return x + y, x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)


def _sum_and_product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, x * y


@mutant("outputs_alone", pair, _sum_and_product)
class NothingIfOneIsUndefined(_SumAndProduct):
    """No gradient is returned if the upstream gradient of one of two outputs is undefined."""

    @staticmethod
    def backward(ctx: Any, of_sum: Any, of_product: Any) -> Any:
        x, y = ctx.saved_tensors
        if of_sum is None or of_product is None:
            return None, None
        return of_sum + of_product * y, of_sum + of_product * x


@mutant("outputs_alone", pair, _sum_and_product)
class NeedsBothOutputs(_SumAndProduct):
    """Backward fails if one of two outputs is not used."""

    @staticmethod
    def backward(ctx: Any, of_sum: Any, of_product: Any) -> Any:
        x, y = ctx.saved_tensors
        if of_sum is None and of_product is None:
            return None, None
        return of_sum + of_product * y, of_sum + of_product * x


@twin("outputs_alone", pair, _sum_and_product)
class EachOutputAlone(_SumAndProduct):
    """Backward adds up what the upstream gradients that are defined contribute."""

    @staticmethod
    def backward(ctx: Any, of_sum: Any, of_product: Any) -> Any:
        x, y = ctx.saved_tensors
        if of_product is None:
            return of_sum, of_sum
        by_x, by_y = of_product * y, of_product * x
        return (by_x, by_y) if of_sum is None else (of_sum + by_x, of_sum + by_y)
