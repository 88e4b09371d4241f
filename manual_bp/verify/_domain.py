"""Arguments that must stay in a domain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._budget import largest
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import first_line
from manual_bp.verify._precision import widen

Project = Callable[[Tensor], Tensor]
Numbers = Sequence[float]


def domains(
    project: Mapping[str, Project] | Mapping[int, Project] | None,
    labels: Sequence[str],
    owners: Sequence[int],
    samples: Sequence[Sample],
) -> dict[int, Project]:
    """The projection of each tensor that has one; for the errors see the next three."""
    found: dict[int, Project] = by_position("project", project, labels, owners)
    require_domains(found, labels, samples)
    return found


def special_values(
    special: Mapping[str, Numbers] | Mapping[int, Numbers] | None,
    labels: Sequence[str],
    owners: Sequence[int],
    samples: Sequence[Sample],
) -> dict[int, tuple[float, ...]]:
    """The special values of each tensor that has some.

    Raises:
        TypeError: special is not a dict, or not of lists of numbers for tensors, of whole ones for
            integer tensors.
        ValueError: No argument has such a name or position, or one is named twice.
    """
    found = by_position("special", special, labels, owners)
    for i, values in found.items():
        name, value = f"special[{labels[i]!r}]", samples[0][i]
        is_list = isinstance(values, list | tuple) and len(values) > 0
        if not (is_list and all(isinstance(value, int | float) for value in values)):
            raise TypeError(f"{name} must be a list of numbers; got {values!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be for a tensor; got one for a {type(value).__name__}")
        if not is_differentiable(value) and any(number % 1 for number in values):
            raise TypeError(f"{name} must be whole numbers for {value.dtype}; got {values!r}")
    return {i: tuple(values) for i, values in found.items()}


def by_position(
    option: str, given: Mapping[Any, Any] | None, labels: Sequence[str], owners: Sequence[int]
) -> dict[int, Any]:
    """What an option gives for arguments by name or position, by the position of each tensor.

    Args:
        option: Its name.
        given: Its value. The name of a nested argument means all tensors in it.
        labels: The name of each tensor.
        owners: The position of the argument in which each tensor is.

    Raises:
        TypeError: It is not a dict.
        ValueError: No argument has such a name or position, or one is named twice.
    """
    if not isinstance(given or {}, Mapping):
        raise TypeError(f"{option} must be a dict by argument; got {given!r}")
    found: dict[int, Any] = {}
    for key, value in (given or {}).items():
        places = [
            i
            for i, (label, owner) in enumerate(zip(labels, owners, strict=True))
            if key in (label, owner) or label.startswith(f"{key}[")
        ]
        if not places:
            raise ValueError(f"{option} must name arguments of {list(labels)}; got {key!r}")
        if twice := [labels[i] for i in places if i in found]:
            raise ValueError(f"{option} must name each argument once; got {twice[0]!r} twice")
        found |= dict.fromkeys(places, value)
    return found


def require_domains(
    project: Mapping[int, Project], labels: Sequence[str], samples: Sequence[Sample]
) -> None:
    """Raise a TypeError or ValueError unless each sample is in the domain of each argument."""
    for i, function in project.items():
        name = f"project[{labels[i]!r}]"
        if not callable(function):
            raise TypeError(f"{name} must be callable; got {type(function).__name__}")
        for sample in samples:
            if not is_differentiable(sample[i]):
                continue
            value = widen(sample[i])
            try:
                projected = function(value.clone())
            except Exception as error:
                raise ValueError(
                    f"{name} must map the samples into the domain; it raised {first_line(error)}"
                ) from error
            kind = _kind(projected)
            if kind != (wanted := _kind(value)):
                raise ValueError(f"{name} must return a {wanted}, as it is given one; got a {kind}")
            eps = torch.finfo(sample[i].dtype).eps
            change = (projected - value).abs().max().item() if value.numel() else 0.0
            if not change <= 100 * eps * max(1.0, value.abs().max().item()):
                raise ValueError(
                    f"{name} must leave the samples as they are, since they are in the domain; "
                    f"got a change of {change:.3g}"
                )


def projected(project: Mapping[int, Project], arguments: Sample) -> Sample:
    """Arguments in their domains. One that is in its domain is returned as it is."""
    return tuple(
        _into(project[i], t) if i in project and is_differentiable(t) else t
        for i, t in enumerate(arguments)
    )


def projected_directions(
    project: Mapping[int, Project], arguments: Sample, directions: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Directions along which arguments stay in their domains, to first order.

    At the edge of a domain, one side of a direction may lead out of it.
    """
    return {
        i: _tangent(project[i], arguments[i], along) if i in project else along
        for i, along in directions.items()
    }


def _tangent(function: Project, value: Tensor, along: Tensor) -> Tensor:
    start, direction = widen(value), widen(along)
    step = 1e-6 * max(1.0, largest(value))
    behind, ahead = (function(start + shift * direction) for shift in (-step, step))
    tangent: Tensor = ((ahead - behind) / (2 * step)).to(along.dtype)
    return tangent


def _kind(value: object) -> str:
    """A shape and a dtype in words, or the class of what is no tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"tensor of shape {tuple(value.shape)} and {value.dtype}"


def _into(function: Project, value: Tensor) -> Tensor:
    found = function(widen(value).clone()).to(value.dtype)
    return value if torch.equal(found, value) else found
