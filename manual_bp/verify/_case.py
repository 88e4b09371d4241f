"""What is judged: a call, samples of its arguments, and a reference that is trusted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., Any]
Sample = tuple[Any, ...]
Draw = Callable[[torch.Generator], Sequence[Sample]]
Samples = Sequence[Sample] | Draw
# The dtype of all floating arguments, or one for each argument; None leaves it as it is.
Dtypes = torch.dtype | tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Case:
    """One Function or module to judge; made by `function_case` or `module_case`.

    Attributes:
        call: Takes the arguments of a sample. A module's parameters are its last arguments.
        draw: Makes samples from a generator; the same seed gives the same samples.
        reference: The same function in ordinary differentiable PyTorch; None if not given.
        supports: Capabilities that must work. Others may be refused, but never silently wrong.
        in_dims: As for `torch.vmap`: the sample dimension of each argument.
        dtypes: In which dtypes the call works. The widest comes first.
        rtol: A relative tolerance in addition to the allowance for rounding.
        atol: An absolute one, likewise.
        varying: As in_dims, for each group of other dimensions that may have any size.
        labels: Names of the arguments in messages.
        project: For positions of arguments, a function that maps a tensor into the domain.
        special: For positions of arguments, values at which a branch may begin.
        expected_failures: Names of checks that are known to fail, with the reason.
        factory: Makes the module, if the case is one.
        reference_factory: Makes its reference.
        nested_inputs: Nests the arguments in a sample, without parameters, as the call takes them.
        parameters: How many of the last arguments are parameters of a module.
        module: What call runs, with the parameters and buffers that its last call left.
        reference_module: What reference runs, likewise.
        operator: The operator of `torch.library` that is judged, if the call is one.
        gradient_of: A function that has the intended gradient, if that is not the derivative.
        is_random: Whether it draws global random numbers, so the call and the reference set the
            seeds.
        by_backward: Whether only `.backward()` gives all gradients, in `.grad`.
        location: Where the command line found the case, as package.module:Name.

    Examples:
        >>> case = function_case(torch.sin, [(torch.randn(5, 3),)], torch.sin)
        >>> case.name, case.dtypes
        ('sin', (torch.float64,))
    """

    name: str
    call: Call
    draw: Draw
    reference: Call | None
    supports: frozenset[str]
    in_dims: tuple[int | None, ...] | None
    device: torch.device
    seed: int
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[Dtypes, ...] = (torch.float64,)
    rtol: float = 0.0
    atol: float = 0.0
    varying: tuple[tuple[int | None, ...], ...] = ()
    labels: tuple[str, ...] = ()
    project: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    special: Mapping[int, Sequence[float]] = field(default_factory=dict)
    factory: Callable[[], nn.Module] | None = None
    reference_factory: Callable[[], nn.Module] | None = None
    nested_inputs: Callable[[Sample], Sample] = tuple
    parameters: int = 0
    module: nn.Module | None = None
    reference_module: nn.Module | None = None
    operator: Any = None
    gradient_of: Call | None = None
    is_random: bool = False
    by_backward: bool = False
    location: str = ""

    def label(self, position: int) -> str:
        """The name of an argument in messages."""
        return self.labels[position] if position < len(self.labels) else f"argument {position}"


def is_differentiable(value: object) -> bool:
    """Whether it can have a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def as_dtype(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that an argument gets: this one, or the complex one of the same precision."""
    if dtype is None or not is_differentiable(value):
        return value.dtype
    return dtype.to_complex() if value.is_complex() else dtype
