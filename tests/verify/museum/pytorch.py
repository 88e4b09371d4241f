"""Of pytorch/pytorch: its own operators."""

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


def _points(g: Generator) -> Samples:
    return [(torch.randn(4, 3, generator=g), torch.randn(5, 3, generator=g))]


def _distances(x: Tensor, y: Tensor) -> Any:
    return torch.linalg.vector_norm(x[:, None] - y, dim=-1)


class Distances(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        distance = _distances(x, y)
        ctx.save_for_backward(x, y, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, y, distance = ctx.saved_tensors
        slopes = (grad / distance).where(distance != 0, 0.0)[..., None] * (x[:, None] - y)
        return slopes.sum(1), -slopes.sum(0)


@exhibit(
    "pytorch/pytorch#26076",
    _points,
    _distances,
    fixed=Distances,
    diagnosis="right only for contiguous upstream gradients",
)
class DistancesOfStridedUpstream(Distances):
    """The gradient of pairwise distances reads the upstream gradient as if it were contiguous."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Distances.backward(ctx, read_as_contiguous(grad))


class LeakyRelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = F.leaky_relu(x, -2.0)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _ = ctx.saved_tensors
        return grad.where(x > 0, -2 * grad)


@exhibit("pytorch/pytorch#31938", _matrix, lambda x: F.leaky_relu(x, -2.0), fixed=LeakyRelu)
class SignOfTheOutput(LeakyRelu):
    """Backward of leaky_relu takes the sign from the output, which a negative slope has changed."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, y = ctx.saved_tensors
        return grad.where(y > 0, -2 * grad)


def _all_masked(g: Generator) -> Samples:
    x = torch.randn(5, 3, generator=g)
    x[2] = -torch.inf
    return [(x,)]


def _logsumexp(x: Tensor) -> Tensor:
    top = x.detach().amax(-1, keepdim=True)
    top = top.where(top.isfinite(), 0.0)
    total = (x - top).exp().sum(-1)
    is_empty = total == 0
    return total.where(~is_empty, 1.0).log().where(~is_empty, -torch.inf) + top[..., 0]


class LogSumExp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        total = torch.logsumexp(x, -1)
        ctx.save_for_backward(x, total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, total = ctx.saved_tensors
        shift = total.where(total != -torch.inf, 0.0)
        return (x - shift[..., None]).exp() * grad[..., None]


@exhibit("pytorch/pytorch#31829", _all_masked, _logsumexp, fixed=LogSumExp)
class LogSumExpOfMasked(LogSumExp):
    """The gradient of logsumexp is exp(x - y), which is nan where all x and y are -∞."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, total = ctx.saved_tensors
        return (x - total[..., None]).exp() * grad[..., None]


def _speech(g: Generator) -> Samples:
    return [(torch.randn(4, 3, 5, generator=g),)]


_LABELS = [[1, 2], [3, 3], [4, 1]]


def _ctc(logits: Tensor) -> Tensor:
    lengths = torch.full((3,), 4), torch.full((3,), 2)
    return F.ctc_loss(logits.log_softmax(-1), torch.tensor(_LABELS), *lengths, reduction="none")


class Ctc(Function):
    """The CTC loss of the logits of 4 frames, for each of 3 utterances with 2 labels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Any:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = _ctc(leaf)
            (slope,) = torch.autograd.grad(loss.sum(), leaf)
        probability = logits.softmax(-1)
        ctx.save_for_backward(probability, probability - slope)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        probability, posterior = ctx.saved_tensors
        return (probability - posterior) * grad[:, None]


@exhibit("pytorch/pytorch#11750", _speech, _ctc, fixed=Ctc)
class CtcForgetsUpstream(Ctc):
    """One of the two terms of the CTC gradient is not multiplied by the upstream gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        probability, posterior = ctx.saved_tensors
        return probability - posterior * grad[:, None]


# All ways in which 3 frames spell the label 1, with the blank 0.
_PATHS = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]


def _frames(g: Generator) -> Samples:
    return [(torch.randn(3, 4, generator=g).log_softmax(-1),)]


def _path_scores(log_probability: Tensor) -> Tensor:
    return log_probability[torch.arange(3), torch.tensor(_PATHS)].sum(-1)


def _path_loss(log_probability: Tensor) -> Tensor:
    return -_path_scores(log_probability).logsumexp(0)


class PathLoss(Function):
    """The CTC loss of log-probabilities."""

    @staticmethod
    def forward(ctx: Any, log_probability: Tensor) -> Any:
        ctx.save_for_backward(log_probability)
        return _path_loss(log_probability)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (log_probability,) = ctx.saved_tensors
        passed = F.one_hot(torch.tensor(_PATHS), log_probability.shape[-1]).to(grad.dtype)
        weight = _path_scores(log_probability).softmax(0)
        return -grad * torch.einsum("p,ptc->tc", weight, passed)


@exhibit("pytorch/pytorch#52241", _frames, _path_loss, fixed=PathLoss)
class CtcByTheLogits(PathLoss):
    """The CTC loss takes log-probabilities, but returns the gradient by the logits behind them."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (log_probability,) = ctx.saved_tensors
        return grad * log_probability.exp() + PathLoss.backward(ctx, grad)


def _grouped(g: Generator) -> Samples:
    return [(torch.randn(2, 4, 6, generator=g), torch.randn(4, 2, 3, generator=g))]


def _convolved(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(x, w, groups=2)


class GroupedConvolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return _convolved(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return GroupedConvolution.gradients(x, w, grad, x.unflatten(1, (2, -1)))

    @staticmethod
    def gradients(x: Tensor, w: Tensor, grad: Tensor, groups_of_x: Tensor) -> Any:
        grad_x = F.conv_transpose1d(grad, w, groups=2)
        windows = groups_of_x.unfold(-1, w.shape[-1], 1)
        by_group = torch.einsum("ngot,ngitk->goik", grad.unflatten(1, (2, -1)), windows)
        return grad_x, by_group.flatten(0, 1)


@exhibit("pytorch/pytorch#51430", _grouped, _convolved, fixed=GroupedConvolution)
class ChannelsOfAnotherGroup(GroupedConvolution):
    """The weight gradient of a grouped convolution pairs outputs with another group's inputs."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        interleaved = x.unflatten(1, (-1, 2)).transpose(1, 2)
        return GroupedConvolution.gradients(x, w, grad, interleaved)


_CHOSEN = [[0, 0, 2], [0, 1, 2], [3, 1, 0]]


def _gathered(x: Tensor) -> Tensor:
    return x.gather(0, torch.tensor(_CHOSEN))


class Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.shape = x.shape
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.new_zeros(ctx.shape).scatter_add(0, torch.tensor(_CHOSEN), grad)


@exhibit(
    "pytorch/pytorch#1631",
    lambda g: [(torch.randn(4, 3, generator=g),)],
    _gathered,
    fixed=Gather,
)
class RepeatedIndices(Gather):
    """The gradient of gather is written, not added: of a repeated index the last one counts."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.new_zeros(ctx.shape).scatter(0, torch.tensor(_CHOSEN), grad)
