"""The same values with other strides."""

from collections.abc import Callable

import torch
from torch import Tensor


def _reordered(i: int, j: int, ndim: int) -> Callable[[Tensor], Tensor]:
    """Exchange two dimensions in memory, of tensors with at least so many dimensions."""
    return lambda t: t if t.ndim < ndim else t.transpose(i, j).contiguous().transpose(i, j)


def _channels_last(t: Tensor) -> Tensor:
    return t if t.ndim < 4 else t.movedim(1, -1).contiguous().movedim(-1, 1)


def windows(t: Tensor) -> Tensor:
    """Rows that overlap in memory: each begins one element after the one before."""
    if t.ndim < 2 or not t.numel():
        return t
    rows, columns = t[..., 0].numel(), t.shape[-1]
    memory = t.flatten()[: rows + columns - 1].clone()
    return memory.unfold(0, columns, 1).view(t.shape)


# The gaps hold ones, which a kernel that reads them takes for values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _reordered(-1, -2, 2),
    "strided": lambda t: torch.stack([torch.ones_like(t), t], -1)[..., 1],
    "shifted": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "sliced": lambda t: torch.stack([torch.ones_like(t), t], -2)[..., 1, :] if t.ndim else t,
    "heads first": _reordered(1, 2, 4),
    "batch second": _reordered(0, 1, 3),
    "channels last": _channels_last,
    # The same values, of which the conjugate is in memory.
    "lazily conjugated": lambda t: t.conj().resolve_conj().conj() if t.is_complex() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
    "expanded along the last dimension": (
        lambda t: t[..., :1].expand(t.shape) if t.ndim > 1 and t.shape[-1] else t
    ),
}


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is contiguous, not a lazy conjugate, and starts where its memory does."""
    return value.is_contiguous() and not value.storage_offset() and not value.is_conj()
