"""What an activation declares about itself, and the list of all activations."""

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from manual_bp._function import as_callable, call_in_place, hand_over, is_nested
from manual_bp.layers._formula import torch_base

# In the order of their definitions. Look it up when it is needed: it may grow.
ACTIVATIONS: "list[type[Activation]]" = []


class Activation(nn.Module):
    """The base of every activation: a = σ(z), element by element.

    A subclass names the torch.nn class that it replaces, and its functional form:

        class ELU(Activation, nn.ELU, function=elu): ...

    This registers it in `ACTIVATIONS`, and `backprop`, `record`, `TrainingStep`, `convert` and
    export know it. It replaces an earlier class for the same class of torch.nn, such as that of an
    earlier run of a notebook cell. Its Function is called ELUFunction. It defines `forward`, which
    computes the functional form, and the methods and properties below that raise
    NotImplementedError; `require_options` and `require_slope_from_a` only if some options must be
    refused.

    Raises:
        TypeError: A subclass with a function has no class of torch.nn among its bases.
        ValueError: PyTorch has no function of the function's name.

    Attributes:
        function: The functional form, `function(z, *options)`, and `inplace` if it has that. It has
            the name of PyTorch's.
        options: The names of its options, which are arguments of `function` and attributes of the
            module. Nothing else changes what the module computes.
        functions: All functions that compute it: ours, and PyTorch's of the same name, in torch,
            torch.nn.functional and torch.Tensor, in place or not.
        node_names: How the names of its nodes in autograd's graph begin: PyTorch's, and ours.
    """

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[tuple[str, ...]]
    functions: ClassVar[tuple[Callable[..., Tensor], ...]]
    node_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(
        cls, function: Callable[..., Tensor] | None = None, **arguments: Any
    ) -> None:
        super().__init_subclass__(**arguments)
        if function is not None:
            theirs = torch_base(cls)
            _, *names = signature(function).parameters
            cls.function = staticmethod(function)
            cls.options = tuple(name for name in names if name != "inplace")
            cls.functions = (function, *_torch_functions(cls.__name__, function.__name__))
            camel_case = function.__name__.title().replace("_", "")
            cls.node_names = (f"{camel_case}Backward", f"{cls.__name__}FunctionBackward")
            ACTIVATIONS[:] = [kind for kind in ACTIVATIONS if torch_base(kind) is not theirs]
            ACTIVATIONS.append(cls)

    @property
    def slope_bounds(self) -> tuple[float, float]:
        """The least and the largest value of σ', or the limits that it tends to."""
        raise NotImplementedError(f"{type(self).__name__} must define slope_bounds")

    def require_options(self) -> None:
        """Raise the error that the functional form raises for these options, if any."""

    def require_slope_from_a(self) -> None:
        """Raise a ValueError if a does not determine σ'(z), which the explicit algorithm needs."""

    def sigma_prime(self, a: Tensor) -> Tensor:
        """σ'(z) in terms of a = σ(z), shaped as a: the factor that explicit BP1 and BP2 need.

        Raises:
            ValueError: The options are such that a does not determine σ'(z).
        """
        raise NotImplementedError(f"{type(self).__name__} must define sigma_prime(a)")

    def sigma_prime_from_z(self, z: Tensor) -> Tensor:
        """σ'(z) in terms of z, shaped as z; 0 only where σ is flat, however small σ' is."""
        raise NotImplementedError(f"{type(self).__name__} must define sigma_prime_from_z(z)")

    def bind(self, a: Tensor) -> tuple[Callable[[], object], Callable[[Tensor], object]]:
        """Two in-place operations on one buffer, sigma_ and times_sigma_prime_, for BP1 and BP2.

        sigma_() replaces z, which is in the buffer, by a = σ(z). times_sigma_prime_(grad_a)
        replaces grad_a, shaped as a, by grad_a ⊙ σ'(z), and may leave anything in the buffer.

        Raises:
            ValueError: The functional form refuses the options, or a does not determine σ'(z).
        """
        raise NotImplementedError(f"{type(self).__name__} must define bind(a)")


def entry_point(
    public: Callable[..., Tensor],
    function: Any,
    check_z: Callable[[str, Any], None],
    check_options: Callable[..., None] | None = None,
    *,
    in_place: bool = False,
) -> Callable[..., Tensor]:
    """What the functional form and the module both call: it checks the arguments, then computes.

    The function names its argument z, the module input: each passes the name for error messages.

    Args:
        public: The functional form, which is passed to a `__torch_function__`. A nested tensor has
            one too, but goes on to `check_z`, which refuses it in our words.
        function: The Function.
        check_z: `check_z(name, z)` raises an error unless z is valid.
        check_options: `check_options(*options)` raises an error unless the options are.
        in_place: Whether the last option says that a takes the memory of z.

    Returns:
        `enter(name, z, *options)`.
    """
    call = as_callable(function)

    def enter(name: str, z: Tensor, *options: Any) -> Any:
        if has_torch_function_unary(z) and not is_nested(z):
            return hand_over(public, z, *options)
        check_z(name, z)
        if check_options is not None:
            check_options(*options)
        if in_place and options[-1]:
            return call_in_place(call, z, *options)
        return call(z, *options)

    return enter


def at_least_tiny(slope: Tensor) -> Tensor:
    """σ' of a function that is flat nowhere: where it underflows, the smallest normal number."""
    return slope.clamp(min=torch.finfo(slope.dtype).tiny)


def _torch_functions(kind: str, name: str) -> list[Any]:
    places: tuple[Any, ...] = (torch, F, Tensor)
    found = [getattr(place, form, None) for place in places for form in (name, f"{name}_")]
    functions = [function for function in found if function is not None]
    if not functions:  # record would not see PyTorch's
        raise ValueError(
            f"the function of {kind} must have the name of PyTorch's; got {name}, which none of "
            f"torch, torch.nn.functional and torch.Tensor has"
        )
    return functions
