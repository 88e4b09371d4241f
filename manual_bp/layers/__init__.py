"""The layers, one a file: Function, functional call and nn.Module together."""

from typing import Protocol

from torch import Tensor

from manual_bp.layers.sigmoid import Sigmoid


class Activation(Protocol):
    """What the explicit algorithm asks of an activation's module: σ, and σ' in terms of a."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name torch.nn gives it)
        """Compute a = σ(z)."""
        ...

    def prime(self, a: Tensor) -> Tensor:
        """Compute σ'(z) from a = σ(z)."""
        ...


# Each is a subclass of the torch.nn activation that it stands for.
ACTIVATIONS: tuple[type[Activation], ...] = (Sigmoid,)
