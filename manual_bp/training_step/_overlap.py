"""Whether tensors share memory: a parameter that is updated in place must not."""

from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of a vector or matrix have the same memory."""
    steps = [(n, step) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1]
    if len(steps) < 2 or not t.numel():
        return bool(t.numel()) and any(step == 0 for _, step in steps)
    (rows, step), (columns, other) = steps
    # The nearest two elements that coincide are the least common multiple of the strides apart.
    common = gcd(step, other)
    return common == 0 or (other // common < rows and step // common < columns)


def overlapping(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of every two tensors that share memory, in the order of the mapping."""
    names = list(tensors)
    reaches = sorted((*_reach(t), place) for place, t in enumerate(tensors.values()) if t.numel())
    found: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []  # earlier ones that end after the next one starts
    for start, end, place in reaches:
        others = [other for other in others if other[0] > start]
        found += [
            (min(place, other), max(place, other))
            for _, other in others
            if share_memory(tensors[names[other]], tensors[names[place]])
        ]
        others.append((end, place))
    return [(names[first], names[second]) for first, second in sorted(found)]


def share_memory(t: Tensor, other: Tensor) -> bool:
    """Whether an element of one overlaps an element of the other, in part or whole."""
    (start, end), (other_start, other_end) = _reach(t), _reach(other)
    if end <= other_start or other_end <= start:
        return False
    first = min(start, other_start)
    touched = torch.zeros(max(end, other_end) - first, dtype=torch.bool, device="cpu")
    _bytes_of(t, touched, first).fill_(True)
    return bool(_bytes_of(other, touched, first).any())


def memory_of(t: Tensor) -> tuple[int, int]:
    """The first address of the storage that t is a view of, and the address after its last."""
    memory = t.untyped_storage()
    start = memory.data_ptr()
    return start, start + memory.nbytes()


def _reach(t: Tensor) -> tuple[int, int]:
    """The address of the first byte of t, and the address after its last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def _bytes_of(t: Tensor, memory: Tensor, first: int) -> Tensor:
    """The bytes that t occupies, as a view of memory, whose first byte has the address first."""
    # Elements of an expanded tensor that share memory are taken once: fill_ refuses them.
    shape = [n if step else 1 for n, step in zip(t.shape, t.stride(), strict=True)]
    strides = [step * t.itemsize for step in t.stride()]
    return memory.as_strided((*shape, t.itemsize), (*strides, 1), t.data_ptr() - first)
