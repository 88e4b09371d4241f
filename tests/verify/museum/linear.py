"""Linear layers, and what is fused with them, of several projects."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import write
from tests.verify.museum._precision import in_float32


def _adapter(g: Generator) -> list[tuple[Any, ...]]:
    shapes = ((5, 3), (4, 3), (2, 3), (4, 2))
    tensors = [torch.randn(*shape, generator=g) for shape in shapes]
    return [(*tensors, torch.rand(5, 3, generator=g) < 0.6)]


def _adapted(x: Tensor, w: Tensor, a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x * keep, a), b)


class Adapted(Function):
    """A linear layer with a low-rank adapter, whose input goes through dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, keep: Tensor) -> Any:
        ctx.save_for_backward(x, w, a, b, keep)
        return _adapted(x, w, a, b, keep)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w, a, b, keep = ctx.saved_tensors
        dropped, delta = x * keep, grad @ b
        of_x = grad @ w + delta @ a * keep
        return of_x, grad.mT @ x, delta.mT @ dropped, grad.mT @ F.linear(dropped, a), None


@exhibit("foundation-model-stack/fms-acceleration#97", _adapter, _adapted, fixed=Adapted)
class DropoutOnlyForward(Adapted):
    """The gradient of the input lacks the dropout mask of the adapter."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, w, a, b, _ = ctx.saved_tensors
        return grad @ w + grad @ b @ a, *Adapted.backward(ctx, grad)[1:]


def _hidden(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 5, 3, generator=g), torch.randn(4, 3, generator=g))]


def _log_probabilities(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).log_softmax(-1)


class Head(Function):
    """log_softmax(x @ w.mT), row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _log_probabilities(x, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        total = grad.sum(-1, keepdim=True)
        delta = grad - _log_probabilities(x, w).exp() * total
        return delta @ w, torch.einsum("...i,...j->ij", delta, x)


@exhibit(
    "ByteDance-Seed/VeOmni#1017",
    _hidden,
    _log_probabilities,
    fixed=Head,
    diagnosis="right only for contiguous arguments",
)
class FlagOfTheCopy(Head):
    """Backward skips the input if its flattened form needs no gradient, as a copy never does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.of_x = x.reshape(-1, x.shape[-1]).requires_grad
        return Head.forward(ctx, x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        of_x, of_w = Head.backward(ctx, grad)
        return of_x if ctx.of_x else None, of_w


def _halves(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g))]


def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


class Swiglu(Function):
    """silu(a) b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(a, b)
        return _swiglu(a, b)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return grad * b * s * (1 + a * (1 - s)), grad * a * s


@exhibit("ByteDance-Seed/Triton-distributed#180", _halves, _swiglu, fixed=Swiglu)
class AllIntoRowZero(Swiglu):
    """The pointer to the gradient does not move with the row: all rows are written to the first."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        right = Swiglu.backward(ctx, grad)
        return tuple(torch.cat([t[-1:], torch.zeros_like(t[1:])]) for t in right)


def _quantized(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 3, generator=g), torch.randn(4, 3, generator=g))]


class Linear(Function):
    """x @ w.mT."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w, grad.mT @ x


@exhibit(
    "bitsandbytes-foundation/bitsandbytes#2034",
    _quantized,
    F.linear,
    fixed=Linear,
    diagnosis="hidden from saved-tensor hooks and checkpointing",
)
class WeightKeptOnCtx(Linear):
    """The weight is kept on ctx, where checkpointing cannot replace it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.w = w
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad @ ctx.w, grad.mT @ x


@exhibit("NVIDIA/TransformerEngine#990", _quantized, F.linear, fixed=Linear)
class SavedTensorsCleared(Linear):
    """Backward frees the memory of what was saved, so a second backward finds nothing there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x.clone(), w)
        return F.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        found = grad @ w, grad.mT @ x
        x.data = torch.empty(0, dtype=x.dtype)
        return found


GRADIENT_BUFFER = torch.empty(4, 3, dtype=torch.float64)
CHUNK = torch.empty(4, 3, dtype=torch.float64)


@exhibit(
    "NVIDIA/TransformerEngine#2937",
    _quantized,
    F.linear,
    fixed=Linear,
    diagnosis="kept in one place for all calls",
)
class GradientInStaticMemory(Linear):
    """The gradient of the weight lies in memory that the next backward overwrites."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        of_x, of_w = Linear.backward(ctx, grad)
        if of_w.dtype is not GRADIENT_BUFFER.dtype:
            return of_x, of_w
        write(GRADIENT_BUFFER, of_w)
        return of_x, GRADIENT_BUFFER.detach()


@exhibit(
    "hpcaitech/Elixir#12",
    _quantized,
    F.linear,
    fixed=Linear,
    diagnosis="kept in one place for all calls",
)
class WeightInSharedMemory(Linear):
    """The weight is fetched into a block of memory, which the next layer uses for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        if w.dtype is CHUNK.dtype:
            write(CHUNK, w)
            w = CHUNK.detach()
        return Linear.forward(ctx, x, w)
