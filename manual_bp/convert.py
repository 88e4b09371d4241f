"""Converts torch.nn's layers to ours and back, anywhere in a model, in place.

A layer of ours differs from PyTorch's in how it computes, not in what it holds: it is a subclass
that adds no state. So a module is converted by assigning its class, and remains the same object
with the same parameters, hooks, training mode and keys; references to these stay valid.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from manual_bp import _require, _torch
from manual_bp._fuse import Class, neighbours, pairs_to_fuse
from manual_bp.layers._activation import ACTIVATIONS
from manual_bp.layers._formula import torch_base
from manual_bp.layers.linear import Linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid

# The attribute in which a module keeps the class that it had, so that copies and pickles of it can
# be restored as well.
BEFORE = "_manual_bp_class_before"


class Change(NamedTuple):
    """A module whose class was changed. Its name is "" if it is the model itself."""

    name: str
    before: Class
    after: Class


class Left(NamedTuple):
    """A module that was left as it was, and why."""

    name: str
    kind: Class
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `restore` did to each module; prints as one line for each kind.

    Attributes:
        changed: The modules whose class was changed.
        left: The layers that one would expect to be changed, and all that have no counterpart.

    Examples:
        >>> print(convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU())))
        2 changed, 0 left as they are
          1 Linear -> Linear
          1 ReLU -> ReLU
    """

    changed: tuple[Change, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        changes = Counter((c.before.__name__, c.after.__name__) for c in self.changed)
        lines = [f"{len(self.changed)} changed, {len(self.left)} left as they are"]
        lines += [f"  {n} {before} -> {after}" for (before, after), n in changes.items()]
        reasons = Counter((left.kind.__name__, left.reason) for left in self.left)
        lines += [f"  {n} {kind} left: {reason}" for (kind, reason), n in reasons.items()]
        return "\n".join(lines)


def convert(model: nn.Module, fuse: bool = False) -> ConversionReport:
    """Give each torch.nn layer in `model` that has a counterpart among ours our class, in place.

    The numbers and all objects stay the same: modules, parameters, hooks, keys. A second call
    changes nothing more. Calls of `torch.nn.functional` in a forward are not converted.

    Args:
        model: Any module: a layer, or one that contains layers at any depth.
        fuse: Whether to join a Linear and the Sigmoid after it in an `nn.Sequential` into a
            `LinearSigmoid`. The Sigmoid becomes an `nn.Identity`, so that all keys stay. Not for a
            model that calls modules of its Sequentials itself: the Linear returns a, not z.

    Returns:
        What was changed, and what was left, mostly layers whose class or object overrides forward.

    Raises:
        TypeError: model is not an nn.Module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())
        >>> report = convert(model)
        >>> type(model[0]) is Linear, len(report.changed)
        (True, 2)
    """
    _require_module(model)
    changes: dict[nn.Module, Class] = {}
    left: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, (*_layers(), LinearSigmoid)) or _was_given(module):
            continue
        found = _counterpart(module)
        if isinstance(found, str):
            left[module] = found
        elif found is not None:
            changes[module] = found
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    for module in changes.keys() & {child for m in attentions for child in m.children()}:
        del changes[module]
        left[module] = "nn.MultiheadAttention computes with its weight and never calls it"
    if fuse:
        fused, apart = pairs_to_fuse(model, changes)
        changes, left = changes | fused, left | apart
    return _apply(model, changes, left)


def restore(model: nn.Module) -> ConversionReport:
    """Give each module that `convert` changed its previous class, in place.

    Modules that `convert` did not change stay as they are, layers of ours included.

    Args:
        model: The converted model, or a copy of it; not a part, which may hold half a fused pair.

    Returns:
        What was changed back, and what was left because its class has changed since.

    Raises:
        TypeError: model is not an nn.Module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())
        >>> _ = convert(model), restore(model)
        >>> type(model[0]) is nn.Linear
        True
    """
    _require_module(model)
    changes: dict[nn.Module, Class] = {}
    left: dict[nn.Module, str] = {}
    for module in model.modules():
        before = vars(module).get(BEFORE)
        if before is None:
            continue
        if "forward" in vars(module):
            left[module] = "its forward was replaced on the object"
        elif _was_given(module):
            changes[module] = before
        elif _class_of(module) is not before:
            left[module] = "its class has changed since"
    fused = [
        pair
        for _, pair in neighbours(model)
        if isinstance(pair.linear, LinearSigmoid) and type(pair.sigmoid) is nn.Identity
    ]
    while halves := [pair for pair in fused if len(changes.keys() & set(pair)) == 1]:
        for module in (module for pair in halves for module in pair):
            if changes.pop(module, None) is not None:
                left[module] = "it was fused with one that cannot be restored"
    return _apply(model, changes, left)


def _layers() -> dict[Class, Class]:
    """Our layers, each with the torch.nn class that it replaces."""
    layers: list[Class] = [Linear, *ACTIVATIONS]
    return {ours: torch_base(ours) for ours in layers}


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


def _apply(
    model: nn.Module, changes: dict[nn.Module, Class], left: dict[nn.Module, str]
) -> ConversionReport:
    names = {module: name for name, module in model.named_modules()}
    report = ConversionReport(
        tuple(Change(names[m], type(m), changes[m]) for m in names if m in changes),
        tuple(Left(names[m], type(m), left[m]) for m in names if m in left),
    )
    before = {m: vars(m)[BEFORE] if _was_given(m) else _class_of(m) for m in changes}
    kinds = {module: type(module) for module in changes}
    try:
        for module, after in changes.items():
            _give(module, after)
    except BaseException:
        for module, kind in kinds.items():
            object.__setattr__(module, "__class__", kind)
        raise
    for module, after in changes.items():
        vars(module).pop(BEFORE, None)
        if after is not before[module]:
            vars(module)[BEFORE] = before[module]
    return report


def _give(module: nn.Module, after: Class) -> None:
    # parametrize made a class for this module alone; make it again with another base.
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        after = type(type(module).__name__, (after,), own)
    # Not module.__class__ = after: a module may override __setattr__.
    object.__setattr__(module, "__class__", after)


def _class_of(module: nn.Module) -> Class:
    """The class of a module; if it is parametrized, the class that it had before."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _was_given(module: nn.Module) -> bool:
    """Checks whether `convert` gave the module its class."""
    before = vars(module).get(BEFORE)
    return before is not None and _class_of(module) in _classes_given_for(before)


def _counterpart(module: nn.Module) -> Class | str | None:
    """The class of ours to give, or why there is none; None for containers of other modules."""
    kind = _class_of(module)
    found = [(ours, theirs) for ours, theirs in _layers().items() if issubclass(kind, theirs)]
    if not found:
        return None if [*module.children()] else "there is no such layer among ours"
    if len(found) > 1:
        return "it inherits from several layers at once"
    ((ours, theirs),) = found
    reason = _reason_against_class(module, kind, theirs) or (
        _reason_against_weights(module) if ours is Linear else _reason_against_options(module, ours)
    )
    return reason or (ours if kind is theirs else _joined(ours, kind))


def _reason_against_class(module: nn.Module, kind: Class, theirs: Class) -> str:
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "it is lazy and has seen no input yet"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if kind.forward is not theirs.forward:
        return "its class overrides forward"
    if kind.__call__ is not nn.Module.__call__:
        return "its class overrides __call__"
    if any("__init_subclass__" in vars(c) for c in kind.__mro__ if c is not object):
        return "its class defines __init_subclass__"
    return ""


def _reason_against_options(activation: nn.Module, ours: Class) -> str:
    try:
        ours.require_options(activation)
    except (TypeError, ValueError) as error:
        return f"its {error}"
    return ""


def _held(module: nn.Module) -> dict[str, Tensor | None]:
    """Its parameters and buffers; an attribute such as weight might be computed at each access."""
    return _torch.own_buffers(module) | _torch.own_parameters(module)


def _reason_against_weights(linear: nn.Module) -> str:
    held = vars(linear) | _held(linear)  # pruning leaves the weight as a plain attribute
    for name in ("weight", "bias"):
        value = held.get(name)
        if value is None:
            continue
        if not _require.is_dense(value):
            return f"its {name} is not a dense tensor"
        # A method unless it is disabled, and then PyTorch's functions do not call it.
        call = getattr(type(value).__torch_function__, "__func__", None)
        if call not in (None, Tensor.__torch_function__.__func__):  # type: ignore[attr-defined]
            return f"its {name} is a {type(value).__name__}, which may override the product"
    return ""


# Keys and values are weak: a class that parametrize made holds its module.
_joined_classes: WeakKeyDictionary[Class, ref[Class]] = WeakKeyDictionary()


def _joined(ours: Class, kind: Class) -> Class:
    """A class with our forward that is otherwise the given subclass of torch.nn's."""
    known = _joined_classes.get(kind)
    if known is not None and (joined := known()) is not None:
        return joined

    def reduce(self: Any, _: object) -> tuple[Any, ...]:
        return _blank, (ours, kind), self.__getstate__()

    # Only forward is ours. What else ours or its base defines is kept as the subclass has it.
    names = {name for c in ours.__mro__ if c not in kind.__mro__ for name in vars(c)}
    names -= {"__dict__", "__weakref__", "__init_subclass__"}
    body = {name: getattr(kind, name) for name in names if hasattr(kind, name)}
    body |= {"forward": ours.forward, "__reduce_ex__": reduce}
    joined = type(kind.__name__, (ours, kind), body)
    _joined_classes[kind] = ref(joined)
    return joined


def _blank(ours: Class, kind: Class) -> Any:
    """An empty object of a joined class, for pickle to fill."""
    return object.__new__(_joined(ours, kind))


def _classes_given_for(before: Class) -> Iterator[Class]:
    """The classes that `convert` may have given to a module of this class."""
    for ours, theirs in _layers().items():
        if issubclass(before, theirs) and before is not ours:
            yield ours if before is theirs else _joined(ours, before)
    yield from (LinearSigmoid, nn.Identity)
