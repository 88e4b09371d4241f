"""What a step accepts: parameters that can be updated in place, and numbers that they can hold."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from manual_bp import _net, _require
from manual_bp._torch import any_autocast_is_on, transforms_are_active
from manual_bp.training_step._overlap import overlapping, overlaps_itself
from manual_bp.training_step._rules import Adam, Descent, Options

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


def require_all_apart(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory with each other, or within themselves."""
    for name, tensor in tensors.items():
        _require_writable(name, tensor)
    for other, name in overlapping(tensors):
        raise ValueError(f"{name} must share no memory with {other}; got some that it shares")


def checked_numbers(
    dtype: torch.dtype, lr: object, descent: Descent, names: Iterable[str]
) -> tuple[float, Descent]:
    """The numbers as floats; refuse any that PyTorch would refuse in the middle of a step."""
    lr = checked_number("lr", lr)
    numbers: dict[str, Any] = {n: checked_number(n, getattr(descent, n)) for n in _NUMBERS}
    descent = descent._replace(
        **numbers,
        groups=_checked_groups(descent.groups, names),
        max_norm=_checked_norm(descent.max_norm, dtype),
    )
    _require_rule(descent, dtype)
    require_within(dtype, lr, descent)
    return lr, descent


_NUMBERS = ("momentum", "weight_decay", "dampening")


def _checked_groups(groups: Any, names: Iterable[str]) -> dict[str, dict[str, float]]:
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"groups must be a mapping of patterns to options; got {type(groups).__name__}"
        )
    names, found = list(names), {}
    for pattern, options in groups.items():
        place = f"groups[{pattern!r}]"
        if not isinstance(pattern, str):
            raise TypeError(f"groups must have strings as keys; got {type(pattern).__name__}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{place} must fit the name of a parameter of net; got {', '.join(names)}"
            )
        if not isinstance(options, Mapping):
            raise TypeError(f"{place} must be a mapping; got {type(options).__name__}")
        for key in options:
            _require.one_of(f"a key of {place}", key, Options._fields)
        found[pattern] = {k: checked_number(f"{place}[{k!r}]", n) for k, n in options.items()}
    return found


def _checked_norm(max_norm: object, dtype: torch.dtype) -> float | None:
    if max_norm is None:
        return None
    number = _require.number("max_norm", max_norm)
    _require.above("max_norm", number, 0)
    if dtype is torch.float16:
        raise TypeError(
            "max_norm must be None for parameters of float16, because a clipped δ would leave its "
            f"range; got {max_norm}"
        )
    return number


def _require_rule(descent: Descent, dtype: torch.dtype) -> None:
    rule, momentum, nesterov = descent.rule, descent.momentum, descent.nesterov
    if not isinstance(nesterov, bool):
        raise TypeError(f"nesterov must be True or False; got {nesterov!r}")
    if nesterov and (not momentum or descent.dampening):
        raise ValueError(
            f"nesterov must be used with momentum and without dampening; got momentum={momentum}, "
            f"dampening={descent.dampening}"
        )
    if rule is None:
        return
    if not isinstance(rule, Adam):
        raise TypeError(f"rule must be an Adam, an AdamW or None; got {type(rule).__name__}")
    if momentum or descent.dampening:
        raise ValueError(
            f"momentum and dampening must be 0 with a rule, which has its own; got {momentum} and "
            f"{descent.dampening}"
        )
    if dtype is torch.float16:
        raise TypeError(
            f"rule must be None for parameters of float16, whose range is too small for g² and "
            f"eps; got {type(rule).__name__}"
        )
    _require_betas(rule)
    _require.at_least("eps", checked_number("eps", rule.eps), 0)


def _require_betas(rule: Adam) -> None:
    if not isinstance(rule.betas, tuple | list) or len(rule.betas) != 2:
        raise TypeError(f"betas must be two numbers; got {rule.betas!r}")
    for beta in rule.betas:
        if not checked_number("betas", beta) < 1:
            raise ValueError(f"betas must be below 1; got {rule.betas}")


def require_within(dtype: torch.dtype, lr: float, descent: Descent) -> None:
    """Refuse numbers that the dtype of the parameters cannot hold."""
    most = torch.finfo(dtype).max
    numbers = {"lr": lr} | {name: getattr(descent, name) for name in _NUMBERS}
    numbers["lr * weight_decay"] = lr * descent.weight_decay
    if descent.rule is not None:
        numbers["eps"] = descent.rule.eps
    for pattern, options in descent.groups.items():
        scale, weight_decay = options.get("lr_scale", 1.0), options.get("weight_decay", 0.0)
        place = f"groups[{pattern!r}]"
        numbers[f"lr_scale of {place}"] = scale
        numbers[f"lr * lr_scale of {place}"] = lr * scale
        numbers[f"weight_decay of {place}"] = weight_decay
        numbers[f"lr * lr_scale * weight_decay of {place}"] = (
            lr * scale * max(weight_decay, descent.weight_decay)
        )
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


def is_traced() -> bool:
    """Whether `torch.compile`, `torch.export` or a transform of `torch.func` traces the call."""
    return is_compiling() or transforms_are_active()


def refuse_tracing(step: object) -> None:
    """Refuse a call that is traced, and cannot become a graph break."""
    kind = type(step).__name__
    if transforms_are_active():
        raise RuntimeError(
            f"{kind} must be called outside of torch.func's transforms (vmap, grad, jvp ...), "
            f"because it updates parameters in place and has no derivative"
        )
    if is_exporting():
        raise RuntimeError(
            f"{kind} must not be traced by torch.export; for a TrainingStep, use its own "
            f"export() and export_onnx()"
        )


def call_untraced(
    step: object, method: Callable[..., Tensor], *arguments: Any, **options: Any
) -> Tensor:
    """A call as a graph break, where `torch.compile` is tracing; elsewhere a refusal."""
    refuse_tracing(step)
    untraced = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
    return untraced(*arguments, **options)  # type: ignore[no-any-return]


def refuse_autocast() -> None:
    """Refuse to run in an autocast region."""
    if any_autocast_is_on():
        raise RuntimeError(
            "a training step must be called outside of autocast; it trains in its parameters' "
            "own dtype"
        )
