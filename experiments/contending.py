"""What all contenders have in common: networks, how exact they must be, libraries they need."""

import importlib.util
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

FLOAT32 = 2**-24  # the largest relative error of one rounding

# What a factor may be rounded to: float32, TF32, bfloat16.
_ROUNDING = {"highest": FLOAT32, "high": 2**-11, "medium": 2**-8}


def sigmoid_network(sizes: Sequence[int], device: str) -> nn.Sequential:
    """PyTorch's own linear layers and sigmoids by turns, as it draws them."""
    pairs = [(nn.Linear(*size), nn.Sigmoid()) for size in pairwise(sizes)]
    return nn.Sequential(*[module for pair in pairs for module in pair]).to(device)


def allowance(layers: int, longest: int) -> float:
    """How far right answers may be apart, relative to the sizes of the terms that they add up.

    Factors are rounded to what the precision of products allows, sums to float32. Roundings go
    either way, so they add up as the square root of their number.

    Args:
        layers: How many products follow one another.
        longest: How many terms the longest sum has.
    """
    rounding = _ROUNDING[torch.get_float32_matmul_precision()]
    return 8 * math.sqrt(layers) * (rounding + math.sqrt(longest) * FLOAT32)


def is_installed(name: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(name) is not None
