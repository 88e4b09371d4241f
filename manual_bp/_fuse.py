"""Which pairs of a Linear and a Sigmoid `convert` can join into a LinearSigmoid."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from manual_bp import _torch
from manual_bp.layers.linear import Linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid
from manual_bp.layers.sigmoid import Sigmoid

Class = type[Any]


class Pair(NamedTuple):
    """A module of a Sequential and the next one: a Linear and its Sigmoid, if they can be fused."""

    linear: nn.Module
    sigmoid: nn.Module


def pairs_to_fuse(
    model: nn.Module, changes: dict[nn.Module, Class]
) -> tuple[dict[nn.Module, Class], dict[nn.Module, str]]:
    """The classes to give to the pairs that can be fused, and why the Linears of others cannot be.

    A module may occur in several places: it can be fused only if it is part of a pair in each.
    """
    pairs = list(_pairs(model, changes))
    apart = {pair.linear: f"not fused: {why}" for pair in pairs if (why := _reason_against(pair))}
    places = Counter(m for parent in model.modules() for m in _torch.own_modules(parent).values())
    while True:
        kept = [pair for pair in pairs if pair.linear not in apart]
        used = Counter(module for pair in kept for module in pair)
        lone = [p for p in kept if any(used[module] != places[module] for module in p)]
        if not lone:
            break
        apart |= {p.linear: "not fused: it or its Sigmoid also occurs elsewhere" for p in lone}
    fused: dict[nn.Module, Class] = {pair.linear: LinearSigmoid for pair in kept}
    return fused | {pair.sigmoid: nn.Identity for pair in kept}, apart


def neighbours(model: nn.Module) -> Iterator[tuple[nn.Sequential, Pair]]:
    """The pairs of neighbouring modules in each Sequential of a model."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            children = [m for m in _torch.own_modules(module).values() if m is not None]
            yield from ((module, Pair(*pair)) for pair in pairwise(children))


def _pairs(model: nn.Module, changes: dict[nn.Module, Class]) -> Iterator[Pair]:
    for sequential, pair in neighbours(model):
        runs_in_order = type(sequential).forward is nn.Sequential.forward
        classes = [changes.get(m, type(m)) for m in pair]
        if runs_in_order and "forward" not in vars(sequential) and classes == [Linear, Sigmoid]:
            yield pair


def _reason_against(pair: Pair) -> str:
    if _torch.has_global_hooks():
        return "there are global hooks, which would not see z"
    if any(map(_torch.has_forward_hooks, pair)):
        return "there are hooks, which would not see z"
    if any(map(_torch.has_backward_hooks, pair)):
        return "there are hooks, which would not see delta"
    if any("forward" in vars(m) for m in pair):
        return "a forward was replaced on the object"
    weight = (_torch.own_buffers(pair.linear) | _torch.own_parameters(pair.linear)).get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is computed from others, or is not real"
    return ""
