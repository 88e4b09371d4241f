"""Wrong for nested arguments, random numbers, domains and intended gradients."""

from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Product
from manual_bp.verify.mutants._samples import Samples, elementwise, pair


def _in_a_list(g: Generator) -> Samples:
    return [(list(arguments),) for arguments in pair(g)]


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
