"""How a parameter follows its gradient: gradient descent, momentum and Adam, one formula each.

An update here is given the gradient g, or some rows of it, in a buffer that it may overwrite. Plain
descent and momentum need no g: `_pass.py` adds the product of BP4 to p or v itself.

η and the number of steps t are numbers or, where no value may be read (on an accelerator, in an
exported program), tensors of shape ().

In an ensemble, every p has a network in each row of its first dimension, and η, μ, τ and λ may be
tensors with a number for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What a rule keeps, by the kind of it and then by the name of the parameter.
State = Mapping[str, Mapping[str, Tensor]]
STEPS = "steps"  # the one kind of shape (): how many steps a parameter has taken


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD`, with these options of it."""

    momentum: Any = 0.0
    dampening: Any = 0.0
    nesterov: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        """The kinds of state that it keeps for a parameter."""
        if not is_used(self.momentum):
            return ()
        return ("velocities", STEPS) if is_used(self.dampening) else ("velocities",)

    @property
    def needs_gradient(self) -> bool:
        """Whether g itself is needed, and not only its sum with p or v."""
        return is_used(self.momentum) and (self.nesterov or is_used(self.dampening))

    def factors(self, lr: Any, weight_decay: Any, t: Any) -> tuple[Any, ...]:
        """The numbers of one step for one parameter, at its step t, counted from 1."""
        share: Any = 1.0  # of g in v: PyTorch dampens from the second step on
        if isinstance(t, Tensor):
            share = 1 - self.dampening * (t > 1).to(t.dtype)
        elif STEPS in self.slots and t > 1:
            share = 1 - self.dampening
        return lr, weight_decay, share, self.momentum

    def update(self, p: Tensor, g: Tensor, slots: Sequence[Tensor], factors: Any) -> None:
        """Take one step for p, or for some rows of it."""
        lr, weight_decay, share, momentum = factors
        if is_used(weight_decay):
            add(g, p, weight_decay)  # SGD: g + λ p
        if is_used(momentum):
            v = slots[0]
            v.mul_(momentum)
            if isinstance(share, Tensor):
                v.add_(g.mul_(share))
            else:
                v.add_(g, alpha=share)  # SGD: v ← μ v + (1 − τ) g
            g = add(g, v, momentum) if self.nesterov else v  # SGD: g + μ v
        subtract(p, g, lr)  # SGD: p ← p − η g, or η v


@dataclass(frozen=True)
class Adam:
    """The rule of `torch.optim.Adam`, for `TrainingStep(..., rule=Adam())`.

        g ← g + λ p
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        p ← p − η m̂ / (√v̂ + ε),   with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ)

    m and v start from 0; t counts the steps that p has taken, this one included. All operations are
    elementwise. λ is the `weight_decay` of the `TrainingStep`.

    Args:
        betas: β₁ and β₂, at least 0 and below 1.
        eps: ε, at least 0.

    The numbers are checked by `TrainingStep`.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, algorithm 1.

    Examples:
        >>> net = nn.Sequential(Linear(3, 2), Sigmoid())
        >>> step = TrainingStep(net, QuadraticCost(), lr=1e-3, rule=Adam(betas=(0.9, 0.99)))
        >>> cost = step(torch.rand(5, 3), torch.rand(5, 2))
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    slots = ("exp_avg", "exp_avg_sq", STEPS)
    needs_gradient = True
    is_decoupled = False

    def factors(self, lr: Any, weight_decay: Any, t: Any) -> tuple[Any, ...]:
        """The numbers of one step for one parameter, at its step t, counted from 1."""
        beta1, beta2 = self.betas
        shrink = lr * weight_decay if self.is_decoupled and is_used(weight_decay) else None
        decay = 0.0 if self.is_decoupled else weight_decay
        root = (1 - beta2**t) ** 0.5
        # m̂ / (√v̂ + ε) is m / (√v + ε root), times root / (1 − β₁ᵗ).
        return shrink, decay, self.eps * root, lr * root / (1 - beta1**t)

    def update(self, p: Tensor, g: Tensor, slots: Sequence[Tensor], factors: Any) -> None:
        """Take one step for p, or for some rows of it."""
        (beta1, beta2), (m, v) = self.betas, slots[:2]
        shrink, decay, eps, rate = factors
        if shrink is not None:
            subtract(p, p, shrink)  # AdamW: p ← p − η λ p
        if is_used(decay):
            add(g, p, decay)  # Adam: g + λ p
        m.lerp_(g, 1 - beta1)  # Adam: m
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # Adam: v
        torch.sqrt(v, out=g).add_(eps)
        if isinstance(rate, Tensor):
            p.sub_(torch.div(m, g, out=g).mul_(rate))  # Adam: p ← p − η m̂ / (√v̂ + ε)
        else:
            p.addcdiv_(m, g, value=-rate)  # Adam: p ← p − η m̂ / (√v̂ + ε)


@dataclass(frozen=True)
class AdamW(Adam):
    """The rule of `torch.optim.AdamW`: as `Adam`, but with the weight decay beside g.

        p ← p − η λ p  at first, and g stays as it is

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2.

    Examples:
        >>> net = nn.Sequential(Linear(3, 2), Sigmoid())
        >>> step = TrainingStep(net, QuadraticCost(), lr=1e-3, rule=AdamW(), weight_decay=0.01)
        >>> cost = step(torch.rand(5, 3), torch.rand(5, 2))
    """

    is_decoupled = True


RULES = {rule.__name__: rule for rule in (Adam, AdamW)}


def is_used(number: Any) -> bool:
    """Whether a number is not 0; one of an ensemble is a tensor only if networks differ in it."""
    return isinstance(number, Tensor) or bool(number)


def add(p: Tensor, direction: Tensor, factor: Any) -> Tensor:
    """Add a multiple of another tensor to p; the factor is a number or a tensor."""
    if isinstance(factor, Tensor):
        return p.addcmul_(direction, factor)
    return p.add_(direction, alpha=factor)


def subtract(p: Tensor, direction: Tensor, lr: Any) -> None:
    """Take p to p − η d, where η is a number or a tensor."""
    if isinstance(lr, Tensor):
        p.addcmul_(direction, lr, value=-1)
    else:
        p.add_(direction, alpha=-lr)


def for_each_network(number: Any, t: Tensor) -> Any:
    """A number for each network, shaped to multiply t; any other as it is."""
    if isinstance(number, Tensor) and number.ndim:
        return number.view(-1, *[1] * (t.ndim - 1))
    return number


class Options(NamedTuple):
    """What may differ between parameters.

    lr_scale: By how much η is multiplied.
    weight_decay: λ.
    """

    lr_scale: float
    weight_decay: Any


class Descent(NamedTuple):
    """How parameters follow their gradients.

    The names are those of `torch.optim.SGD` and `clip_grad_norm_`. For rule and groups see
    `TrainingStep`. In an ensemble whose networks differ in a number, it is a tensor of all.
    """

    momentum: Any = 0.0
    weight_decay: Any = 0.0
    dampening: Any = 0.0
    nesterov: bool = False
    rule: Adam | None = None
    groups: Mapping[str, Mapping[str, float]] = {}
    max_norm: Any = None

    @property
    def chosen(self) -> SGD | Adam:
        """The rule that all parameters follow."""
        return self.rule or SGD(self.momentum, self.dampening, self.nesterov)

    def options(self, name: str) -> Options:
        """Those of the parameter of this name; of several patterns, the last one counts."""
        found = {"lr_scale": 1.0, "weight_decay": self.weight_decay}
        for pattern, options in self.groups.items():
            if fnmatchcase(name, pattern):
                found |= options
        return Options(**found)
