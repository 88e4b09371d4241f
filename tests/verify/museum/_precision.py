"""Gradients of low precision, computed as kernels do: in float32, and rounded once at the end."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _WideContext:
    """A context whose saved tensors are at least float32."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return tuple(_wide(t) for t in self._ctx.saved_tensors)


def in_float32(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in float32, or in float64 if the saved tensors have that.

    What it returns has the dtype of the saved tensors, or that of the upstream gradient.
    """

    @wraps(backward)
    def rounded(ctx: Any, *grads: Tensor) -> Any:
        found = backward(_WideContext(ctx), *[_wide(t) for t in grads])
        dtype = next(t.dtype for t in (*ctx.saved_tensors, *grads) if t.is_floating_point())
        several = found if isinstance(found, tuple) else (found,)
        narrow = tuple(None if t is None else t.to(dtype) for t in several)
        return narrow if isinstance(found, tuple) else narrow[0]

    return rounded


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
