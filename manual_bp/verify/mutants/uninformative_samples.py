"""Samples at which a mistake does not show."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._samples import IN, OUT, elementwise
from manual_bp.verify.mutants.first_order import ExtraMean, MeanBias


class _SeventeenTimes(Function):
    """x ⊙ x, with a gradient 17 times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 34 * x * delta


@mutant("informative_samples", [(torch.ones(0, 3),)], torch.square, in_dims=(0,))
class SeenOnNothing(_SeventeenTimes):
    """The gradient is too large, and no sample has elements."""


@mutant("informative_samples", [(torch.zeros(5, 3),)], torch.square)
class SeenAtZero(_SeventeenTimes):
    """The gradient is too large, and zero at all samples."""


@mutant("informative_samples", [(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1))], F.linear)
class SeenOnOneElement(MeanBias):
    """∂C/∂b is a mean and not a sum, and the only sample has one row of one element."""


@mutant(
    "informative_samples", [(torch.zeros(5, IN), torch.ones(OUT, IN), torch.ones(OUT))], F.linear
)
class SeenByTheBiasOnly(ExtraMean):
    """∂C/∂w is a mean and not a sum, and zero, since all inputs are zero."""


@mutant("informative_samples", elementwise, lambda x: x.detach().square())
def seen_detached(x: Tensor) -> Tensor:
    """The gradient is missing, and the reference has none either."""
    return x.detach() ** 2
