"""From torch.nn's layers to ours and back, anywhere in a model, in place.

A layer of ours differs from PyTorch's in how it computes, not in what it is made of: it is a
subclass without state of its own. So a module is converted by giving it the other class, and stays
the object that it was. Parameters, hooks, training mode, names and keys, the optimiser that knows
the parameters and whoever else holds the module: nothing of that is touched.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from manual_bp import _require
from manual_bp._torch import has_global_hooks
from manual_bp.layers._activation import ACTIVATIONS
from manual_bp.layers._formula import torch_class_of
from manual_bp.layers.leaky_relu import LeakyReLU
from manual_bp.layers.linear import Linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid
from manual_bp.layers.sigmoid import Sigmoid
from manual_bp.layers.softplus import Softplus

Class = type[Any]

# Ours, and the torch.nn layer that it stands for and is a subclass of.
_OURS: tuple[Class, ...] = (Linear, *ACTIVATIONS)
LAYERS: dict[Class, Class] = {ours: torch_class_of(ours) for ours in _OURS}

# Where a module keeps the class that it had: within itself, so that copies of it and what was
# pickled can be restored as well.
BEFORE = "_manual_bp_class_before"


class Change(NamedTuple):
    """A module that was given another class. Its name is "" if it is the model itself."""

    name: str
    before: Class
    after: Class


class Left(NamedTuple):
    """A module that was left as it is, and why."""

    name: str
    kind: Class
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `restore` did, module by module; printed, a line for each kind.

    changed: What was given another class.
    left: What was not, and why: layers that could have been expected to be, and all that have no
        counterpart among ours.
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
    """Give every layer of torch.nn's that we have in `model` our class, in place.

    The numbers stay the same, and so do all objects: modules, parameters, hooks, keys. Converting
    twice changes nothing more. Calls of `torch.nn.functional` in a forward are not seen.

    Args:
        model: Any module; itself a layer, or with layers anywhere within.
        fuse: Whether to join a Linear and the Sigmoid after it in an `nn.Sequential` to a
            `LinearSigmoid`; the Sigmoid becomes an `nn.Identity`, so that all keys stay. Not for a
            model that takes modules out of its Sequentials by hand: it would find a where z was.

    Returns:
        What was changed, and what was left, and why: above all layers whose class or object has a
        forward of its own.

    Raises:
        TypeError: model is no nn.Module.
    """
    _require_module(model)
    changes: dict[nn.Module, Class] = {}
    left: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, (*LAYERS, LinearSigmoid)) or _was_given(module):
            continue
        found = _counterpart(module)
        if isinstance(found, str):
            left[module] = found
        elif found is not None:
            changes[module] = found
    for module in _never_called(model):
        if changes.pop(module, None) is not None:
            left[module] = "nn.MultiheadAttention computes with its weight and never calls it"
    if fuse:
        fused, apart = _pairs_to_fuse(model, changes)
        changes |= fused
        left |= apart
    return _apply(model, changes, left)


def restore(model: nn.Module) -> ConversionReport:
    """Give every module that `convert` changed the class that it had before, in place.

    Layers of ours that were there before stay, and so does what was not converted.

    Args:
        model: What was converted, or a copy of it. Not a part, which might hold half of a pair.

    Returns:
        What was changed back; and what was not, because its class has changed since.

    Raises:
        TypeError: model is no nn.Module.
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
        for _, pair in _neighbours(model)
        if isinstance(pair.linear, LinearSigmoid) and type(pair.sigmoid) is nn.Identity
    ]
    while halves := [pair for pair in fused if len(changes.keys() & set(pair)) == 1]:
        for module in (module for pair in halves for module in pair):
            if changes.pop(module, None) is not None:
                left[module] = "it was fused with one that cannot be restored"
    return _apply(model, changes, left)


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
    done: list[tuple[nn.Module, Class]] = []
    try:
        for module, after in changes.items():
            done.append((module, type(module)))
            _give(module, after)
    except BaseException:
        for module, was in done:
            object.__setattr__(module, "__class__", was)
        raise
    for module, after in changes.items():
        if after is before[module]:
            vars(module).pop(BEFORE, None)
        else:
            vars(module)[BEFORE] = before[module]
    return report


def _give(module: nn.Module, after: Class) -> None:
    # parametrize has made a class for this module alone; it is made anew, of another base.
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        after = type(type(module).__name__, (after,), own)
    # Not by module.__class__ = after: a module may have its own idea of attributes.
    object.__setattr__(module, "__class__", after)


def _class_of(module: nn.Module) -> Class:
    """Its class, or the one that parametrize found it with."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _was_given(module: nn.Module) -> bool:
    """Whether its class is one that `convert` gave it."""
    before = vars(module).get(BEFORE)
    return before is not None and _class_of(module) in _classes_given_for(before)


def _counterpart(module: nn.Module) -> Class | str | None:
    """The class of ours that fits, or why there is none; None for what holds other modules."""
    kind = _class_of(module)
    found = [(ours, theirs) for ours, theirs in LAYERS.items() if issubclass(kind, theirs)]
    if not found:
        has_children = next(module.children(), None) is not None
        return None if has_children else "there is no such layer among ours"
    if len(found) > 1:
        return "its class is of several layers at once"
    ((ours, theirs),) = found
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "it is lazy and has seen no input yet"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if kind.forward is not theirs.forward:
        return "its class has a forward of its own"
    if kind.__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if any("__init_subclass__" in vars(c) for c in kind.__mro__ if c is not object):
        return "its class keeps watch over its subclasses"
    if ours is Linear and (reason := _reason_against_weights(module)):
        return reason
    if ours is LeakyReLU and not module.negative_slope >= 0:  # type: ignore[operator]
        return "its negative_slope is below 0"
    if ours is Softplus and module.beta == 0:
        return "its beta is 0"
    return ours if kind is theirs else _joined(ours, kind)


def _held(module: nn.Module) -> dict[str, Tensor | None]:
    """Its parameters and buffers as they are, where to ask for a weight might compute it anew."""
    return module._buffers | module._parameters


def _reason_against_weights(linear: nn.Module) -> str | None:
    held = vars(linear) | _held(linear)  # an attribute of its own, as pruning leaves one
    for name in ("weight", "bias"):
        value = held.get(name)
        if value is None:
            continue
        if not _require.is_dense(value):
            return f"its {name} is no dense tensor"
        # A method, unless it is switched off: then PyTorch's functions get by without it.
        call = getattr(type(value).__torch_function__, "__func__", None)
        if call not in (None, Tensor.__torch_function__.__func__):  # type: ignore[attr-defined]
            return f"its {name} is a {type(value).__name__}, which may multiply in a way of its own"
    return None


def _never_called(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from module.children()


# Weak both ways: a class that parametrize made holds its module.
_joined_classes: WeakKeyDictionary[Class, ref[Class]] = WeakKeyDictionary()


def _joined(ours: Class, kind: Class) -> Class:
    """A class that computes as ours does, and in all else is a given subclass of torch.nn's."""
    known = _joined_classes.get(kind)
    joined = None if known is None else known()
    if joined is None:

        def reduce(self: Any, _: object) -> tuple[Any, ...]:
            return _blank, (ours, kind), self.__getstate__()

        # Of ours its forward alone: all else that ours defines is as the subclass has it.
        body = {name: getattr(kind, name) for name in vars(ours) if hasattr(kind, name)}
        body |= {"forward": ours.forward, "__reduce_ex__": reduce}
        body = {k: v for k, v in body.items() if k not in ("__dict__", "__weakref__")}
        joined = type(kind.__name__, (ours, kind), body)
        _joined_classes[kind] = ref(joined)
    return joined


def _blank(ours: Class, kind: Class) -> Any:
    """An object of a joined class, which pickle is about to fill."""
    return object.__new__(_joined(ours, kind))


def _classes_given_for(before: Class) -> Iterator[Class]:
    """The classes that `convert` may have given a module in place of that one."""
    for ours, theirs in LAYERS.items():
        if issubclass(before, theirs) and before is not ours:
            yield ours if before is theirs else _joined(ours, before)
    yield from (LinearSigmoid, nn.Identity)


class _Pair(NamedTuple):
    linear: nn.Module
    sigmoid: nn.Module


def _pairs_to_fuse(
    model: nn.Module, changes: dict[nn.Module, Class]
) -> tuple[dict[nn.Module, Class], dict[nn.Module, str]]:
    """The pairs of Linear and Sigmoid that can be joined; and the Linears of those that cannot.

    A module may occur in several places: it can be joined only if it is part of a pair in each.
    """
    pairs = list(_pairs(model, changes))
    apart = {pair.linear: f"not fused: {why}" for pair in pairs if (why := _reason_against(pair))}
    places = Counter(child for m in model.modules() for child in m._modules.values() if child)
    while True:
        kept = [pair for pair in pairs if pair.linear not in apart]
        used = Counter(module for pair in kept for module in pair)
        lone = [p for p in kept if any(used[module] != places[module] for module in p)]
        if not lone:
            break
        apart |= {p.linear: "not fused: it or its Sigmoid occurs elsewhere as well" for p in lone}
    fused: dict[nn.Module, Class] = {pair.linear: LinearSigmoid for pair in kept}
    return fused | {pair.sigmoid: nn.Identity for pair in kept}, apart


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Sequential, _Pair]]:
    """Each module of a Sequential with the next, of all the Sequentials in a model."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for first, second in pairwise(m for m in module._modules.values() if m is not None):
                yield module, _Pair(first, second)


def _pairs(model: nn.Module, changes: dict[nn.Module, Class]) -> Iterator[_Pair]:
    for sequential, pair in _neighbours(model):
        runs_in_order = type(sequential).forward is nn.Sequential.forward
        classes = [changes.get(m, type(m)) for m in pair]
        if runs_in_order and "forward" not in vars(sequential) and classes == [Linear, Sigmoid]:
            yield pair


def _reason_against(pair: _Pair) -> str:
    if has_global_hooks():
        return "there are global hooks, which would miss z"
    if any(m._forward_hooks or m._forward_pre_hooks for m in pair):
        return "there are hooks, which would miss z"
    if any(m._backward_hooks or m._backward_pre_hooks for m in pair):
        return "there are hooks, which would miss delta"
    if any("forward" in vars(m) for m in pair):
        return "a forward was replaced on the object"
    weight = _held(pair.linear).get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is computed from others, or not of real numbers"
    return ""
