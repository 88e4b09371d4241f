"""Many batches in one call: what a step checks and looks up is done once for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp import _require

# How many bytes of samples are gathered at a time: few enough for a cache, enough that the calls do
# not matter.
GATHERED = 2**20


def require_epoch(x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> None:
    """Refuse samples that do not go together, and an order that is none of x."""
    _require.tensor("x", x)
    _require.tensor("y", y)
    _require.tensor("order", order)
    _require.count("batch_size", batch_size)
    if x.ndim < 2 or y.ndim < 1 or len(x) != len(y):
        raise ValueError(
            f"x and y must hold the same number of samples, (M, ..., in) and (M, ...); got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if order.dtype is not torch.int64 or order.ndim != 1:
        raise TypeError(
            f"order must hold the indices of samples, int64 and of shape (K,); got {order.dtype} "
            f"of shape {tuple(order.shape)}"
        )
    _require.same_device("order", order, "x", x)
    if order.device.type == "cpu" and len(order):  # elsewhere the indexing raises its own error
        least, most = map(int, order.aminmax())
        if least < 0 or most >= len(x):
            raise ValueError(
                f"order must hold indices from 0 to {len(x) - 1}; got {least} to {most}"
            )


def run_epoch(
    take_step: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    order: Tensor,
    batch_size: int,
) -> Tensor:
    """The cost of each batch, from samples in this order; the last batch may be smaller."""
    batch_size = int(batch_size)  # torch.split refuses integers of NumPy
    size = max(1, x[:1].numel() * x.itemsize * batch_size)
    block = min(len(order), max(1, GATHERED // size) * batch_size)
    # Always the same memory: new memory would have to be mapped, which takes longer than the copy.
    buffers = [t.new_empty(block, *t.shape[1:]) for t in (x, y)]
    batches = [torch.split(buffer, batch_size) for buffer in buffers]
    costs: list[Tensor] = []
    for part in torch.split(order, block) if block else ():
        if len(part) < block:
            buffers = [buffer[: len(part)] for buffer in buffers]
            batches = [torch.split(buffer, batch_size) for buffer in buffers]
        for t, into in zip((x, y), buffers, strict=True):
            torch.index_select(t, 0, part, out=into)
        costs += map(take_step, *batches)
    return torch.stack(costs) if costs else x.new_empty(0)
