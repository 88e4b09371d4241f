"""Right Functions, from which the wrong ones inherit."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class Linear(Function):
    """z = a @ w.mT + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(a, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        ctx.save_for_backward(a, w)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(0)


class Product(Function):
    """x * y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * y, delta * x


class Sigmoid(Function):
    """a = σ(z)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a * (1 - a)


class Relu(Function):
    """a = max(z, 0)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, grad_a, 0)


class CubeGradient(Function):
    """3 x² delta, the gradient of a cube."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, delta: Tensor) -> Any:
        return 3 * x.square() * delta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x * delta * v, 3 * x.square() * v

    @staticmethod
    def jvp(ctx: Any, dx: Any, ddelta: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x * delta * dx + 3 * x.square() * ddelta


class Cube(Function):
    """x³. Its gradient is a second Function, which `backward_by` takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * dx

    @staticmethod
    def backward_by(gradient: Any) -> Any:
        """A backward that applies this Function."""

        def backward(ctx: Any, delta: Any) -> Any:
            (x,) = ctx.saved_tensors
            return gradient.apply(x, delta)

        return staticmethod(backward)


def cube(x: Tensor) -> Tensor:
    """The reference of `Cube`."""
    return x**3
