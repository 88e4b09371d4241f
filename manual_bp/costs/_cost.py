"""What all costs share: how C is computed from the losses C_x of the samples.

The last dimension of an output holds the components of one sample's output; every index before it
is one sample. The notes distinguish three things, and so does `reduction`:

    "none"  the loss C_x of each sample, shape (...)
    "mean"  the cost, (1/n) Σ_x C_x, shape ()
    "sum"   the total, Σ_x C_x, shape ()
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from manual_bp import _require
from manual_bp._autocast import autocast_to_float32
from manual_bp._function import as_callable, hand_over

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduce_losses(losses: Tensor, reduction: Reduction) -> Tensor:
    """C from the losses C_x of the samples."""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def reduce_gradient(gradient: Tensor, reduction: Reduction) -> Tensor:
    """∇C from the rows ∇C_x: under "mean" each sample has the weight 1/n, otherwise 1."""
    return gradient / math.prod(gradient.shape[:-1]) if reduction == "mean" else gradient


def sample_weight(output: Tensor, reduction: Reduction) -> float:
    """The weight of each sample's loss in C: 1/n under "mean", otherwise 1."""
    samples = math.prod(output.shape[:-1])
    return 1 / samples if reduction == "mean" and samples else 1.0


def reduce_tangents(terms: Sequence[Tensor | None], reduction: Reduction) -> Tensor:
    """The tangent dC from the terms of all arguments, (..., components); None if one has none."""
    given = [term for term in terms if term is not None]
    return reduce_losses(reduce(torch.add, given).sum(-1), reduction)


def checked_pair(name: str, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A network's output and a target of the same kind and shape; refuse any other."""
    output, y = autocast_to_float32(output, y)
    _require.real(name, output)
    _require.components(name, output)
    _require.like("y", y, name, output)
    _require.shape("y", y, output.shape, f"that of {name}")
    return output, y


def as_cost(
    function: Any, checked: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """What a public cost function calls, with itself as the first argument."""
    apply = as_callable(function)

    def call(public: Any, output: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
        if has_torch_function_variadic(output, y):
            return hand_over(public, output, y, reduction)
        output, y = checked(output, y)
        _require.one_of("reduction", reduction, REDUCTIONS)
        return apply(output, y, reduction)

    return call


class Cost(nn.Module):
    """The base of every cost: how it is reduced, and the two things the algorithm asks of it.

    To add a cost, write `forward` (C, differentiable by autograd) and `gradient` (the same
    derivative without autograd); `backprop` takes any subclass of this.

    Args:
        reduction: "mean" or "sum" over samples, never over components; "none" returns the loss of
            each sample.

    Raises:
        ValueError: reduction is none of these.

    Examples:
        >>> class QuarticCost(Cost):
        ...     def forward(self, a, y):
        ...         return (a - y).pow(4).sum(-1).mean()
        ...
        ...     def gradient(self, a, y):
        ...         return 4 * (a - y).pow(3) / len(a)
        >>> trace = backprop(
        ...     nn.Sequential(Linear(3, 2)), torch.rand(5, 3), torch.rand(5, 2), QuarticCost()
        ... )
    """

    # Whether bind, under "none", returns the losses. It says so of a bind of the same class only.
    binds_losses: ClassVar[bool] = False

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        _require.one_of("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        """C, from the network's output (..., components) and the target y."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(output, y)")

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        """∂C/∂output, shaped as output, of the reduced cost; under "none", row x is ∇C_x."""
        raise NotImplementedError(f"{type(self).__name__} must define gradient(output, y)")

    def bind(self, output: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C and ∂C/∂output in the memory of delta: what a `TrainingStep` calls.

        A cost may override this to avoid temporaries. The override must not use autograd.

        A `TrainingStep` binds again when an attribute of the cost has been set since. A value that
        changes inside an attribute (a list, a tensor) must be read at each call.

        Args:
            output: The buffer of the outputs, (..., components).
            delta: The buffer of the gradient, contiguous, shaped as output.

        Returns:
            A function that fills delta from the targets y and returns C, to be called where
            autograd records nothing; and the weight of a sample: ∂C/∂output is delta times that.
            (An update by δ multiplies by a learning rate anyway.)
        """

        def error_(y: Tensor) -> Tensor:
            delta.copy_(checked_gradient(self, output, y))
            cost: Tensor = self(output, y)
            return cost.detach().clone()  # it may share memory with the output or y

        return error_, 1.0

    def extra_repr(self) -> str:
        """The reduction, unless it is the default."""
        return "" if self.reduction == "mean" else f"reduction={self.reduction!r}"


def checked_gradient(cost: Cost, output: Tensor, y: Tensor) -> Tensor:
    """A cost's gradient, in the output's dtype; refuse one that is not like the output."""
    gradient = cost.gradient(output, y)
    name = f"{type(cost).__name__}.gradient(output, y)"
    _require.real(name, gradient)
    _require.shape(name, gradient, output.shape, "that of the output")
    return gradient.to(output.dtype)  # under autocast, costs compute in float32


def bind_fits(cost: Cost) -> bool:
    """Whether a cost's `bind` was written for the `forward` and `gradient` that the cost has.

    A subclass, or an instance, may have overridden those two alone.
    """
    kind, owner = type(cost), _owner_of_bind(cost)
    return (
        owner is not Cost
        and all(getattr(kind, name) is getattr(owner, name) for name in ("forward", "gradient"))
        and not {"forward", "gradient"} & vars(cost).keys()
    )


def bind_each(
    cost: Cost, output: Tensor, delta: Tensor, *, shared: bool
) -> tuple[Callable[[Tensor], Tensor], float]:
    """`bind` for K networks: output and delta are (K, N, components), and C is (K,).

    shared: Whether they all have the same targets; otherwise y has a K in front.
    """
    error_, weight = _bind_stacked(cost, output, delta) or _bind_one_by_one(cost, output, delta)
    if not shared:
        return error_, weight
    return lambda y: error_(y.expand(len(output), *y.shape)), weight


def _bind_stacked(cost: Cost, output: Tensor, delta: Tensor) -> Any:
    if not (bind_fits(cost) and vars(_owner_of_bind(cost)).get("binds_losses")):
        return None
    unreduced = copy.copy(cost)
    unreduced.reduction = "none"
    losses_, _ = unreduced.bind(output, delta)
    reduce_each = torch.mean if cost.reduction == "mean" else torch.sum
    return lambda y: reduce_each(losses_(y), 1), sample_weight(output[0], cost.reduction)


def _bind_one_by_one(cost: Cost, output: Tensor, delta: Tensor) -> Any:
    """For a cost that need not know of networks."""
    bound = [bind(cost, *pair) for pair in zip(output, delta, strict=True)]
    return (
        lambda y: torch.stack([error_(part) for (error_, _), part in zip(bound, y, strict=True)]),
        bound[0][1],
    )


def _owner_of_bind(cost: Cost) -> type:
    return next(each for each in type(cost).__mro__ if "bind" in vars(each))


def bind(cost: Cost, output: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """`cost.bind` if it fits; else the same from the cost's `forward` and `gradient`."""
    return cost.bind(output, delta) if bind_fits(cost) else Cost.bind(cost, output, delta)
