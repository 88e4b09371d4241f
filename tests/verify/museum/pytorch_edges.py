"""Of pytorch/pytorch: ties, zeros, borders and -inf."""

from functools import reduce
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.museum._exhibit import exhibit

Samples = list[tuple[Any, ...]]


def _matrix(g: Generator) -> Samples:
    return [(torch.randn(5, 3, generator=g),)]


def _few_integers(g: Generator) -> Samples:
    return [tuple(torch.randint(3, (5, 3), generator=g).double() for _ in range(2))]


class Maximum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.maximum(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        return grad * (x > y) + grad * (x == y) / 2, grad * (x < y) + grad * (x == y) / 2


@exhibit(
    "pytorch/pytorch#56734",
    _few_integers,
    torch.maximum,
    fixed=Maximum,
    diagnosis="zero",
)
class TiesToTheSecond(Maximum):
    """Where both arguments of a maximum are equal, the second gets the whole gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y = ctx.saved_tensors
        return grad * (x > y), grad * (x <= y)


class Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        norm = torch.linalg.vector_norm(x, dim=-1)
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, norm = ctx.saved_tensors
        return x * (grad / norm).where(norm != 0, 0.0)[..., None]


@exhibit("pytorch/pytorch#2421", _matrix, lambda x: torch.linalg.vector_norm(x, dim=-1), fixed=Norm)
class NormOfZeros(Norm):
    """The gradient of a norm divides by the norm, so that it is nan where all elements are 0."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, norm = ctx.saved_tensors
        return x * (grad / norm)[..., None]


class Std(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        std = x.std(-1)
        ctx.save_for_backward(x, std)
        return std

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, std = ctx.saved_tensors
        slope = (grad / std).where(std != 0, 0.0)[..., None]
        return (x - x.mean(-1, keepdim=True)) * slope / (x.shape[-1] - 1)


@exhibit("pytorch/pytorch#4320", _matrix, lambda x: x.std(-1), fixed=Std)
class StdOfEqualNumbers(Std):
    """The gradient of a standard deviation of 0, of equal numbers, is 0 / 0."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, std = ctx.saved_tensors
        centred = x - x.mean(-1, keepdim=True)
        return centred * (grad / std)[..., None] / (x.shape[-1] - 1)


def _rows_with_equal_entries(g: Generator) -> Samples:
    x, y = torch.randn(4, 3, generator=g), torch.randn(5, 3, generator=g)
    y[0, 1] = x[2, 1]
    return [(x, y)]


def _fractional(x: Tensor, y: Tensor) -> Tensor:
    size = (x[:, None] - y).abs()
    return size.where(size != 0, 1.0).sqrt().where(size != 0, 0.0).sum(-1).square()


class Fractional(Function):
    """The distance (Σ |x - y|^p)^(1/p) of all pairs of rows, for p = 1/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        distance = _fractional(x, y)
        ctx.save_for_backward(x, y, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, y, distance = ctx.saved_tensors
        return Fractional.gradients(x, y, grad * distance.sqrt(), power_of_zero=0.0)

    @staticmethod
    def gradients(x: Tensor, y: Tensor, grad: Tensor, power_of_zero: float) -> Any:
        difference = x[:, None] - y
        power = difference.abs().rsqrt().where(difference != 0, power_of_zero)
        slopes = difference.sign() * power * grad[..., None]
        return slopes.sum(1), -slopes.sum(0)


@exhibit("pytorch/pytorch#36493", _rows_with_equal_entries, _fractional, fixed=Fractional)
class FractionalDistance(Fractional):
    """For p < 1 the gradient has the sign of x - y times a negative power of it: 0 · ∞ if x = y."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, y, distance = ctx.saved_tensors
        return Fractional.gradients(x, y, grad * distance.sqrt(), power_of_zero=torch.inf)


def _powers(g: Generator) -> Samples:
    base = torch.rand(5, 3, generator=g)
    base[1, 2] = 0
    return [(base, 1 + torch.rand(5, 3, generator=g))]


class Power(Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, exponent: Tensor) -> Any:
        power = base**exponent
        ctx.save_for_backward(base, exponent, power)
        return power

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        base, exponent, power = ctx.saved_tensors
        by_base = grad * (exponent * base ** (exponent - 1)).where(exponent != 0, 0.0)
        by_exponent = (power * base.log()).where((base != 0) | (exponent < 0), 0.0)
        return by_base, grad * by_exponent


@exhibit("pytorch/pytorch#27134", _powers, torch.pow, fixed=Power)
class PowerOfZero(Power):
    """The gradient of a^b by b has a^b log(a), which is 0 · -∞ for a = 0."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        base, _, power = ctx.saved_tensors
        by_base, _ = Power.backward(ctx, grad)
        return by_base, grad * power * base.log()


def _two_zeros(g: Generator) -> Samples:
    x = torch.randn(5, 4, generator=g)
    x[1, :2] = 0
    return [(x,)]


class Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.prod(-1)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        columns = list(x.unbind(-1))
        others = [reduce(torch.mul, columns[:i] + columns[i + 1 :]) for i in range(len(columns))]
        return torch.stack(others, -1) * grad[..., None]


@exhibit(
    "pytorch/pytorch#106789",
    _two_zeros,
    lambda x: reduce(torch.mul, x.unbind(-1)),
    fixed=Product,
    diagnosis="zero",
)
class ProductOfTwoZeros(Product):
    """A product with two zeros has the gradient 0, which was made as a constant: no Hessian."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        zeros = (x == 0).sum(-1, keepdim=True)
        return Product.backward(ctx, grad).where(zeros < 2, 0.0)


_GROUP_OF = [0, 1, 0, 2, 1, 0]


def _products_of_groups(x: Tensor) -> Tensor:
    chosen = torch.arange(3)[:, None] == torch.tensor(_GROUP_OF)
    return reduce(torch.mul, x.where(chosen, 1.0).unbind(-1))


class ScatteredProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return _products_of_groups(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        one = torch.eye(len(x), dtype=torch.bool)
        without = torch.stack([_products_of_groups(x.where(~hole, 1.0)) for hole in one], -1)
        chosen = torch.arange(3)[:, None] == torch.tensor(_GROUP_OF)
        return (without.where(chosen, 0.0) * grad[:, None]).sum(0)


def _line(g: Generator) -> Samples:
    return [(torch.randn(6, generator=g),)]


@exhibit(
    "pytorch/pytorch#76523",
    _line,
    _products_of_groups,
    fixed=ScatteredProduct,
    diagnosis="zero",
)
class ScatteredProductOfZero(ScatteredProduct):
    """The gradient of products of groups divides by x, and is set to 0 where x = 0."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return ((grad * _products_of_groups(x))[torch.tensor(_GROUP_OF)] / x).where(x != 0, 0.0)


def _pixels(g: Generator) -> Samples:
    place = 4 * torch.rand(6, generator=g)
    place[2] = 4  # the last pixel
    return [(torch.randn(5, generator=g), place)]


def _interpolated(image: Tensor, place: Tensor) -> Tensor:
    """Linear interpolation in a line of pixels, which its ends continue."""
    inside = place.clamp(0, len(image) - 1)
    left = inside.detach().floor().long()
    right = (left + 1).clamp(max=len(image) - 1)
    return image[left].lerp(image[right], inside - left)


class Interpolate(Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, place: Tensor) -> Any:
        ctx.save_for_backward(image, place)
        return _interpolated(image, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        image, place = ctx.saved_tensors
        return Interpolate.gradients(image, place, grad, beyond=image[-1])

    @staticmethod
    def gradients(image: Tensor, place: Tensor, grad: Tensor, beyond: Tensor) -> Any:
        is_inside = (place >= 0) & (place <= len(image) - 1)
        inside = place.clamp(0, len(image) - 1)
        left = inside.floor().long()
        share = inside - left
        grad_image = torch.zeros(len(image) + 1, dtype=image.dtype)
        grad_image.index_add_(0, left, (1 - share) * grad).index_add_(0, left + 1, share * grad)
        longer = torch.cat([image, beyond[None]])
        return grad_image[:-1], ((longer[left + 1] - longer[left]) * grad).where(is_inside, 0.0)


@exhibit("pytorch/pytorch#23925", _pixels, _interpolated, fixed=Interpolate)
class BeyondTheBorder(Interpolate):
    """On the last pixel the slope goes to a 0 beyond the border, not to a repeated pixel."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        image, place = ctx.saved_tensors
        return Interpolate.gradients(image, place, grad, beyond=torch.zeros_like(image[-1]))
