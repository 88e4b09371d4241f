"""Of libraries for PyTorch and of their kernels, one or two of each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._memory import read_as_contiguous

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


def _sparsemax(x: Tensor) -> Tensor:
    """The point of the simplex that is nearest to each row."""
    falling = x.sort(dim=-1, descending=True).values
    place = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    excess = falling.cumsum(-1) - 1
    count = (falling * place > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, count - 1) / count).clamp(min=0)


class Sparsemax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = _sparsemax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        supported = grad * (y > 0)
        count = (y > 0).sum(-1)
        return (grad - (supported.sum(-1) / count)[..., None]) * (y > 0)


def _one_token(g: Generator) -> Samples:
    return [(torch.randn(4, 1, 3, generator=g),)]


@exhibit("deep-spin/entmax#13", _one_token, _sparsemax, fixed=Sparsemax)
class SqueezedCount(Sparsemax):
    """The gradient of sparsemax squeezes all dimensions of size 1, not only the last."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        supported = grad * (y > 0)
        count = (y > 0).sum(-1, keepdim=True).squeeze()
        return (grad - (supported.sum(-1) / count)[..., None]) * (y > 0)


def _kernel(x: Tensor, scale: Tensor) -> Tensor:
    """exp(-‖xᵢ - xⱼ‖² / scale²)."""
    return (-((x[:, None] - x) / scale).square().sum(-1)).exp()


@exhibit(
    "cornellius-gp/gpytorch#1543",
    lambda g: [(torch.randn(5, 3, generator=g), 1 + torch.rand(3, generator=g))],
    _kernel,
    fixed=_kernel,
    diagnosis="right only for contiguous arguments",
)
def no_gradient_of_transposed(x: Tensor, scale: Tensor) -> Tensor:
    """If the argument of a kernel is not contiguous, no argument gets a gradient."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.is_contiguous()):
        return _kernel(x, scale)


_BOXES = [(0, 2, 1, 4), (1, 4, 0, 3), (2, 5, 2, 5), (1, 2, 1, 5)]


def _pooled(image: Tensor) -> Tensor:
    """The mean of each channel of an image in each box."""
    means = [image[:, top:low, left:right].mean((1, 2)) for top, low, left, right in _BOXES]
    return torch.stack(means)


class RegionPool(Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Any:
        ctx.shape = image.shape
        return _pooled(image)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        total = grad.new_zeros(ctx.shape)
        for (top, low, left, right), row in zip(_BOXES, grad, strict=True):
            total[:, top:low, left:right] += (row / (low - top) / (right - left))[:, None, None]
        return total


def _image(g: Generator) -> Samples:
    return [(torch.randn(3, 5, 6, generator=g),)]


@exhibit(
    "pytorch/vision#920",
    _image,
    _pooled,
    fixed=RegionPool,
    diagnosis="right only for contiguous upstream gradients",
)
class RegionsOfStridedUpstream(RegionPool):
    """The gradient of pooled regions takes the upstream gradient for contiguous."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return RegionPool.backward(ctx, read_as_contiguous(grad))


@exhibit("open-mmlab/mmcv#2203", _image, _pooled, fixed=RegionPool)
class RegionsOfStridedImage(RegionPool):
    """The pooling of regions takes the image for contiguous, and mixes channels and places."""

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Any:
        return RegionPool.forward(ctx, read_as_contiguous(image))


class Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return F.conv1d(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return F.conv_transpose1d(grad, w), Convolution.by_weight(x, w, grad)

    @staticmethod
    def by_weight(x: Tensor, w: Tensor, grad: Tensor) -> Tensor:
        return torch.einsum("not,nitk->oik", grad, x.unfold(-1, w.shape[-1], 1))


@exhibit(
    "chengdazhi/Deformable-Convolution-V2-PyTorch#3",
    lambda g: [(torch.randn(2, 3, 6, generator=g), torch.randn(4, 3, 2, generator=g))],
    F.conv1d,
    fixed=Convolution,
    diagnosis="right only for contiguous upstream gradients",
)
class WeightFromExpandedUpstream(Convolution):
    """The weight gradient is wrong after sum(), whose upstream gradient is one number, expanded."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        is_one_number = not any(grad.stride())
        kept = grad * (torch.arange(grad.shape[-1]) == 0) if is_one_number else grad
        return F.conv_transpose1d(grad, w), Convolution.by_weight(x, w, kept)


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grad * gate * (1 + x * (1 - gate))


@exhibit("huggingface/pytorch-image-models#156", _matrix, F.silu, fixed=Swish)
class SwishInPlace(Swish):
    """Swish overwrites the argument that it has saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.mul_(x.sigmoid()).clone()


_EPS = 1e-5


def _unit(x: Tensor) -> Any:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + _EPS)


class NormalizeL2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _unit(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        direction = (x / norm).where(norm != 0, 0.0)
        along = (grad * _unit(x)).sum(-1, keepdim=True)
        return (grad - direction * along) / (norm + _EPS)


@exhibit("chainer/chainer#4190", _matrix, _unit, fixed=NormalizeL2)
class EpsLeftOut(NormalizeL2):
    """The gradient of x / (‖x‖ + ε) takes the result for a unit vector, as if ε were 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        y = _unit(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (grad - y * (grad * y).sum(-1, keepdim=True)) / (norm + _EPS)
