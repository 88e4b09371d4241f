"""State that outlives a call, random numbers, and one tensor as two arguments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear, Product, Sigmoid
from manual_bp.verify.mutants._samples import dropout, elementwise, linear, pair


@mutant("interleaved_calls", elementwise, torch.square)
class KeptOnClass(Function):
    """What backward needs is kept on the class, where the next call overwrites it."""

    kept: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        KeptOnClass.kept = x.detach().clone()
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return 2 * KeptOnClass.kept * delta


_SCRATCH = torch.empty(4096, dtype=torch.float64)


@mutant("interleaved_calls", elementwise, torch.exp)
class KeptInBuffer(Function):
    """The output is kept in one buffer for all calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.detach().exp()
        _SCRATCH[: y.numel()] = y.flatten()
        ctx.shape = y.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        kept = _SCRATCH[: delta.numel()].view(ctx.shape).to(delta.dtype, copy=True)
        return kept * delta


@mutant("interleaved_calls", elementwise, torch.square)
class KeptOnStack(Function):
    """What backward needs is kept on a stack: wrong unless backwards run in reverse order."""

    stack: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        KeptOnStack.stack.append(x.detach().clone())
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return 2 * KeptOnStack.stack.pop() * delta


@mutant("interleaved_calls", elementwise, nn.ReLU)
class MaskOnModule(nn.Module):
    """A module keeps its mask on itself."""

    mask: Tensor

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        layer = self

        class Masked(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
                layer.mask = x > 0
                return x * layer.mask

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
                return delta * layer.mask

        return Masked.apply(input)


@mutant("repeatable_backward", linear, F.linear)
class AccumulatesOnCtx(Linear):
    """∂C/∂w adds up over several backwards through one graph."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.grad_w = 0

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        ctx.grad_w = ctx.grad_w + delta.mT @ a
        return delta @ w, ctx.grad_w, delta.sum(0)


@mutant("repeatable_backward", linear, F.linear)
class SpendsItsState(Linear):
    """The first backward uses up state that the second needs."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        Linear.setup_context(ctx, inputs, output)
        ctx.scales = [1.0]

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return ctx.scales.pop() * (delta @ w), delta.mT @ a, delta.sum(0)


_BUFFERS: dict[torch.Size, Tensor] = {}


@mutant("repeatable_backward", linear, F.linear)
class SharedBuffer(Linear):
    """∂C/∂w is returned in a buffer that the next backward overwrites."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        buffer = _BUFFERS.setdefault(grad_w.shape, torch.empty_like(grad_w))
        if buffer.dtype != grad_w.dtype or buffer.device != grad_w.device:
            buffer = _BUFFERS[grad_w.shape] = torch.empty_like(grad_w)
        return delta @ w, buffer.copy_(grad_w), delta.sum(0)


def _unseeded_mask(t: Tensor) -> Tensor:
    generator = Generator(t.device)
    generator.seed()
    return torch.rand(t.shape, generator=generator, device=t.device) < 0.5


class _UnseededDropout(Function):
    @staticmethod
    def forward(a: Tensor) -> Any:
        mask = _unseeded_mask(a)
        return a * mask * 2, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        _, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Any, _: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grad_y * mask * 2


@mutant("deterministic", elementwise)
def unseeded_dropout(a: Tensor) -> Any:
    """Dropout draws its mask from its own generator, which nothing seeds."""
    apply: Any = _UnseededDropout.apply
    return apply(a)[0]


@mutant("deterministic", elementwise, torch.sigmoid)
class NoisyBackward(Sigmoid):
    """Two backwards of the same graph differ in the sixth digit."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a * (1 - a) * (1 + 1e-6 * _unseeded_mask(a))


@mutant("forward_matches_reference", dropout, lambda a, mask, p: a * mask / (1 - p))
class DropoutForOneHalf(Function):
    """Dropout scales by 2, whatever p is."""

    @staticmethod
    def forward(a: Tensor, mask: Tensor, p: float) -> Any:
        del p
        return a * mask / 0.5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Any) -> None:
        del output
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grad_y * mask / 0.5, None, None


@mutant("tied_inputs", pair, torch.mul)
class OnceWhenTied(Product):
    """One of two gradients is missing if both arguments are the same tensor."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        Product.setup_context(ctx, inputs, output)
        ctx.is_tied = inputs[0] is inputs[1]

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * y, None if ctx.is_tied else delta * x


@mutant("tied_inputs", pair, torch.mul)
class KeyedByMemory(Product):
    """Gradients are stored by the address of their argument, so those of tied inputs collide."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        table = {x.data_ptr(): delta * y, y.data_ptr(): delta * x}
        return table.pop(x.data_ptr()), table.pop(y.data_ptr(), None)


@mutant("non_leaf_arguments", elementwise, torch.sigmoid)
def cuts_off_what_is_no_leaf(z: Tensor) -> Any:
    """An argument that another operation computed is detached."""
    apply: Any = Sigmoid.apply
    return apply(z if z.is_leaf else z.detach())


@mutant("non_leaf_arguments", elementwise, torch.sigmoid)
class OverwritesWhatIsNoLeaf(Sigmoid):
    """Backward uses an argument that another operation computed as scratch space."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        Sigmoid.setup_context(ctx, inputs, output)
        ctx.scratch = None if inputs[0].is_leaf else inputs[0].data

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        if ctx.scratch is not None:
            ctx.scratch.copy_(a * (1 - a))
        return grad_a * a * (1 - a)


@twin("non_leaf_arguments", elementwise, torch.sigmoid)
def keeps_gradients_of_leaves(z: Tensor) -> Any:
    """A call asks whether its argument is a leaf, and gives the same in both cases."""
    apply: Any = Sigmoid.apply
    return apply(z if z.is_leaf else z.view_as(z))
