"""The layers, one a file: Function, functional call and nn.Module together."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from manual_bp.layers.leaky_relu import LeakyReLU
from manual_bp.layers.relu import ReLU
from manual_bp.layers.sigmoid import Sigmoid
from manual_bp.layers.softplus import Softplus
from manual_bp.layers.tanh import Tanh


class Activation(Protocol):
    """What the explicit algorithm and a Trace ask of an activation's module: σ, and σ'."""

    @property
    def slopes(self) -> tuple[float, float]:
        """The least and the largest that σ' comes to, or close to."""
        ...

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name torch.nn gives it)
        """Compute a = σ(z)."""
        ...

    def prime(self, a: Tensor) -> Tensor:
        """Compute σ'(z) from a = σ(z)."""
        ...

    def prime_of_z(self, z: Tensor) -> Tensor:
        """Compute σ'(z) from z: 0 where σ is flat, and nowhere else, however close it comes."""
        ...

    def in_place(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """Two calls for one buffer, sigma_ and times_prime_, what they need beside it made once.

        sigma_() turns z, which stands in the buffer, into a = σ(z). times_prime_(grad_a) turns
        grad_a, shaped as a, into grad_a ⊙ σ'(z), and may leave anything in the buffer.
        """
        ...


# Each is a subclass of the torch.nn activation that it stands for.
ACTIVATIONS: tuple[type[Activation], ...] = (Sigmoid, Tanh, ReLU, LeakyReLU, Softplus)
