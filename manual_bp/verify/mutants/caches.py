"""State that outlives a call: read by the wrong backward, or for longer than it is true."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp._torch import version_of
from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import elementwise, linear


class _Square(Function):
    """x²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * delta


@mutant("interleaved_calls", elementwise, torch.square)
class KeptInTwoSlots(_Square):
    """What backward needs is kept in two slots, which is enough for two calls only."""

    slots: dict[int, Tensor] = {}  # noqa: RUF012
    count = itertools.count()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.slot = next(KeptInTwoSlots.count) % 2
        KeptInTwoSlots.slots[ctx.slot] = x.detach().clone()
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        return 2 * KeptInTwoSlots.slots[ctx.slot] * delta


@mutant("interleaved_calls", elementwise, torch.square)
class KeptInQueue(_Square):
    """What backward needs is kept in a queue: wrong unless backwards run in the same order."""

    queue: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        if x.requires_grad:
            KeptInQueue.queue.append(x.detach().clone())
        return _Square.forward(ctx, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        queue = KeptInQueue.queue
        x = queue.pop(0) if queue and queue[0].shape == delta.shape else ctx.saved_tensors[0]
        return 2 * x.to(delta) * delta


@mutant("interleaved_calls", linear, F.linear)
class KeyedByWeight(Linear):
    """The input is kept by the id of the weight: a weight that is used twice mixes them up."""

    table: dict[int, Tensor] = {}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.key = id(inputs[1])
        KeyedByWeight.table[ctx.key] = inputs[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        w = ctx.saved_tensors[1]
        return delta @ w, delta.mT @ KeyedByWeight.table[ctx.key], delta.sum(0)


_OUTPUT = torch.empty(4096, dtype=torch.float64)


@mutant("interleaved_calls", elementwise, torch.square)
class ReturnsOneBuffer(_Square):
    """All calls return their output in one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        if x.dtype is not torch.float64:
            return x * x
        return torch.mul(x, x, out=_OUTPUT.data[: x.numel()].view(x.shape))


@mutant("interleaved_calls", elementwise, torch.square)
class KeptFromFirstBackward(_Square):
    """The first backward keeps a product on the class for later ones through the same graph."""

    product: Tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        if not hasattr(ctx, "is_done"):
            ctx.is_done = True
            KeptFromFirstBackward.product = 2 * ctx.saved_tensors[0]
        return KeptFromFirstBackward.product * delta


@twin("interleaved_calls", elementwise, torch.square)
class ScratchWithinBackward(_Square):
    """One buffer serves all backwards as scratch space, and none of them leaves it to another."""

    scratch: dict[torch.dtype, Tensor] = {}  # noqa: RUF012

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        scratch = ScratchWithinBackward.scratch.setdefault(x.dtype, x.new_empty(4096))
        return torch.mul(2 * x, delta, out=scratch[: x.numel()].view(x.shape)).clone()


class _CachedWeight(Linear):
    """A linear layer that keeps the transposed weight for backward."""

    generate_vmap_rule = False
    cache: dict[Any, Tensor]

    @classmethod
    def key(cls, w: Tensor) -> Any:
        """What tells one weight from another."""
        raise NotImplementedError

    @classmethod
    def transposed(cls, w: Tensor) -> Tensor:
        """The transposed weight, from the cache if it is there."""
        key = cls.key(w)
        if key not in cls.cache:
            cls.cache[key] = w.detach().mT.contiguous()
        return cls.cache[key]


@mutant("stale_caches", linear, F.linear)
class CachedByAddress(_CachedWeight):
    """The transposed weight is kept by its address, and stays after a step of an optimizer."""

    cache = {}  # noqa: RUF012

    @classmethod
    def key(cls, w: Tensor) -> Any:
        return w.data_ptr(), w.dtype, w.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ CachedByAddress.transposed(w).mT, delta.mT @ a, delta.sum(0)


@mutant("stale_caches", linear, F.linear)
class CachedByAddressAndVersion(_CachedWeight):
    """The same with the count of changes: a new tensor at the old address has the old count."""

    cache = {}  # noqa: RUF012

    @classmethod
    def key(cls, w: Tensor) -> Any:
        return w.data_ptr(), version_of(w), w.dtype, w.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ CachedByAddressAndVersion.transposed(w).mT, delta.mT @ a, delta.sum(0)


@twin("stale_caches", linear, F.linear)
class CachedByValue(_CachedWeight):
    """The transposed weight is kept by the values of the weight."""

    cache = {}  # noqa: RUF012

    @classmethod
    def key(cls, w: Tensor) -> Any:
        return w.dtype, w.shape, *w.flatten().tolist()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ CachedByValue.transposed(w).mT, delta.mT @ a, delta.sum(0)
