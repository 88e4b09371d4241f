"""What all contenders have in common: the networks, and the libraries that may be there."""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def sigmoid_network(sizes: Sequence[int], device: str) -> nn.Sequential:
    """PyTorch's own linear layers and sigmoids by turns, as it draws them."""
    pairs = [(nn.Linear(*size), nn.Sigmoid()) for size in pairwise(sizes)]
    return nn.Sequential(*[module for pair in pairs for module in pair]).to(device)


def is_installed(name: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(name) is not None
