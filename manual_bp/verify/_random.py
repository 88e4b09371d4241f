"""The global random numbers of PyTorch, NumPy and Python."""

import random
from typing import Any

import numpy as np
import torch

from manual_bp.verify._case import Call
from manual_bp.verify._global_state import seed_pytorch


def reseed(seed: int) -> None:
    """Set all global seeds."""
    seed_pytorch(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the code under test may use it)


def reseeded(call: Call, seed: int) -> Call:
    """The call after setting the seeds. Compiled code cannot set them: its caller does."""

    def once(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            reseed(seed)
        return call(*arguments)

    return once
