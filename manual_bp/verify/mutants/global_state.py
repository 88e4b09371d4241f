"""Changes of modes, random numbers and other state of the process."""

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Sigmoid
from manual_bp.verify.mutants._samples import elementwise


@mutant("global_state", elementwise, torch.sigmoid)
class DrawsInVain(Sigmoid):
    """Forward draws a random number that it does not need."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        torch.rand(1)
        return torch.sigmoid(z)


@mutant("global_state", elementwise, torch.sigmoid)
class SeedsInBackward(Sigmoid):
    """Backward seeds PyTorch's random numbers."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        torch.manual_seed(0)
        return Sigmoid.backward(ctx, grad_a)


@mutant("global_state", elementwise)
class SeedsNumPy(Sigmoid):
    """Forward seeds NumPy's random numbers."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        np.random.seed(0)  # noqa: NPY002
        return torch.sigmoid(z)


@mutant("global_state", elementwise)
class ShufflesInPython(Sigmoid):
    """Backward draws from Python's random numbers."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        random.random()
        return Sigmoid.backward(ctx, grad_a)


@mutant("global_state", elementwise, torch.sigmoid)
class SetsDefaultDtype(Sigmoid):
    """Backward sets the default dtype."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        return Sigmoid.backward(ctx, grad_a)


@mutant("global_state", elementwise, torch.sigmoid)
def leaves_grad_mode_off(z: Tensor) -> Any:
    """Gradients are switched off, and never on again."""
    apply: Any = Sigmoid.apply
    a = apply(z)
    torch.set_grad_enabled(False)
    return a


@mutant("global_state", elementwise, torch.sigmoid)
class DetectsAnomalies(Sigmoid):
    """Anomaly detection is left switched on."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        torch.set_anomaly_enabled(True, check_nan=False)
        return torch.sigmoid(z)


@mutant("global_state", elementwise, torch.sigmoid)
class SilencesWarnings(Sigmoid):
    """Backward switches warnings off for the whole process."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        warnings.filterwarnings("ignore", category=UserWarning)
        return Sigmoid.backward(ctx, grad_a)


@twin("global_state", elementwise, torch.sigmoid)
class OwnGenerator(Sigmoid):
    """Forward draws from its own generator, as a hashed product does for its directions."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        torch.rand(1, generator=Generator().manual_seed(0))
        return torch.sigmoid(z)


@twin("global_state", elementwise, torch.sigmoid)
class RestoresState(Sigmoid):
    """Backward seeds and sets modes, and sets all of it back."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(0)
            with torch.autograd.set_detect_anomaly(False), np.errstate(all="ignore"):
                return Sigmoid.backward(ctx, grad_a)
