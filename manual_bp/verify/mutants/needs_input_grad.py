"""Mistakes in what is saved and computed for the gradients that are needed."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import linear


class _NeededGradients(Linear):
    """Only the needed gradients are computed, as is right."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        needs_a, needs_w, needs_b = ctx.needs_input_grad
        return (
            delta @ w if needs_a else None,
            delta.mT @ a if needs_w else None,
            delta.sum(0) if needs_b else None,
        )


@mutant("requires_grad_subsets", linear, F.linear)
class CrossedSaves(_NeededGradients):
    """`a` is saved if ∂C/∂a is needed and `w` if ∂C/∂w is, but each needs the other."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        needs_a, needs_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if needs_a else None, w if needs_w else None)


@mutant("requires_grad_subsets", linear, F.linear)
class BiasAsksForWeight(Linear):
    """∂C/∂b is None if w is frozen, since needs_input_grad is read one place off."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        needs_a, needs_w, _ = ctx.needs_input_grad
        return (
            delta @ w if needs_a else None,
            delta.mT @ a if needs_w else None,
            delta.sum(0) if needs_w else None,
        )


@mutant("frugal", linear, F.linear, supports=("frugal",))
class IgnoresNeeds(Linear):
    """needs_input_grad is ignored: everything is saved and every product computed."""


@mutant("frugal", linear, F.linear, supports=("frugal",))
class SavesForFrozen(_NeededGradients):
    """`a` is saved although w is frozen."""
