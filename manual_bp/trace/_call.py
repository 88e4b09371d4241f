"""One time that a linear layer ran in a pass: the pair (a, δ), and what it was computed with."""

from collections.abc import Callable, Iterator
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
    """One time that a layer ran, and the activations that its z went through.

    Where an activation is not one of ours or of torch.nn's of the same kind, a is z.

    z_is_known: False where z was written over, and so was what it could be computed from: z, and
        where there is no activation a, are nan then.
    versions: What `version` of a_prev, z, a and delta was in the pass; None for what it is now.
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
        """How often each of a_prev, z, a and delta was written to since the pass."""
        pairs = zip(self._versions_now(), self.versions or (), strict=True)
        return tuple(now - before for now, before in pairs)

    # Versions belong to the tensor objects, and those of a copy start anew. So a copy is given how
    # often each tensor was written to.
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "versions": self._writes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        pairs = zip(self._versions_now(), state["versions"], strict=True)
        vars(self)["versions"] = tuple(now - writes for now, writes in pairs)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same, with other tensors that hold the same numbers."""
        call = object.__new__(Call)
        state = self.__getstate__()
        call.__setstate__(state | {name: change(state[name]) for name in TENSORS})
        return call

    @property
    def changed(self) -> set[str]:
        """Which of a_prev, z, a and delta are no longer what they were, but written over."""
        return {name for name, writes in zip(TENSORS, self._writes(), strict=True) if writes}

    @property
    def samples(self) -> int:
        """N: the first dimension, or 1 for a sample that came alone."""
        return self.delta.shape[0] if self.delta.ndim > 1 else 1

    def _require_unchanged(self) -> None:
        if self.changed & {"a_prev", "delta"}:
            raise RuntimeError(
                "a_prev and delta must still be those of the pass; they were changed in place"
            )

    @property
    def rows(self) -> Pair:
        """(a, δ) as (rows, components): a as the layer multiplied it, in the dtype of its output.

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
        a_prev = self.a_prev.to(self.delta.dtype)
        return _by_sample(a_prev, self.samples), _by_sample(self.delta, self.samples)

    def part(self, start: int, stop: int) -> "Call":
        """The same, of some samples."""
        if self.delta.ndim == 1:
            return self
        some = slice(start, stop)
        return replace(
            self,
            a_prev=self.a_prev[some],
            z=self.z[some],
            a=self.a[some],
            delta=self.delta[some],
        )


class SharedMemory:
    """Prepares tensors for being copied together; called with one after the other.

    Tensors that are the same piece of memory become one object. A tensor that shares memory with an
    earlier one in any other way becomes a tensor with a memory of its own. Their copies would share
    the memory otherwise, but not the version, which tells that it was written to.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Tensor] = {}
        self._memories: set[int] = set()

    def __call__(self, t: Tensor) -> Tensor:
        memory = t.untyped_storage().data_ptr() if type(t) is Tensor else 0
        if not memory:  # none of its own: it is empty, or of another kind
            return t
        key = t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()
        if key not in self._known:
            self._known[key] = t.clone() if memory in self._memories else t
            self._memories.add(memory)
        return self._known[key]


def joined(pairs: Iterator[Pair]) -> Pair:
    """Pairs of the same samples as one, of all their rows."""
    a, delta = zip(*pairs, strict=True)
    return (a[0], delta[0]) if len(a) == 1 else (torch.cat(a, 1), torch.cat(delta, 1))


def _by_sample(t: Tensor, samples: int) -> Tensor:
    rows = t.shape[1:-1].numel() if t.ndim > 1 else 1
    return wide(t.reshape(samples, rows, t.shape[-1]))


def wide(t: Tensor) -> Tensor:
    """The numbers in at least single precision."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
