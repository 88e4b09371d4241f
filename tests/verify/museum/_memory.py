"""What kernels do to memory behind PyTorch's back."""

import torch
from torch import Tensor


def read_as_contiguous(t: Tensor) -> Tensor:
    """What a kernel reads that ignores the strides; it starts again where the memory ends."""
    if t.is_contiguous():
        return t
    count = t.untyped_storage().nbytes() // t.element_size() - int(t.storage_offset())
    memory = t.as_strided((count,), (1,), t.storage_offset())
    return memory[torch.arange(t.numel()) % count].view(t.shape)


def write(t: Tensor, value: Tensor) -> None:
    """Change a tensor in place, as a kernel does: its version counter does not notice."""
    t.data.copy_(value)
