"""One run of a linear layer in a pass: its pair (a, δ), and the activations that follow it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manual_bp._torch import version
from manual_bp.layers._activation import Activation
from manual_bp.layers._affine import as_rows

TENSORS = ("a_prev", "z", "a", "delta")  # of a Call

# a as (N, T, in) and δ as (N, T, out): a sample, its rows, and their components.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One run of a layer, and the activations that its z went through.

    If the activation is neither ours nor one that ours replaces, a is z.

    z_is_known: False if z was overwritten, and what it could be recomputed from was too. Then z is
        nan, and so is a if there is no activation.
    versions: The `version` of a_prev, z, a and delta in the pass; None for the present ones.
    """

    a_prev: Tensor
    z: Tensor
    a: Tensor
    delta: Tensor
    activations: tuple[Activation, ...] = ()
    z_is_known: bool = True
    versions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.versions is None:
            object.__setattr__(self, "versions", self._versions_now())

    def _versions_now(self) -> tuple[int, ...]:
        return tuple(version(getattr(self, name)) for name in TENSORS)

    def _writes(self) -> tuple[int, ...]:
        """How often each of the tensors was written to since the pass."""
        pairs = zip(self._versions_now(), self.versions or (), strict=True)
        return tuple(now - before for now, before in pairs)

    # Versions belong to tensor objects, and a copy's start from zero. So a copy is told how often
    # each tensor was written to.
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "versions": self._writes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        pairs = zip(self._versions_now(), state["versions"], strict=True)
        vars(self)["versions"] = tuple(now - writes for now, writes in pairs)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with `change` applied to each tensor, which must not change its numbers."""
        call = object.__new__(Call)
        state = self.__getstate__()
        call.__setstate__(state | {name: change(state[name]) for name in TENSORS})
        return call

    @property
    def changed(self) -> set[str]:
        """Which of a_prev, z, a and delta were written to since the pass."""
        return {name for name, writes in zip(TENSORS, self._writes(), strict=True) if writes}

    @property
    def samples(self) -> int:
        """N: the first dimension, or 1 for a single sample without a batch dimension."""
        return self.delta.shape[0] if self.delta.ndim > 1 else 1

    def _require_unchanged(self) -> None:
        of_a_prev, _, _, of_delta = self._writes()
        if of_a_prev or of_delta:
            raise RuntimeError(
                "a_prev and delta must still be those of the pass; they were changed in place"
            )

    @property
    def rows(self) -> Pair:
        """(a, δ) as (rows, components), with a in the dtype of the layer's output.

        Raises:
            RuntimeError: They were changed in place since the pass.
        """
        self._require_unchanged()
        return as_rows(self.a_prev.to(self.delta.dtype)), as_rows(self.delta)

    @property
    def pair(self) -> Pair:
        """(a, δ) as (N, T, components), in at least single precision.

        Raises:
            RuntimeError: They were changed in place since the pass.
        """
        self._require_unchanged()
        samples, delta = self.samples, self.delta
        return _by_sample(self.a_prev.to(delta.dtype), samples), _by_sample(delta, samples)

    def part(self, start: int, stop: int) -> "Call":
        """The same for the samples from start to stop."""
        if self.delta.ndim == 1:
            return self
        tensors: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in TENSORS}
        return replace(self, **tensors)


class DistinctMemory:
    """Prepares tensors that are to be copied together; call it with one after the other.

    Tensors that view the same memory in the same way become one object. A tensor that shares memory
    with an earlier one in any other way is cloned. Otherwise their copies would share the memory,
    but not the version that shows when it was written to.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tensor] = {}
        self._storages: set[int] = set()

    def __call__(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage().data_ptr() if type(t) is Tensor else 0
        if not storage:  # empty, on the meta device, or of a subclass
            return t
        memory = memory_of(t)
        if memory not in self._known:
            self._known[memory] = t.clone() if storage in self._storages else t
            self._storages.add(storage)
        return self._known[memory]


def memory_of(t: Tensor) -> tuple[object, ...]:
    """Which memory a tensor reads, and how: equal for tensors that always have equal numbers."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()


def joined(pairs: Sequence[Pair]) -> Pair:
    """Several pairs of the same samples as one pair, with the rows of all."""
    if len(pairs) == 1:
        return pairs[0]
    a, delta = zip(*pairs, strict=True)
    return torch.cat(a, 1), torch.cat(delta, 1)


def _by_sample(t: Tensor, samples: int) -> Tensor:
    rows = t.shape[1:-1].numel() if t.ndim > 2 else 1
    return at_least_float32(t.reshape(samples, rows, t.shape[-1]))


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor, in float32 if its dtype is float16 or bfloat16."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
