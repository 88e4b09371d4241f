"""What all costs share: how C is made of the losses C_x of the samples.

The last dimension of an output holds the components of one sample's output; every index before it
counts as one sample. The notes tell three things apart, and so does `reduction`:

    "none"  the loss C_x of each sample, shape (...)
    "mean"  the cost, (1/n) Σ_x C_x, shape ()
    "sum"   the total, Σ_x C_x, shape ()
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from manual_bp import _require
from manual_bp._autocast import autocast_to_float32

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
    """What each sample's loss counts for in C: 1/n under "mean", otherwise 1."""
    samples = math.prod(output.shape[:-1])
    return 1 / samples if reduction == "mean" and samples else 1.0


def checked_pair(name: str, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A network's output and a target of the same kind and shape; refuse any other."""
    output, y = autocast_to_float32(output, y)
    _require.real(name, output)
    _require.components(name, output)
    _require.like("y", y, name, output)
    _require.shape("y", y, output.shape, f"that of {name}")
    return output, y


class Cost(nn.Module):
    """The base of every cost: how it is reduced, and the two things the algorithm asks of it.

    To add a cost, write `forward` (C, differentiable by autograd) and `gradient` (the same
    derivative without autograd); `backprop` takes any subclass of this.

    Args:
        reduction: "mean" or "sum" over samples, never over components; "none" leaves the losses
            of the samples.

    Raises:
        ValueError: reduction is none of these.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        _require.one_of("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        """C, from the network's output (..., components) and the target y."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(output, y)")

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        """∂C/∂output, shaped as output, of the reduced cost; under "none", a loss a row."""
        raise NotImplementedError(f"{type(self).__name__} must define gradient(output, y)")

    def bind(self, output: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        """C and ∂C/∂output in the memory of delta: what a `TrainingStep` calls.

        A cost may define this anew, to need no temporaries, and must then do without autograd.

        Args:
            output: The buffer that outputs will stand in, (..., components).
            delta: Where the gradient is to go, contiguous, shaped as output.

        Returns:
            A call, made where autograd records nothing, which from targets y fills delta and
            returns C; and a share: ∂C/∂output is what is in delta times that. (Whoever updates by
            δ multiplies by a learning rate anyway.)
        """

        def error_(y: Tensor) -> Tensor:
            delta.copy_(checked_gradient(self, output, y))
            cost: Tensor = self(output, y)
            return cost.detach().clone()  # which may be a part of the output or of y

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
    return gradient.to(output.dtype)  # autocast has costs in float32


def has_own_bind(cost: Cost) -> bool:
    """Whether a cost's `bind` is of the same cost as its `forward` and `gradient`.

    Somebody may have changed those two alone, in a subclass.
    """
    kind = type(cost)
    owner = next(each for each in kind.__mro__ if "bind" in vars(each))
    return (
        owner is not Cost
        and all(getattr(kind, name) is getattr(owner, name) for name in ("forward", "gradient"))
        and not {"forward", "gradient"} & vars(cost).keys()
    )


def bind(cost: Cost, output: Tensor, delta: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """`cost.bind`, or what amounts to its `forward` and `gradient`."""
    own = cost.bind if has_own_bind(cost) else partial(Cost.bind, cost)
    return own(output, delta)
