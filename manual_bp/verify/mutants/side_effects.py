"""Writes to tensors that belong to others, and tensors kept in the wrong place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear, Relu, Sigmoid
from manual_bp.verify.mutants._samples import elementwise, linear, rows_to_look_up


@mutant("writes_nothing", linear, F.linear)
class ScratchInput(Linear):
    """Backward uses the saved input as scratch space."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        return a.copy_(delta @ w).clone(), grad_w, delta.sum(0)


@mutant("writes_nothing", linear, F.linear)
class DecaysWeight(Linear):
    """Backward changes the saved weight in place."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        gradients = delta @ w, delta.mT @ a, delta.sum(0)
        w.data.mul_(0.999)
        return gradients


@mutant("writes_nothing", linear, F.linear)
class ZeroesUpstream(Linear):
    """Backward zeroes the upstream gradient after use."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        gradients = delta @ w, delta.mT @ a, delta.sum(0)
        delta.data.zero_()
        return gradients


@mutant("writes_nothing", elementwise, torch.sigmoid)
class ScalesUpstreamInPlace(Sigmoid):
    """Backward multiplies the upstream gradient in place and returns it."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a.mul_(a * (1 - a))


@mutant("writes_nothing", elementwise, torch.sigmoid)
class OverwritesSavedOutput(Sigmoid):
    """Backward overwrites the saved output through .data, which the version counter misses."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a.data.mul_(1 - a)


@mutant("writes_nothing", elementwise, torch.relu)
class ReluOverInput(Relu):
    """Forward clamps its input in place, then saves it."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp_(min=0).clone()


@mutant("writes_nothing", elementwise, torch.relu)
def in_place_without_gradients(z: Tensor) -> Any:
    """Without gradients, a call clamps its argument in place."""
    apply: Any = Relu.apply
    return apply(z) if torch.is_grad_enabled() else z.clamp_(min=0)


def _look_up(w: Tensor, indices: Tensor) -> Tensor:
    return w[indices.clamp(min=0)] * (indices >= 0)[..., None]


class _LookUp(Function):
    """The rows of w at indices, and zeros where the index is negative."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, indices: Tensor) -> Any:
        ctx.save_for_backward(indices)
        ctx.shape = w.shape
        return _look_up(w, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        (indices,) = ctx.saved_tensors
        delta = delta * (indices >= 0)[..., None]
        return delta.new_zeros(ctx.shape).index_add(0, indices.clamp(min=0), delta), None


@twin("writes_nothing", rows_to_look_up, _look_up)
class LooksUp(_LookUp):
    """Ignored indices are replaced in a copy."""


@mutant("writes_nothing", rows_to_look_up, _look_up)
class ReplacesIgnored(_LookUp):
    """Ignored indices are replaced in the tensor of the caller."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, indices: Tensor) -> Any:
        was_ignored = indices < 0
        y = _LookUp.forward(ctx, w, indices.clone())
        indices[was_ignored] = 0
        return y


@mutant("uninitialized_memory", rows_to_look_up, _look_up)
class StartsFromEmpty(_LookUp):
    """New memory is taken for zeros, which it is if it is large and nothing fills it."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        grad_w = _LookUp.backward(ctx, delta)[0]
        large = torch.empty(40_000_000 // grad_w.itemsize, dtype=grad_w.dtype)
        return large[: grad_w.numel()].view(grad_w.shape) + grad_w, None


@twin("uninitialized_memory", rows_to_look_up, _look_up)
class FillsEmpty(_LookUp):
    """The gradient is written into new memory, all of it."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        grad_w = _LookUp.backward(ctx, delta)[0]
        return torch.empty_like(grad_w).copy_(grad_w), None


@mutant("saves_nothing_on_ctx", linear, F.linear)
class KeepsOnCtx(Linear):
    """Inputs are kept as attributes of ctx."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        ctx.a, ctx.w, _ = inputs

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta @ ctx.w, delta.mT @ ctx.a, delta.sum(0)


@mutant("saves_nothing_on_ctx", linear, F.linear)
class KeepsInListOnCtx(Linear):
    """Inputs are kept in a list on ctx."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        ctx.operands = list(inputs[:2])

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.operands
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("no_leak", elementwise, torch.sigmoid)
class KeepsOutput(Sigmoid):
    """The output is kept on ctx: a cycle that keeps the graph alive."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.out = output

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        return grad_a * ctx.out * (1 - ctx.out)


@mutant("stale_inputs_raise", linear, F.linear)
class SavesData(Linear):
    """Inputs are saved as .data, so a later change in place goes unnoticed."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        ctx.save_for_backward(a.data, w.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(0)


@mutant("stale_inputs_raise", linear, F.linear)
class StaleOnCtx(KeepsOnCtx):
    """Inputs are kept on ctx, so a later change in place goes unnoticed."""
