"""Backpropagation and gradient descent in one pass, in place: BP1 to BP4 without a gradient.

What `backprop` keeps in dictionaries stands here in buffers that every batch of a size uses anew:
a layer's z, then a, in one; δ in one of two, which the layers take in turns. For the gradients of
weights there is none: w is updated within the matrix product of its BP4,

    w ← w − η ∂C/∂w                w.addmm_(delta.mT, a_prev, alpha=-lr)

once BP2 has read it. With momentum, the product goes into the velocity instead.

η is a number. In a CUDA graph or an exported program, where a number is there for good, it is a
tensor: δ is then multiplied by it, once BP2 has read that. (float16 lacks the range for that.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_bp import _net
from manual_bp.costs._cost import Cost, bind
from manual_bp.layers._activation import Activation

Allocate = Callable[[str, int], Tensor]


class Descent(NamedTuple):
    """What `torch.optim.SGD` calls by these names."""

    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Learned:
    """A parameter's value, its velocity under momentum, and whether it is to be updated."""

    value: Tensor
    velocity: Tensor | None
    learns: bool

    @property
    def sum(self) -> Tensor | None:
        """What its gradient is added to; None if it is frozen."""
        if not self.learns:
            return None
        return self.value if self.velocity is None else self.velocity


@dataclass(frozen=True)
class TrainedLayer:
    """A linear layer, and the activations up to the next one."""

    w: Learned
    b: Learned | None
    activations: Sequence[Activation]

    @property
    def learned(self) -> list[Learned]:
        """Its parameters that are to be updated."""
        return [p for p in (self.w, self.b) if p is not None and p.learns]


class Plan(NamedTuple):
    """What a step is of.

    input_activations: What comes before the first layer, seldom anything.
    layers: From the input on.
    cost: What is to become smaller.
    descent: How the parameters follow their gradients.
    """

    input_activations: Sequence[Activation]
    layers: Sequence[_net.Layer]
    cost: Cost
    descent: Descent


def _with_values(
    layers: Sequence[_net.Layer], values: Mapping[str, Tensor], velocities: Mapping[str, Tensor]
) -> list[TrainedLayer]:
    """The layers of a network, with values and velocities by the names of its parameters."""

    def learned(name: str, parameter: Tensor) -> Learned:
        return Learned(values[name], velocities.get(name), parameter.requires_grad)

    return [
        TrainedLayer(
            w=learned(f"{layer.name}.weight", layer.w),
            b=None if layer.b is None else learned(f"{layer.name}.bias", layer.b),
            activations=layer.activations,
        )
        for layer in layers
    ]


def fresh_buffers(like: Tensor) -> Allocate:
    """Makes a new buffer each time, of as many rows as x has samples."""
    return lambda _, columns: like.new_empty(prod(like.shape[:-1]), columns)


class Pass:
    """Forward, backward and update for batches of one size, in buffers of its own.

    Args:
        plan: What it is of.
        values: The parameters, by their names in the network.
        velocities: Theirs, under momentum.
        samples: The shape of x without its last dimension.
        allocate: Makes a buffer (N, columns), given a name and the columns. Those of one name are
            never needed at once.
        rate_is_tensor: Whether η will be a tensor, shape ().
    """

    def __init__(
        self,
        plan: Plan,
        values: Mapping[str, Tensor],
        velocities: Mapping[str, Tensor],
        samples: Sequence[int],
        allocate: Allocate,
        *,
        rate_is_tensor: bool = False,
    ) -> None:
        self._input_activations, self._descent = plan.input_activations, plan.descent
        layers = _with_values(plan.layers, values, velocities)
        self._places = [_Place(layer, l, allocate) for l, layer in enumerate(layers)]
        for l in range(1, len(layers)):
            self._places[l].a_prev = self._places[l - 1].a
        self._learned = [learned for layer in layers for learned in layer.learned]
        lowest = next((l for l, layer in enumerate(layers) if layer.learned), len(layers))
        self._downwards = self._places[lowest:][::-1]
        for place, below in pairwise(self._downwards):
            place.below = below
        self._top = top = self._places[-1]
        shape = (*samples, top.a.shape[-1])
        self._error_, self._share = bind(plan.cost, top.a.view(shape), top.delta.view(shape))
        self._rate_is_tensor = rate_is_tensor
        share = 1.0 if rate_is_tensor else self._share
        self._shares = top.delta.new_full((top.delta.shape[0],), share)
        self._lr: Any = None
        self._factors = _Factors(None, None, {}, {})

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes: the values that are learned, and their velocities."""
        velocities = [p.velocity for p in self._learned if p.velocity is not None]
        return [p.value for p in self._learned] + velocities

    def __call__(self, x: Tensor, y: Tensor, lr: Any) -> Tensor:
        """One step of gradient descent; returns C as it was before."""
        # 1. Input, a sample a row.
        a = x if x.ndim == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])
        for activation in self._input_activations:
            a = activation.forward(a)
        a_first = a

        # 2. Forward: each a takes the memory of its z.
        for place in self._places:
            if place.b is None:
                torch.mm(a, place.w_t, out=place.z)
            else:
                torch.addmm(place.b, a, place.w_t, out=place.z)
            place.sigma_()
            a = place.a

        # 3. Output error.
        cost = self._error_(y)  # BP1: ∇_a C
        self._top.times_sigma_prime_(self._top.delta)  # BP1: ⊙ σ'(z)

        # 4. Backward, and 5. gradients, each added to its parameter as it is found.
        if self._rate_is_tensor or lr != self._lr:
            self._lr, self._factors = lr, self._factors_of(lr)
        keep, rate, to_b, to_w = self._factors
        for place in self._downwards:
            if place.below is not None:
                torch.mm(place.delta, place.w, out=place.below.delta)  # BP2: wᵀδ, of w before
            if rate is not None:
                place.delta.mul_(rate)
            if place.sum_b is not None:
                if keep is not None:
                    place.sum_b.mul_(keep)
                # Not at once by addmv_, which rounds b once for every sample.
                torch.mv(place.delta_t, self._shares, out=place.grad_b)  # BP3
                place.sum_b.add_(place.grad_b, **to_b)
            if place.sum_w is not None:
                if not to_w and keep is not None:
                    place.sum_w.mul_(keep)
                a_prev = a_first if place.a_prev is None else place.a_prev
                place.sum_w.addmm_(place.delta_t, a_prev, **to_w)  # BP4
            if place.below is not None:
                place.below.times_sigma_prime_(
                    place.below.delta
                )  # BP2: ⊙ σ'(z); a is needed no more
        if self._descent.momentum:
            self._follow_velocities(lr)
        return cost

    def _factors_of(self, lr: Any) -> "_Factors":
        momentum, weight_decay, share = *self._descent, self._share
        keep = 1 - lr * weight_decay if weight_decay else None
        rate, rate_w = -lr, -lr * share
        if momentum:
            keep, rate, rate_w = momentum, 1.0, share
        if self._rate_is_tensor:
            return _Factors(keep, rate_w, {}, {})
        # A beta of 1 is left out: to read it takes PyTorch a tenth of a small product's time.
        beta = {} if keep is None else {"beta": keep}
        return _Factors(keep, None, {"alpha": rate}, {"alpha": rate_w} | beta)

    def _follow_velocities(self, lr: Any) -> None:
        for learned in self._learned:
            value, velocity = learned.value, learned.velocity
            assert velocity is not None
            if self._descent.weight_decay:
                velocity.add_(value, alpha=self._descent.weight_decay)
            if isinstance(lr, Tensor):
                value.addcmul_(velocity, lr, value=-1)
            else:
                value.add_(velocity, alpha=-lr)


class _Factors(NamedTuple):
    """What numbers BP3 and BP4 are added with.

    keep: What a parameter or velocity is multiplied by first; None for 1.
    rate: What δ is multiplied by; None where `to_b` and `to_w` have it.
    to_b, to_w: Arguments of the additions, keep among those to w.
    """

    keep: Any
    rate: Any
    to_b: dict[str, float]
    to_w: dict[str, float]


class _Place:
    """One layer's part of a pass.

    Attributes:
        w: Weights (out, in); w_t: the same, (in, out); b: biases (out,), or None.
        sum_w: What BP4 is added to, w or its velocity; None if w is frozen; sum_b likewise.
        z: Where weighted inputs go, (N, out); the first activation makes them a, in there.
        a: What the last activation made: z itself, unless there are several.
        a_prev: The a of the layer below; None for the first layer.
        sigma_: Makes a of z, which stand in the buffers.
        times_sigma_prime_: Makes δ of the ∂C/∂a that it is given.
        delta: Its error, (N, out); delta_t: the same, (out, N).
        grad_b: For ∂C/∂b, (out,).
        below: The layer that δ is carried down to, if any.
    """

    __slots__ = (
        "a", "a_prev", "b", "below", "delta", "delta_t", "grad_b", "sigma_", "sum_b", "sum_w",
        "times_sigma_prime_", "w", "w_t", "z",
    )  # fmt: skip

    def __init__(self, layer: TrainedLayer, l: int, allocate: Allocate) -> None:
        self.w, self.sum_w = layer.w.value, layer.w.sum
        self.w_t = self.w.mT
        self.b = self.sum_b = None
        if layer.b is not None:
            self.b, self.sum_b = layer.b.value, layer.b.sum
        self.z = self.a = allocate(f"z {l}", len(self.w))
        self.delta = allocate(f"delta {l % 2}", len(self.w))
        self.delta_t = self.delta.mT
        self.grad_b = self.w.new_empty(len(self.w))
        self.a_prev: Tensor | None = None
        self.below: _Place | None = None
        sigmas: list[Callable[[], object]] = []
        primes: list[Callable[[Tensor], object]] = []
        for i, activation in enumerate(layer.activations):
            if i > 0:  # the inner a is needed for its own σ'
                inner, self.a = self.a, allocate(f"z {l} {i}", len(self.w))
                sigmas.append(partial(self.a.copy_, inner))
            sigma_, times_sigma_prime_ = activation.bind(self.a)
            sigmas.append(sigma_)
            primes.append(times_sigma_prime_)
        self.sigma_ = _in_turn(sigmas)
        self.times_sigma_prime_ = _in_turn(primes[::-1])


def _in_turn(calls: Sequence[Callable[..., object]]) -> Callable[..., object]:
    """One call that makes them all, with the same arguments."""
    if len(calls) == 1:
        return calls[0]

    def call(*args: Tensor) -> None:
        for each in calls:
            each(*args)

    return call
