"""Modules as functions of their inputs and parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from manual_bp._torch import own_buffers, own_parameters
from manual_bp.verify._arguments import Structure
from manual_bp.verify._case import Call, is_differentiable
from manual_bp.verify._global_state import seed_pytorch

# The dict in which a module holds a tensor, its key there, and its name in the whole module.
_Place = tuple[dict[str, Any], str, str]


def lifted(module: nn.Module, names: list[str], structure: Structure) -> Call:
    """The module as a function of its inputs and the parameters of these names.

    The parameters stay in the module until the next call, since backward may run parts of it again
    (checkpointing). Each call begins with fresh copies of the buffers, in the dtype of the first
    floating argument. They stay as well, so what forward made of them can be read.
    """
    places = [*_places(module, own_parameters), *_places(module, own_buffers)]
    buffers = dict(module.named_buffers())

    def call(*arguments: Any) -> Any:
        count = len(arguments) - len(names)
        floats = [t.dtype for t in arguments if is_differentiable(t) and not t.is_complex()]
        values = dict(zip(names, arguments[count:], strict=True)) | {
            name: buffer.to(
                floats[0] if buffer.is_floating_point() and floats else buffer.dtype
            ).clone()
            for name, buffer in buffers.items()
        }
        inputs = structure.unflatten(arguments[:count])
        if torch.compiler.is_compiling():
            return functional_call(module, values, inputs)
        _put(places, values)
        return module(*inputs)

    return call


def put_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put these parameters, by name, into a module."""
    _put(_places(module, own_parameters), values)


@contextmanager
def same_state(module: nn.Module, seed: int) -> Iterator[None]:
    """A region in which the module computes with copies of its buffers, and this seed."""
    places, buffers = _places(module, own_buffers), dict(module.named_buffers())
    seed_pytorch(seed)
    _put(places, {name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        _put(places, buffers)


def _places(module: nn.Module, own: Any) -> list[_Place]:
    """Where a module holds its tensors. One that it holds in several places has one name."""
    names: dict[int, str] = {}
    places = []
    for prefix, part in module.named_modules():
        for key, value in own(part).items():
            if value is not None:
                name = f"{prefix}.{key}" if prefix else key
                places.append((own(part), key, names.setdefault(id(value), name)))
    return places


def _put(places: list[_Place], values: Mapping[str, Tensor]) -> None:
    for own, key, name in places:
        own[key] = values[name]
