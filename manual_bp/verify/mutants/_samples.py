"""Samples of arguments."""

from typing import Any

import torch
from torch import Generator, Tensor

Samples = list[tuple[Any, ...]]

IN, OUT = 3, 4


def _randn(g: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=dtype)


def _operands(g: Generator, *leading: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    shapes = ((*leading, IN), (OUT, IN), (OUT,))
    return tuple(_randn(g, *shape, dtype=dtype) for shape in shapes)


def linear(g: Generator) -> Samples:
    """Input, weight and bias of a linear layer."""
    return [_operands(g, 5)]


def complex_linear(g: Generator) -> Samples:
    """The same, complex."""
    return [_operands(g, 5, dtype=torch.complex128)]


def square_linear(g: Generator) -> Samples:
    """The same, with a square weight."""
    return [(_randn(g, 5, 3), _randn(g, 3, 3), _randn(g, 3))]


def stacked_linear(g: Generator) -> Samples:
    """The same, with one and with two batch dimensions."""
    return [_operands(g, 5), _operands(g, 2, 5)]


def elementwise(g: Generator) -> Samples:
    """One matrix."""
    return [(_randn(g, 5, 3),)]


def with_zeros(g: Generator) -> Samples:
    """One matrix, in which some elements are 0."""
    x = _randn(g, 5, 3)
    return [(x.where(torch.arange(15).view(5, 3) % 4 > 0, 0),)]


def pair(g: Generator) -> Samples:
    """Two matrices of the same shape."""
    return [(_randn(g, 5, 3), _randn(g, 5, 3))]


def transposed_pair(g: Generator) -> Samples:
    """The same, transposed in memory."""
    return [(_randn(g, 3, 5).mT, _randn(g, 3, 5).mT)]


def columns_of_wider(g: Generator) -> Samples:
    """The same, each every second column of a wider one."""
    return [(_randn(g, 5, 6)[:, ::2], _randn(g, 5, 6)[:, ::2])]


def images(g: Generator) -> Samples:
    """Two batches of images."""
    return [(_randn(g, 2, 3, 4, 5), _randn(g, 2, 3, 4, 5))]


def scale(g: Generator) -> Samples:
    """A matrix and a factor for each of its columns."""
    return [(_randn(g, 5, 3), _randn(g, 3))]


def rows_to_look_up(g: Generator) -> Samples:
    """A table and indices of its rows, some twice, some never and one to be ignored."""
    return [(_randn(g, 7, IN), torch.tensor([4, 1, -1, 4, 2]))]


def dropout(g: Generator) -> Samples:
    """A matrix, a mask and the probability of a zero."""
    return [(_randn(g, 5, 3), torch.rand(5, 3, generator=g) < 0.8, 0.2)]


def uneven(g: Generator) -> Samples:
    """One large row above many small ones."""
    small = 0.85 + 0.05 * torch.rand(40, 2, generator=g, dtype=torch.float64)
    return [(torch.cat([torch.full((1, 2), 256.0, dtype=torch.float64), small]),)]


def long_rows(g: Generator) -> Samples:
    """A matrix whose rows are long enough that what all their elements share shows."""
    return [(_randn(g, 6, 256),)]


def far(g: Generator) -> Samples:
    """Values far from zero, whose squares sum to more than float16 can hold."""
    return [(20 + _randn(g, 50, 6),)]


def scores_and_labels(g: Generator) -> Samples:
    """Scores of four classes, and the labels."""
    return [(_randn(g, 5, 4), torch.randint(4, (5,), generator=g))]
