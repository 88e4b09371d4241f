"""The global random numbers of PyTorch, NumPy and Python."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from manual_bp.verify._case import Call


def reseed(seed: int) -> None:
    """Set all global seeds."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the code under test may use it)


def reseeded(call: Call, seed: int) -> Call:
    """The call after setting the seeds. Compiled code cannot set them: its caller does."""

    def once(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            reseed(seed)
        return call(*arguments)

    return once


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """A region after which the random numbers go on as if nothing had been drawn."""
    forked = [] if device.type == "cpu" else [device]
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
