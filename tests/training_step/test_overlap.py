"""Whether tensors share memory, compared with the addresses of all their bytes."""

from itertools import product
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from manual_bp.training_step._overlap import overlapping, overlaps_itself, share_memory

DTYPES = (torch.float64, torch.bfloat16)


def elements(t: Tensor) -> list[range]:
    """The addresses of the bytes of each element."""
    places = product(*(range(n) for n in t.shape))
    starts = [
        t.data_ptr() + t.itemsize * sum(i * step for i, step in zip(place, t.stride(), strict=True))
        for place in places
    ]
    return [range(start, start + t.itemsize) for start in starts]


def addresses(t: Tensor) -> set[int]:
    return {address for element in elements(t) for address in element}


@st.composite
def views(draw: Any, memory: bytearray, dtype: torch.dtype) -> Tensor:
    """A view of the memory: a vector or matrix with any strides, starting at any byte."""
    offset = draw(st.integers(0, 12))
    count = (len(memory) - offset) // dtype.itemsize
    whole = torch.frombuffer(memory, dtype=dtype, offset=offset, count=count)
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=2))
    strides = draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    last = sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
    start = draw(st.integers(0, max(0, len(whole) - last - 1)))
    return whole.as_strided(shape, strides, start)


@given(st.data(), st.sampled_from(DTYPES))
def test_overlap_agrees_with_a_comparison_of_every_byte(data: Any, dtype: torch.dtype) -> None:
    memory = bytearray(400)
    t, other = (data.draw(views(memory, dtype)) for _ in range(2))
    assert overlaps_itself(t) == (len(addresses(t)) < len(elements(t)) * t.itemsize)
    expected = not addresses(t).isdisjoint(addresses(other))
    if t.numel() and other.numel():
        assert share_memory(t, other) == share_memory(other, t) == expected
    assert overlapping({"t": t, "other": other}) == ([("t", "other")] if expected else [])


def test_every_pair_is_found_in_the_given_order() -> None:
    memory = torch.zeros(40)
    named = {
        "late": memory[30:],
        "all": memory,
        "even": memory[:20:2],
        "odd": memory[1:20:2],
        "none": memory[3:3],
        "elsewhere": memory.clone(),
        "early": memory[:1],
    }
    pairs = [("late", "all"), ("all", "even"), ("all", "odd"), ("all", "early"), ("even", "early")]
    assert overlapping(named) == pairs
