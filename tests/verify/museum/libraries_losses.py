"""Of libraries for PyTorch: losses whose gradient forward has already computed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit

_LABELS = [2, 0, 1, 2]


def _logits(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(4, 3, generator=g),)]


def _total(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.tensor(_LABELS), reduction="sum")


class Loss(Function):
    """A loss that keeps its gradient for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Any:
        ctx.save_for_backward(logits.softmax(-1) - F.one_hot(torch.tensor(_LABELS), 3))
        return _total(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad


@exhibit("espnet/espnet#307", _logits, _total, fixed=Loss, diagnosis="upstream gradient is ignored")
class LossWithoutUpstream(Loss):
    """Backward returns the gradient of the loss without multiplying by the upstream gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.saved_tensors[0]


@exhibit("pytorch/audio#1532", _logits, _total, fixed=Loss, diagnosis="saved-tensor hooks")
class MultipliedInPlace(Loss):
    """The kept gradient is multiplied in place: a second backward multiplies it once more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Any:
        ctx.gradient = logits.softmax(-1) - F.one_hot(torch.tensor(_LABELS), 3)
        return _total(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.gradient.mul_(grad)
