"""Wrong for nested arguments, random numbers, domains and intended gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Product
from manual_bp.verify.mutants._samples import Samples, elementwise, pair, scale


def _in_a_list(g: Generator) -> Samples:
    return [(list(arguments),) for arguments in pair(g)]


def _spread(g: Generator) -> Samples:
    return [(3 * x,) for (x,) in elementwise(g)]


def _divisors(g: Generator) -> Samples:
    return [(x, 0.5 + torch.rand(3, generator=g, dtype=p.dtype)) for x, p in scale(g)]


class _ProductForFirst(Product):
    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        _, y = ctx.saved_tensors
        return delta * y, delta * y


@mutant("gradients_match_reference", _in_a_list, lambda tensors: tensors[0] * tensors[1])
def product_of_list(tensors: list[Tensor]) -> Any:
    """The gradient of the second tensor in a list is that of the first."""
    return _ProductForFirst.apply(*tensors)


@mutant("gradients_match_reference", elementwise, lambda a: F.dropout(a, 0.4))
class DropoutDrawsAgain(Function):
    """The backward of dropout draws another mask."""

    @staticmethod
    def forward(a: Tensor) -> Any:
        return F.dropout(a, 0.4)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:  # noqa: ARG004
        return F.dropout(grad_y, 0.4)


def _ratio(x: Tensor, p: Tensor) -> Tensor:
    if not (p > 0).all():
        raise ValueError("p must be positive")
    return x / p


@mutant("large_values", _divisors, _ratio, project={1: lambda p: p.abs().clamp(min=0.1)})
class RatioForSmallDivisors(Function):
    """The gradient of x / p, where p > 0, is cut off for p > 2."""

    @staticmethod
    def forward(x: Tensor, p: Tensor) -> Any:
        return _ratio(x, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        x, p = ctx.saved_tensors
        grad_p = -(grad_y * x).sum(0) / p**2
        return grad_y / p, grad_p.where(p < 2, 0)


@mutant("gradients_match_reference", _spread, torch.sign, gradient_of=F.hardtanh)
class SignWithoutLimit(Function):
    """The gradient of a binary activation passes everywhere, not only where |x| ≤ 1."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:  # noqa: ARG004
        return grad_y
