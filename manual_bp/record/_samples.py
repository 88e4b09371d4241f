"""What shows whether the rows of a layer are samples: what its input was made from, and N."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp._torch import map_tensors, own_buffers, own_parameters, tree_leaves, version

_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack}
# Make rows out of nothing, such as positions. Others that do (zeros, randn) may do so for samples.
_COUNTING = {torch.arange, torch.linspace, torch.logspace, torch.eye}
# Repeat rows a given number of times, for example once for each sample.
_RESIZING = {
    torch.broadcast_to, torch.tile, torch.repeat_interleave, Tensor.broadcast_to, Tensor.tile,
    Tensor.repeat_interleave, Tensor.repeat, Tensor.expand, Tensor.expand_as, Tensor.new_empty,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
}  # fmt: skip
# Say how a model is to run, and hold no samples.
_SETTINGS = (int, float, torch.device, torch.dtype, type(None))


class OwnTensors:
    """The model's parameters and buffers, and what is made only of these.

    A tensor is one of them as long as nothing else is written to it. If the input of a layer is one
    of them, its rows are not samples.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id, with the version
        for module in modules:
            self._add(own_parameters(module).values())
            self._add(own_buffers(module).values())

    def __contains__(self, t: object) -> bool:
        known = self._known.get(id(t))
        if known is None or not isinstance(t, Tensor):
            return False
        return known[0]() is t and known[1] == version(t)

    def _add(self, tensors: Iterable[Any]) -> None:
        for t in tensors:
            if isinstance(t, Tensor):
                self._known[id(t)] = weakref.ref(t), version(t)

    def may_lead_to_more(self, args: Sequence[Any]) -> bool:
        """Whether a function of these may return another of them; most do not."""
        first = args[0] if args else None
        return not isinstance(first, Tensor) or first in self or _is_factor(first)

    def see(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Note a result that is made only of the model's own tensors.

        Its first dimension is then the model's as well, unless it was resized. A result of an
        operation in place was one of these tensors before.
        """
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and not _is_factor(t)]
        own = [t for t in tensors if t is result or t in self]
        is_own = func in _COUNTING or (0 < len(own) == len(tensors) and func not in _RESIZING)
        if func in _JOINING:
            if len({id(t) for t in tensors}) < len(tensors):  # one of them is repeated
                is_own = False
            elif func is not torch.stack:  # if one has the same rows as the result, all have
                is_own |= any(t.ndim == result.ndim and 1 < len(t) == len(result) for t in own)
        if is_own:
            self._add((result,) if isinstance(result, Tensor) else result)


class InputAndOutput:
    """What went into the model and came out of it, with gradients on.

    output: What came out last, detached.
    is_fed: Whether something went in last that may hold samples, and is not the model's own.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.is_fed = True
        self._batches: set[int | None] = set()

    @property
    def batch(self) -> int | None:
        """N, if all calls of the model agree on it."""
        return next(iter(self._batches)) if len(self._batches) == 1 else None

    def see(self, own: OwnTensors, args: Any, kwargs: Any, output: Any) -> None:
        """Note a call of the model."""
        inputs, outputs = _contents([*args, *kwargs.values()]), _contents([output])
        self._batches.add(_batch_of(inputs, outputs))
        self.is_fed = not all(isinstance(t, _SETTINGS) or t in own for t in inputs)
        is_tensor = isinstance(output, Tensor)
        self.output = output.detach() if is_tensor else map_tensors(Tensor.detach, output)


def _is_factor(t: Tensor) -> bool:
    """Whether it is a number, and not an index: it makes no rows, and chooses none."""
    return t.ndim == 0 and t.is_floating_point()


def _contents(values: Iterable[Any]) -> list[Any]:
    """What a model is given or returns; for objects such as dataclasses, what they hold."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
            continue
        for leaf in tree_leaves(value):
            is_object = hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor | nn.Module)
            found += tree_leaves(dict(vars(leaf))) if is_object else [leaf]
    return found


def _batch_of(inputs: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """N, if the first dimensions of all that went in and came out agree on it.

    If nothing with more than one dimension went in, or nothing but numbers came out (as from a
    model that returns its cost), the other side alone determines it.
    """
    found, found_again = _first_dimensions(inputs, 2), _first_dimensions(outputs, 2)
    if not found_again:
        found_again = _first_dimensions(outputs, 1) or found
    elif not found:
        found = found_again
    return found.pop() if len(found) == 1 and found == found_again else None


def _first_dimensions(values: Iterable[Any], least: int) -> set[int]:
    return {t.shape[0] for t in values if isinstance(t, Tensor) and t.ndim >= least}
