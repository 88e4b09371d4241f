"""Cases of what PyTorch has no test samples for."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from manual_bp.verify._case import Case, Sample
from manual_bp.verify._make_case import function_case, module_case

Draw = Callable[[Generator], list[Sample]]


def own_cases(seed: int) -> Iterator[Callable[[], Case]]:
    """What makes a case of each function and module in the tables below."""
    for name, (call, draw, in_dims) in _FUNCTIONS.items():
        yield partial(function_case, call, draw, call, name=name, seed=seed, in_dims=in_dims)
    for name, (factory, samples) in _MODULES.items():
        yield partial(module_case, factory, samples, factory, name=name, seed=seed)


def _normal(*shapes: tuple[int, ...]) -> Draw:
    """Samples of normal random tensors of these shapes."""

    def draw(generator: Generator) -> list[Sample]:
        return [tuple(torch.randn(shape, generator=generator) for shape in shapes)]

    return draw


def _with(draw: Draw, *more: Any) -> Draw:
    """The same samples, with arguments added that are no tensors or have no gradient."""
    return lambda generator: [(*sample, *more) for sample in draw(generator)]


def _positive(*shapes: tuple[int, ...]) -> Draw:
    normal = _normal(*shapes)
    return lambda generator: [tuple(t.abs() + 0.5 for t in s) for s in normal(generator)]


def _log_probabilities(generator: Generator) -> list[Sample]:
    return [(torch.randn(5, 2, 4, generator=generator),)]


def _seeded(call: Callable[..., Any]) -> Callable[..., Any]:
    """A random function that always draws the same numbers."""

    def seeded(*arguments: Any) -> Any:
        torch.manual_seed(0)
        return call(*arguments)

    return seeded


def _ctc(x: Tensor) -> Tensor:
    targets = torch.tensor([[1, 2], [3, 1]])
    lengths = torch.tensor([5, 4]), torch.tensor([2, 1])
    return F.ctc_loss(x.log_softmax(-1), targets, *lengths, reduction="none")


def _gamma_inc(x: Tensor) -> Any:
    return torch.special.gammainc(torch.full_like(x, 1.5), x)


def _gamma_inc_c(x: Tensor) -> Any:
    return torch.special.gammaincc(torch.full_like(x, 1.5), x)


def _segment_reduce(x: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 3]), unsafe=True)


# Each with samples and the sample dimensions.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], Draw, Any]] = {
    "nn.functional.affine_grid": (
        lambda x: F.affine_grid(x, [2, 1, 3, 4], align_corners=False),
        _normal((2, 2, 3)),
        None,
    ),
    "nn.functional.conv_tbc": (
        lambda x, w, b: F.conv_tbc(x, w, b, 1),
        _normal((4, 2, 3), (3, 3, 5), (5,)),
        None,
    ),
    "nn.functional.ctc_loss": (_ctc, _log_probabilities, None),
    "nn.functional.dropout in evaluation": (
        lambda x: F.dropout(x, training=False),
        _normal((5, 3)),
        (0,),
    ),
    "nn.functional.dropout3d": (
        _seeded(F.dropout3d),
        _normal((2, 3, 1, 2, 2)),
        None,
    ),
    "nn.functional.feature_alpha_dropout": (
        _seeded(lambda x: F.feature_alpha_dropout(x, training=True)),
        _normal((2, 3, 1, 2, 2)),
        None,
    ),
    "nn.functional.fold": (
        lambda x: F.fold(x, (3, 4), (2, 2)),
        _normal((2, 12, 6)),
        (0,),
    ),
    "nn.functional.lp_pool1d": (lambda x: F.lp_pool1d(x, 2, 2), _positive((2, 3, 6)), (0,)),
    "nn.functional.lp_pool2d": (lambda x: F.lp_pool2d(x, 3, 2), _positive((2, 1, 4, 6)), (0,)),
    "nn.functional.lp_pool3d": (lambda x: F.lp_pool3d(x, 2, 2), _positive((1, 2, 2, 4, 2)), (0,)),
    "nn.functional.max_pool1d_with_indices": (
        lambda x: F.max_pool1d_with_indices(x, (2,)),
        _normal((2, 3, 6)),
        (0,),
    ),
    "nn.functional.max_pool2d_with_indices": (
        lambda x: F.max_pool2d_with_indices(x, (2, 2)),
        _normal((2, 1, 4, 6)),
        (0,),
    ),
    "nn.functional.max_pool3d_with_indices": (
        lambda x: F.max_pool3d_with_indices(x, (2, 2, 2)),
        _normal((1, 2, 2, 4, 2)),
        (0,),
    ),
    "nn.functional.adaptive_max_pool1d_with_indices": (
        lambda x: F.adaptive_max_pool1d_with_indices(x, (3,)),
        _normal((2, 3, 7)),
        (0,),
    ),
    "nn.functional.adaptive_max_pool2d_with_indices": (
        lambda x: F.adaptive_max_pool2d_with_indices(x, (2, 3)),
        _normal((2, 1, 4, 5)),
        (0,),
    ),
    "norm_except_dim": (lambda x: torch.norm_except_dim(x, 2, 1), _normal((2, 3, 4)), None),
    "segment_reduce": (_segment_reduce, _normal((5, 3)), None),
    "special.gammainc": (_gamma_inc, _positive((5, 3)), (0,)),
    "special.gammaincc": (_gamma_inc_c, _positive((5, 3)), (0,)),
    "select_copy": (lambda x: torch.select_copy(x, 1, 2), _normal((5, 3)), None),
    "slice_copy": (lambda x: torch.slice_copy(x, 1, 0, 3, 2), _normal((5, 3)), None),
    "split_copy": (lambda x: torch.split_copy(x, 2), _normal((5, 3)), None),
    "unsafe_split_with_sizes": (
        lambda x: torch.unsafe_split_with_sizes(x, [2, 3]),
        _normal((5, 3)),
        None,
    ),
    "bmm": (torch.bmm, _normal((2, 3, 4), (2, 4, 5)), (0, 0)),
    "slice_scatter": (
        lambda x, y: torch.slice_scatter(x, y, 1, 0, 4, 2),
        _normal((3, 5), (3, 2)),
        None,
    ),
    "grid_sampler_2d": (
        lambda x, g: torch.grid_sampler_2d(x, g, 0, 0, False),
        _normal((1, 2, 3, 4), (1, 2, 2, 2)),
        None,
    ),
}


def _targets(*shape: int, below: int = 3) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % below


_MODULES: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "nn.AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]),
        _with(_normal((5, 4)), _targets(5, below=6)),
    ),
    "nn.ChannelShuffle": (lambda: nn.ChannelShuffle(2), _normal((2, 4, 3, 2))),
    "nn.CosineSimilarity": (lambda: nn.CosineSimilarity(1), _normal((5, 3), (5, 3))),
    "nn.EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4), lambda _: [(_targets(5, 2, below=7),)]),
    "nn.Dropout in evaluation": (lambda: nn.Dropout().eval(), _normal((5, 3))),
    "nn.Flatten": (nn.Flatten, _normal((5, 2, 3))),
    "nn.Fold": (lambda: nn.Fold((3, 4), (2, 2)), _normal((2, 12, 6))),
    "nn.Hardsigmoid": (nn.Hardsigmoid, _normal((5, 3))),
    "nn.Identity": (nn.Identity, _normal((5, 3))),
    "nn.PairwiseDistance": (nn.PairwiseDistance, _normal((5, 3), (5, 3))),
    "nn.PixelShuffle": (lambda: nn.PixelShuffle(2), _normal((2, 4, 3, 2))),
    "nn.PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), _normal((2, 1, 4, 6))),
    "nn.RReLU in evaluation": (lambda: nn.RReLU().eval(), _normal((5, 3))),
    "nn.Sequential": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)),
        _normal((5, 3)),
    ),
    "nn.TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 3, 0.0), 1),
        _normal((3, 2, 4), (5, 2, 4)),
    ),
    "nn.TripletMarginLoss": (nn.TripletMarginLoss, _normal((5, 3), (5, 3), (5, 3))),
    "nn.TripletMarginWithDistanceLoss": (
        nn.TripletMarginWithDistanceLoss,
        _normal((5, 3), (5, 3), (5, 3)),
    ),
    "nn.Unflatten": (lambda: nn.Unflatten(1, (2, 3)), _normal((5, 6))),
    "nn.Unfold": (lambda: nn.Unfold((2, 2)), _normal((2, 1, 3, 4))),
    "nn.Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), _normal((2, 1, 3, 2))),
    "nn.UpsamplingBilinear2d": (
        lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        _normal((2, 1, 3, 2)),
    ),
    "nn.UpsamplingNearest2d": (
        lambda: nn.UpsamplingNearest2d(scale_factor=2),
        _normal((2, 1, 3, 2)),
    ),
}
