"""Found in released packages: docs/museum.md tells how to reproduce them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum.libraries import Sparsemax

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(4, 3, generator=g),)]


_TAPS = (0.3, -0.7, 0.5, 1.1)


def _mirrored(x: Tensor) -> Tensor:
    """The signal with two samples mirrored at each end, the last one twice."""
    return torch.cat([x[..., :2].flip(-1), x, x[..., -2:].flip(-1)], -1)


def _filtered(x: Tensor) -> Tensor:
    windows = _mirrored(x).unfold(-1, len(_TAPS), 2)
    return sum((tap * windows[..., i] for i, tap in enumerate(_TAPS)), torch.zeros(()).to(x))


def _spread(grad: Tensor) -> Tensor:
    """The gradient of the padded signal."""
    total = grad.new_zeros(*grad.shape[:-1], 2 * grad.shape[-1] + 2)
    for i, tap in enumerate(_TAPS):
        total[..., i : i + 2 * grad.shape[-1] - 1 : 2] += tap * grad
    return total


class MirroredFilter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return _filtered(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        padded = _spread(grad)
        inner, left, right = padded[..., 2:-2], padded[..., :2], padded[..., -2:]
        rest = inner[..., 2:-2]
        head, tail = inner[..., :2] + left.flip(-1), inner[..., -2:] + right.flip(-1)
        return torch.cat([head, rest, tail], -1)


@exhibit(
    "pytorch_wavelets 1.3.0, AFB1D",
    lambda g: [(torch.randn(2, 1, 8, generator=g),)],
    _filtered,
    fixed=MirroredFilter,
)
class PaddingCutOff(MirroredFilter):
    """The gradient of mirrored samples is cut off, and not added to that of the samples."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _spread(grad)[..., 2:-2]


class Log1p(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.log1p()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad / (1 + x)


@exhibit(
    "torch_betainc 0.2.1, Betainc",
    lambda g: [(torch.rand(5, generator=g) * 0.2 + 0.1,)],
    torch.log1p,
    fixed=Log1p,
)
class SeriesStopsEarly(Log1p):
    """The value is exact, but the series for its derivative stops after too few terms."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * sum((-x) ** n for n in range(7))


class LogNormalCdf(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Any:
        ctx.save_for_backward(z)
        return torch.special.log_ndtr(z)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad * LogNormalCdf.slope(z)

    @staticmethod
    def slope(z: Tensor) -> Tensor:
        result: Tensor = (-z.square() / 2 - torch.special.log_ndtr(z)).exp() / (2 * torch.pi) ** 0.5
        return result


@exhibit(
    "gpytorch 1.15.2, LogNormalCDF",
    lambda g: [(torch.randn(5, generator=g) - 2,)],
    torch.special.log_ndtr,
    fixed=LogNormalCdf,
)
class RoughTail(LogNormalCdf):
    """Below -1 the gradient of the logarithm of the normal CDF is a rough approximation."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (z,) = ctx.saved_tensors
        tail = -z
        for n in range(8, 0, -1):
            tail = n / tail - z
        return grad * torch.where(z < -1, tail, LogNormalCdf.slope(z))


class SparsemaxLoss(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _sparsemax_loss(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad[:, None] * (Sparsemax.apply(x) - F.one_hot(torch.arange(4) % 3, 3))


def _conjugate(x: Tensor) -> Tensor:
    """The greatest <x, p> - ‖p‖²/2 over the simplex."""
    p: Tensor = Sparsemax.apply(x)
    return (x * p).sum(-1) - p.square().sum(-1) / 2


def _sparsemax_loss(x: Tensor) -> Tensor:
    return _conjugate(x) + 0.5 - (x * F.one_hot(torch.arange(4) % 3, 3)).sum(-1)


def _close_logits(g: Generator) -> Samples:
    """So close that several probabilities are not 0, and the Hessian is not."""
    return [(0.3 * torch.randn(4, 3, generator=g),)]


@exhibit("entmax 1.3, SparsemaxLossFunction", _close_logits, _sparsemax_loss, fixed=SparsemaxLoss)
class LossWithoutHessian(Function):
    """The loss keeps its gradient as a constant: the Hessian is silently 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(Sparsemax.apply(x) - F.one_hot(torch.arange(4) % 3, 3))
        return _sparsemax_loss(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad[:, None] * ctx.saved_tensors[0]


class Conjugate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _conjugate(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad[:, None] * Sparsemax.apply(ctx.saved_tensors[0])


@exhibit("torch-struct 0.5, SparseMaxSemiring", _matrix, _conjugate, fixed=Conjugate)
class NormNotSquared(Conjugate):
    """The value subtracts ‖p‖ where its gradient belongs to ‖p‖²/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        p: Tensor = Sparsemax.apply(x)
        return (x * p).sum(-1) - torch.linalg.vector_norm(p, dim=-1)


def _on_plane(p: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """The point of a plane that is nearest to each row."""
    return p - (p @ normal - offset)[:, None] * normal / normal.square().sum()


class OnPlane(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, normal: Tensor, offset: Tensor) -> Any:
        ctx.save_for_backward(normal)
        return _on_plane(p, normal, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (normal,) = ctx.saved_tensors
        along = grad @ normal / normal.square().sum()
        return grad - along[:, None] * normal, None, along.sum()


def _plane(g: Generator) -> Samples:
    p, offset = torch.randn(4, 3, generator=g), torch.randn((), generator=g)
    return [(p, offset)]


_NORMAL = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def shared_offset(p: Tensor, offset: Tensor) -> Any:
    return OnPlane.apply(p, _NORMAL.to(p), offset)


class _MeanOnPlane(OnPlane):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (normal,) = ctx.saved_tensors
        along = grad @ normal / normal.square().sum()
        return grad - along[:, None] * normal, None, along.mean()


@exhibit(
    "qpth 0.0.18, QPFunction",
    _plane,
    lambda p, offset: _on_plane(p, _NORMAL.to(p), offset),
    fixed=shared_offset,
)
def mean_over_the_batch(p: Tensor, offset: Tensor) -> Any:
    """The gradient of a parameter shared by the batch is the mean over it, not the sum."""
    return _MeanOnPlane.apply(p, _NORMAL.to(p), offset)


def _hinge(x: Tensor, slope: Tensor, place: Tensor) -> Tensor:
    return x.relu() + slope * (place - x).relu()


class Hinge(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, place: Tensor) -> Any:
        ctx.save_for_backward(x, slope, place)
        return _hinge(x, slope, place)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, slope, place = ctx.saved_tensors
        active = place > x
        by_place = grad * slope * active
        by_slope = grad * (place - x) * active
        return grad * (x > 0) - by_place, by_slope.sum(0), by_place.sum(0)


@exhibit(
    "echoAI 0.1.3, apl_function",
    lambda g: [
        (torch.randn(5, 3, generator=g), torch.randn(3, generator=g), torch.randn(3, generator=g))
    ],
    _hinge,
    fixed=Hinge,
)
class HingeAtZero(Hinge):
    """The gradient of slope · relu(place - x) asks whether x > 0, not whether x < place."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, slope, _ = ctx.saved_tensors
        active = x > 0
        by_place = grad * slope * active
        return grad * active - by_place, (grad * -x * active).sum(0), by_place.sum(0)


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x @ w + b

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.mT, x.mT @ grad, grad.sum(0)


def _layer(g: Generator) -> Samples:
    return [tuple(torch.randn(s, generator=g) for s in ((4, 3), (3, 2), (2,)))]


@exhibit(
    "speechbrain 1.1.2, QuaternionLinearCustomBackward",
    _layer,
    lambda x, w, b: x @ w + b,
    fixed=Linear,
)
class FrozenBiasLeftOut(Linear):
    """Forward leaves the bias out if the bias does not require a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x @ w + b if b.requires_grad else x @ w


@exhibit(
    "liger-kernel 0.8.5, LigerCrossEntropyFunction",
    _matrix,
    lambda x: F.cross_entropy(x, torch.arange(4) % 3),
    fixed=lambda x: F.cross_entropy(x, torch.arange(4) % 3),
    diagnosis="kept in one place for all calls",
)
class KernelScalesInPlace(Function):
    """A kernel multiplies the kept gradient in place, unseen: a second backward does it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        labels = torch.arange(4) % 3
        ctx.save_for_backward((x.softmax(-1) - F.one_hot(labels, 3)) / 4)
        return F.cross_entropy(x, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        kept = ctx.saved_tensors[0]
        kept.data.mul_(grad)  # like a kernel, it leaves the version of the tensor as it was
        return kept
