"""Of meta-pytorch/opacus: gradients of each sample."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit

_POSITIONS = [0, 1, 2, 1]


def _scaled(x: Tensor, table: Tensor) -> Tensor:
    return x * table[torch.tensor(_POSITIONS)]


class TableGradient(Function):
    """The gradient of a table of 3 rows, from those of the rows looked up in it."""

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        rows = torch.tensor(_POSITIONS)
        return grad.new_zeros(3, grad.shape[-1]).index_add(0, rows, grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad[torch.tensor(_POSITIONS)]

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor) -> Any:
        return torch.stack([TableGradient.apply(row) for row in grad.movedim(in_dims[0], 0)]), 0


class TableGradientOfOneSample(TableGradient):
    """Takes the number of samples from the positions, which all samples share: one."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor) -> Any:
        return TableGradient.apply(grad.sum(in_dims[0])), None


class LookUp(Function):
    """The rows of a table at fixed positions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor) -> Tensor:
        return table[torch.tensor(_POSITIONS)]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return TableGradient.apply(grad)


class SharedLookUp(LookUp):
    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return TableGradientOfOneSample.apply(grad)


def positions_embedded(x: Tensor, table: Tensor) -> Any:
    return x * LookUp.apply(table)


def _embeddings(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(5, 4, 2, generator=g), torch.randn(3, 2, generator=g))]


@exhibit(
    "meta-pytorch/opacus#841",
    _embeddings,
    _scaled,
    fixed=positions_embedded,
    in_dims=(0, None),
)
def positions_shared_by_all_samples(x: Tensor, table: Tensor) -> Any:
    """A sample's gradient of a position table is that of the batch, whose positions are shared."""
    return x * SharedLookUp.apply(table)
