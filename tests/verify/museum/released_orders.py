"""Found in released packages: second derivatives, and gradients that are not always asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit


def _null_space(x: Tensor) -> Tensor:
    """The projector onto the null space of a matrix with independent rows."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    result: Tensor = eye - x.mT @ torch.linalg.solve(x @ x.mT, x)
    return result


class NullSpace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _null_space(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return -torch.linalg.solve(x @ x.mT, x) @ (grad + grad.mT) @ _null_space(x)


@exhibit(
    "kornia 0.9.0, _NullSpaceBasis",
    lambda g: [(torch.randn(2, 4, generator=g),)],
    _null_space,
    fixed=NullSpace,
    diagnosis="a term of order 2 is missing",
)
class NullSpaceOnce(Function):
    """Backward uses factors computed in forward: the second derivative is silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(torch.linalg.solve(x @ x.mT, x), _null_space(x))
        return _null_space(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        inverse, projector = ctx.saved_tensors
        return -inverse @ (grad + grad.mT) @ projector


def _kernel(distance: Tensor, scale: Tensor) -> Tensor:
    return (-distance.square() / (2 * scale.square())).exp()


class Kernel(Function):
    @staticmethod
    def forward(ctx: Any, distance: Tensor, scale: Tensor) -> Any:
        ctx.save_for_backward(distance, scale)
        return _kernel(distance, scale)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        distance, scale = ctx.saved_tensors
        value = grad * _kernel(distance, scale)
        by_scale = value * distance.square() / scale**3
        return -value * distance / scale.square(), by_scale.sum()


@exhibit(
    "gpytorch 1.15.2, RBFCovariance",
    lambda g: [(torch.randn(3, 4, generator=g), 1 + torch.rand((), generator=g))],
    _kernel,
    fixed=Kernel,
    diagnosis="a term of order 2 is missing",
)
class KernelOnce(Function):
    """The derivative by the length scale is saved as a constant: no second derivative."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, scale: Tensor) -> Any:
        value = _kernel(distance, scale)
        by_scale = value * distance.square() / scale**3
        ctx.save_for_backward(-value * distance / scale.square(), by_scale)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        by_distance, by_scale = ctx.saved_tensors
        return grad * by_distance, (grad * by_scale).sum()


def _quadratic(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = b @ torch.linalg.solve(a @ a.mT + torch.eye(3, dtype=a.dtype), b)
    return result


class Quadratic(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(a, b)
        return _quadratic(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        a, b = ctx.saved_tensors
        return Quadratic.gradients(grad, a, Quadratic.solved(a, b))

    @staticmethod
    def solved(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.linalg.solve(a @ a.mT + torch.eye(3, dtype=a.dtype), b)
        return result

    @staticmethod
    def gradients(grad: Tensor, a: Tensor, solved: Tensor) -> Any:
        return -2 * grad * torch.outer(solved, solved @ a), 2 * grad * solved


@exhibit(
    "linear_operator 0.6.1, InvQuad",
    lambda g: [(torch.randn(3, 3, generator=g), torch.randn(3, generator=g))],
    _quadratic,
    fixed=Quadratic,
    diagnosis="a term of order 2 is missing",
)
class SolvedOnce(Function):
    """Backward uses the solution of forward as a constant: second derivatives are wrong."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(a, Quadratic.solved(a, b))
        return _quadratic(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Quadratic.gradients(grad, *ctx.saved_tensors)


def _magnitude(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square() + 0.01).sqrt()


class Magnitude(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        return _magnitude(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        scaled = grad / _magnitude(x, y)
        return scaled * x, scaled * y


@exhibit(
    "pytorch_wavelets 1.3.0, SmoothMagFn",
    lambda g: [(torch.randn(4, generator=g), torch.randn(4, generator=g))],
    _magnitude,
    fixed=Magnitude,
)
class OnlyIfFirstNeedsIt(Function):
    """Slopes are constants saved in forward, and only if the first argument needs them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        size = _magnitude(x, y)
        if x.requires_grad:
            ctx.save_for_backward(x / size, y / size)
        return size

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        by_x, by_y = ctx.saved_tensors
        return grad * by_x, grad * by_y
