"""The checks of arguments, and the one place that words their errors.

Every message names the argument, what it must be and what was given. A wrong type (no tensor, an
integer tensor, another dtype) is a TypeError; a wrong value (shape, device, option) is a
ValueError.
"""

import os
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor, strided

from manual_bp._function import has_concrete_values


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor that is neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout is strided and not value.is_nested


def tensor(name: str, value: object) -> None:
    """Refuse anything but a dense tensor."""
    # `is_dense`, without the call: this runs whenever a layer is called.
    if isinstance(value, Tensor) and value.layout is strided and not value.is_nested:
        return
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        hint = ", which torch.from_numpy turns into one" if kind == "ndarray" else ""
        raise TypeError(f"{name} must be a torch.Tensor; got {kind}{hint}")
    kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
    raise TypeError(f"{name} must be a dense tensor; got {kind}")


def real(name: str, value: Tensor) -> None:
    """Refuse anything but a tensor of a real floating dtype."""
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a real floating-point dtype; got {value.dtype}")


def ordered(name: str, value: Tensor) -> None:
    """Refuse complex and boolean tensors, whose elements have no sign."""
    tensor(name, value)
    if value.dtype.is_complex or value.dtype is torch.bool:
        raise TypeError(f"{name} must have a real or integer dtype; got {value.dtype}")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse anything but a tensor with the dtype and device of another."""
    tensor(name, value)
    if value.dtype is not other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}; got {value.dtype}"
        )
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {value.device}"
        )


def shape(name: str, value: Tensor, wanted: Sequence[int], why: str) -> None:
    """Refuse any other shape. `why` says where the expected shape comes from."""
    if value.shape != wanted:
        raise ValueError(f"{name} must have shape {tuple(wanted)}, {why}; got {tuple(value.shape)}")


def matrix(name: str, value: Tensor, axes: str) -> None:
    """Refuse a tensor that does not have two dimensions. `axes` names them."""
    if value.ndim != 2:
        raise ValueError(f"{name} must have shape {axes}; got {tuple(value.shape)}")


def components(name: str, value: Tensor, wanted: int | None = None, why: str = "") -> None:
    """Refuse a tensor with no dimension, or with a last dimension of another size than expected."""
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, (..., components); got ()")
    if wanted is not None and value.shape[-1] != wanted:
        raise ValueError(
            f"{name} must have last dimension {wanted}, {why}; got {tuple(value.shape)}"
        )


def one_of(name: str, value: object, options: Sequence[str]) -> None:
    """Refuse anything but one of the options."""
    if not isinstance(value, str) or value not in options:
        wanted = ", ".join(repr(option) for option in options)
        given = repr(value) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name} must be one of {wanted}; got {given}")


def path(name: str, value: object) -> None:
    """Refuse anything but a str or a path-like object of one."""
    if not (isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)):
        raise TypeError(f"{name} must be a str or a pathlib.Path; got {type(value).__name__}")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below the least, or anything that cannot be compared with it."""
    try:
        is_met = value >= least
    except TypeError:
        raise TypeError(f"{name} must be a number; got {type(value).__name__}") from None
    if not is_met:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def number(name: str, value: object) -> float:
    """The number as a float; refuse anything else."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number that fits into a float; got one beyond {sys.float_info.max}"
        ) from None


def above(name: str, value: object, least: float) -> None:
    """Refuse anything but a number above the least."""
    if not number(name, value) > least:
        raise ValueError(f"{name} must be above {least}; got {value}")


def count(name: str, value: object) -> int:
    """The integer as an int, NumPy's too; refuse anything but one of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    at_least(name, int(value), 1)
    return int(value)


def not_zero(name: str, value: float) -> None:
    """Refuse the number 0."""
    if value == 0:
        raise ValueError(f"{name} must not be 0; got {value}")


def indices(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse anything but one class index for each row of another tensor (..., classes).

    Reads the values of plain CPU tensors only: on an accelerator this would wait for the device,
    and a tensor that is being traced or transformed has no values yet. There, the indexing itself
    (gather, scatter) raises PyTorch's own error.
    """
    if value.dtype is torch.bool or value.dtype.is_complex:
        raise TypeError(f"{name} must hold integers or probabilities; got {value.dtype}")
    same_device(name, value, other_name, other)
    classes = other.shape[-1]
    shape(name, value, other.shape[:-1], f"a class index for each row of {other_name}")
    if value.device.type != "cpu" or not has_concrete_values(value) or not value.numel():
        return
    if classes == 0:
        raise ValueError(f"{other_name} must have at least one class; got {tuple(other.shape)}")
    value = value.long()  # not every integer dtype has a minimum
    least, most = int(value.min()), int(value.max())
    if least < 0 or most >= classes:
        raise ValueError(
            f"{name} must hold class indices from 0 to {classes - 1}; got {least} to {most}"
        )
