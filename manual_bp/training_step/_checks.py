"""What a step accepts: parameters that can be updated in place, and numbers that they can hold."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp import _net, _require
from manual_bp.training_step._overlap import overlapping, overlaps_itself
from manual_bp.training_step._pass import Descent

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require_trainable(layers: Sequence[_net.Layer]) -> None:
    """Refuse parameters that cannot be updated in place, and activations without σ' from a."""
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    for name, parameter in parameters.items():
        _require_values(f"{name} of net", parameter)
        if parameter.requires_grad:
            _require_writable(f"{name} of net", parameter)
    _require_apart(parameters)
    for layer in layers:
        for activation in layer.activations:
            activation.require_options()
            activation.require_slope_from_a()


def _require_values(name: str, parameter: Tensor) -> None:
    if type(parameter.data) is not Tensor:
        raise TypeError(f"{name} must be a plain tensor; got {type(parameter.data).__name__}")
    if parameter.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be of float16, bfloat16, float32 or float64; got {parameter.dtype}"
        )
    if parameter.is_meta:
        raise ValueError(f"{name} must have values to train; got a meta tensor")


def _require_writable(name: str, parameter: Tensor) -> None:
    if overlaps_itself(parameter):
        kind = "an expanded tensor" if 0 in parameter.stride() else "one that overlaps itself"
        raise ValueError(
            f"{name} must have memory for each of its elements; got {kind}, "
            f"strides {parameter.stride()}"
        )
    if parameter.is_inference():
        raise ValueError(
            f"{name} must be made outside of inference mode, because a step cannot change an "
            f"inference tensor; got one"
        )


def _require_apart(parameters: Mapping[str, Tensor]) -> None:
    for other, name in overlapping(parameters):
        one, two = parameters[other], parameters[name]
        if one.requires_grad or two.requires_grad:
            is_same = one.data_ptr() == two.data_ptr() and one.numel() == two.numel()
            raise ValueError(
                f"{name} of net must share no memory with another parameter, because one would be "
                f"updated before BP2 has read the other; got "
                f"{'the memory of' if is_same else 'memory that overlaps'} {other}"
            )


def checked_numbers(dtype: torch.dtype, lr: object, descent: Descent) -> tuple[float, Descent]:
    """The numbers as floats; refuse any that PyTorch would refuse in the middle of a step."""
    lr = checked_number("lr", lr)
    descent = Descent(*(checked_number(name, n) for name, n in descent._asdict().items()))
    require_within(dtype, lr, descent)
    return lr, descent


def require_within(dtype: torch.dtype, lr: float, descent: Descent) -> None:
    """Refuse numbers that the dtype of the parameters cannot hold."""
    most = torch.finfo(dtype).max
    numbers = {"lr": lr} | descent._asdict() | {"lr * weight_decay": lr * descent.weight_decay}
    for name, number in numbers.items():
        if number > most:
            raise ValueError(
                f"{name} must be at most {most}, the largest number of {dtype}; got {number}"
            )


def checked_number(name: str, value: object) -> float:
    """The number as a float; refuse one that is below 0 or infinite."""
    number = _require.number(name, value)
    _require.at_least(name, number, 0)
    if number == math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return number


def checked_velocities(
    velocities: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of saved velocities; refuse any that fits no parameter."""
    found = {}
    for name, velocity in velocities.items():
        place = f"velocities[{name!r}]"
        if name not in parameters:
            raise KeyError(f"velocities: net has no parameter {name!r}")
        _require.real(place, velocity)
        _require.shape(place, velocity, parameters[name].shape, "its parameter's")
        if velocity.is_meta:
            raise ValueError(f"{place} must have values; got a meta tensor")
        with torch.inference_mode(False):
            found[name] = velocity.detach().clone()
    return found


def require_mapping(name: str, value: object) -> None:
    """Refuse anything but a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping, as state_dict() gives it; got {type(value).__name__}"
        )


def require_tensor_rate(what: str, dtype: torch.dtype) -> None:
    """Refuse float16 for a step that multiplies δ by a rate in a tensor."""
    if dtype is torch.float16:
        raise TypeError(
            f"a step to be {what} must be of float64, float32 or bfloat16, because it multiplies δ "
            f"by a rate in a tensor, and the range of float16 is too small for that; got float16"
        )
