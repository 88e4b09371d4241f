"""Functions whose gradient is, on purpose, not the derivative."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import outputs_of, tensors_of
from manual_bp.verify._case import Call, is_differentiable


def intended(reference: Call, gradient_of: Call) -> Call:
    """The values of a reference with the gradients of another function, of any order and mode."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            values = tensors_of(reference(*arguments))
        sources = outputs_of(gradient_of(*arguments))
        wanted = [tuple(value.shape) for value in values if is_differentiable(value)]
        if wanted != [tuple(source.shape) for source in sources]:
            raise ValueError(
                f"gradient_of must give outputs of the shapes of the reference's, {wanted}; "
                f"got {[tuple(source.shape) for source in sources]}"
            )
        found = iter(sources)
        return tuple(_with_graph_of(v, found) if is_differentiable(v) else v for v in values)

    return call


def _with_graph_of(value: Tensor, sources: Any) -> Tensor:
    source: Tensor = next(sources)
    return value.detach() + (source - source.detach()).to(value.dtype)
