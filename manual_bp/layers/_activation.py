"""What an activation declares about itself, and the list of all activations."""

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

ACTIVATIONS: "list[type[Activation]]" = []


class Activation(nn.Module):
    """The base of every activation: a = σ(z), element by element.

    A subclass names the torch.nn class that it replaces, and its own functional form:

        class ELU(Activation, nn.ELU, function=elu): ...

    and so enters `ACTIVATIONS`. `backprop`, `record`, `TrainingStep`, `convert` and export then
    know it. It defines `forward` and the methods below.

    Attributes:
        function: The functional form, `function(z, *options)`, and `inplace` if it has that.
        options: The names of its options, which are arguments of `function` and attributes of the
            module. Nothing else changes what the module computes.
    """

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[tuple[str, ...]]

    def __init_subclass__(
        cls, function: Callable[..., Tensor] | None = None, **arguments: Any
    ) -> None:
        super().__init_subclass__(**arguments)
        if function is not None:
            _, *names = signature(function).parameters
            cls.function = staticmethod(function)
            cls.options = tuple(name for name in names if name != "inplace")
            ACTIVATIONS.append(cls)

    @property
    def slope_bounds(self) -> tuple[float, float]:
        """The least and the largest value of σ', or the limits that it tends to."""
        raise NotImplementedError(f"{type(self).__name__} must define slope_bounds")

    def require_options(self) -> None:
        """Raise a ValueError if the functional form refuses the options."""

    def require_slope_from_a(self) -> None:
        """Raise a ValueError if a does not determine σ'(z), which the explicit algorithm needs."""

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) in terms of a = σ(z), shaped as a."""
        raise NotImplementedError(f"{type(self).__name__} must define sigma_prime(a)")

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) in terms of z, shaped as z; 0 only where σ is flat, however small σ' is."""
        raise NotImplementedError(f"{type(self).__name__} must define sigma_prime_from_z(z)")

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """Two in-place operations on one buffer, sigma_ and times_sigma_prime_.

        sigma_() replaces z, which is in the buffer, by a = σ(z). times_sigma_prime_(grad_a)
        replaces grad_a, shaped as a, by grad_a ⊙ σ'(z), and may leave anything in the buffer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define bind(a)")
