"""What an autocast region does to the arguments of matrix products and losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from manual_bp._torch import any_autocast_is_on


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region casts them for a matrix product; unchanged outside of one.

    The cast must be a separate step before the Function: a backward runs outside the region, so a
    Function that cast inside would get gradients of another dtype than what it saved.
    """
    return _cast(tensors, torch.get_autocast_dtype) if any_autocast_is_on() else tensors


# Asked once, because the compiler of PyTorch 2.11 cannot trace the question. Its own way to mark
# an answer as constant, assume_constant_result, would import the whole compiler here.
_AUTOCAST = {
    device_type: torch.amp.is_autocast_available(device_type)
    for device_type in ("cpu", "cuda", "hpu", "meta", "mps", "mtia", "xla", "xpu")
}


def _has_autocast(device_type: str) -> bool:
    known = _AUTOCAST.get(device_type)
    return torch.amp.is_autocast_available(device_type) if known is None else known


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A region in which autocast does not apply to tensors on the device of t."""
    device_type = t.device.type
    if any_autocast_is_on() and _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_to_float32(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region casts them for a loss, to float32; unchanged outside."""
    return _cast(tensors, lambda _: torch.float32) if any_autocast_is_on() else tensors


def _cast(
    tensors: tuple[Tensor | None, ...], dtype_for: Callable[[str], torch.dtype]
) -> tuple[Tensor | None, ...]:
    return tuple(
        tensor.to(dtype_for(tensor.device.type)) if _is_castable(tensor) else tensor
        for tensor in tensors
    )


def _is_castable(tensor: object) -> TypeGuard[Tensor]:
    # PyTorch's own rule: float64, integers and complex numbers are not cast.
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and _has_autocast(tensor.device.type)
        and torch.is_autocast_enabled(tensor.device.type)
    )
