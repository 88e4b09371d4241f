"""Writes to tensors that belong to others, and tensors kept in the wrong place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Linear, Relu, Sigmoid
from manual_bp.verify.mutants._samples import elementwise, linear


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
