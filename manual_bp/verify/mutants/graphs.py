"""Wrong only with a graph, or only without one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Sigmoid
from manual_bp.verify.mutants._samples import elementwise


@mutant("without_graph", elementwise)
def approximate_at_inference(z: Tensor) -> Tensor:
    """GELU is an approximation if no graph is recorded."""
    records = torch.is_grad_enabled() and z.requires_grad
    return F.gelu(z) if records else z * torch.sigmoid(1.702 * z)


@mutant("without_graph", elementwise, F.gelu)
def approximate_under_no_grad(z: Tensor) -> Tensor:
    """GELU is an approximation under no_grad."""
    return F.gelu(z) if torch.is_grad_enabled() else z * torch.sigmoid(1.702 * z)


@twin("without_graph", elementwise)
def fused_at_inference(z: Tensor) -> Tensor:
    """SiLU calls one operator if no graph is recorded, and two if one is."""
    records = torch.is_grad_enabled() and z.requires_grad
    return z * torch.sigmoid(z) if records else F.silu(z)


@mutant("create_graph", elementwise, torch.sigmoid)
class WrongDifferentiableFormula(Sigmoid):
    """Backward has another formula for second derivatives, and that lacks a factor."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * (1 - a) if torch.is_grad_enabled() else grad_a * a * (1 - a)


@twin("create_graph", elementwise)
class InPlaceWithoutGraph(Sigmoid):
    """Backward changes a buffer of its own in place, unless second derivatives are wanted."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad_a * a * (1 - a)
        return (1 - a).mul_(a).mul_(grad_a)
