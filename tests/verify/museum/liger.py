"""Of linkedin/Liger-Kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit


def _classes(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randint(3, (5,), generator=g))]


def _each(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


class Unreduced(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return _each(logits, target)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, target = ctx.saved_tensors
        slope = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        return slope * grad[:, None], None


@exhibit(
    "linkedin/Liger-Kernel#968",
    _classes,
    _each,
    fixed=Unreduced,
    diagnosis="scaled by the first element of the upstream gradient",
)
class OneUpstreamForAllRows(Unreduced):
    """The gradient of an unreduced loss is multiplied by the upstream gradient of its first row."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Unreduced.backward(ctx, grad[:1].expand(grad.shape))
