"""Of NVIDIA/apex."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._attention import softmax_gradient
from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32


def _scores(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g),)]


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


class Softmax(Function):
    """Softmax of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        p = _softmax(x)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        (p,) = ctx.saved_tensors
        return softmax_gradient(p, grad)


@exhibit("NVIDIA/apex#1430", _scores, _softmax, fixed=Softmax)
class UpstreamOverwritten(Softmax):
    """Backward writes its result into the upstream gradient, which others may hold."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.copy_(Softmax.backward(ctx, grad))
