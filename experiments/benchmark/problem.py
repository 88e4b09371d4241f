"""What all contenders of a comparison work on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

# Layer sizes, from the input on, and samples in a batch.
NETS = [((784, 30, 10), 10), ((784, 512, 512, 10), 128), ((2048,) * 5, 512)]


@dataclass(frozen=True)
class Problem:
    """A network of PyTorch's linear layers and sigmoids, and a batch for it.

    net: Every contender works on its own copy.
    x, y: Inputs and desired outputs, float32; samples come first, and each may have several rows.
    threads: How many CPU cores a contender may use.
    """

    net: nn.Sequential
    x: Tensor
    y: Tensor
    threads: int

    @property
    def w(self) -> list[Tensor]:
        """The weights, from the input on."""
        return [layer.weight.detach() for layer in self.net if isinstance(layer, nn.Linear)]

    @property
    def b(self) -> list[Tensor]:
        """The biases, from the input on."""
        return [layer.bias.detach() for layer in self.net if isinstance(layer, nn.Linear)]

    @property
    def label(self) -> dict[str, str]:
        """The first cells of a row, such as 784-30-10 and 128, or 32×16 for samples with rows."""
        sizes = (self.x.shape[-1], *map(len, self.w))
        return {"net": "-".join(map(str, sizes)), "batch": "×".join(map(str, self.x.shape[:-1]))}

    def __str__(self) -> str:
        return "{net}, batch {batch}".format(**self.label)

    @property
    def longest(self) -> int:
        """The number of terms of the longest sum: over inputs, outputs, or rows."""
        return max(self.x[..., 0].numel(), *(size for w in self.w for size in w.shape))


def problem(
    sizes: Sequence[int], batch: int | Sequence[int], device: str, threads: int = 1
) -> Problem:
    """A network of these sizes as PyTorch initialises it, and random data.

    A batch is the number of samples, or that and the number of rows in each.
    """
    pairs = [(nn.Linear(*size), nn.Sigmoid()) for size in pairwise(sizes)]
    net = nn.Sequential(*[module for pair in pairs for module in pair]).to(device)
    rows = [batch] if isinstance(batch, int) else batch
    x, y = (torch.rand(*rows, size).to(device) for size in (sizes[0], sizes[-1]))
    return Problem(net, x, y, threads)
