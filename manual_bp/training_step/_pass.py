"""Backpropagation and gradient descent in one pass, in place: BP1 to BP4 without a gradient.

What `backprop` keeps in dictionaries is kept here in buffers, which every batch of a size reuses:
a layer's z and then its a in one buffer, δ in one of two buffers, which the layers use in turn.
The gradient of a weight has no buffer: w is updated within the matrix product of its BP4,

    w ← w − η ∂C/∂w                w.addmm_(delta.mT, a_prev, alpha=-lr)

after BP2 has read it. With momentum, the product is added to the velocity instead.

η is a number. A CUDA graph and an exported program cannot change a number, so there η is a tensor,
and δ is multiplied by it after BP2 has read δ. (The range of float16 is too small for that.)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_bp import _net
from manual_bp.costs._cost import Cost, bind
from manual_bp.layers._activation import Activation

# allocate(name, columns, widest) makes a buffer (N, columns). Buffers with the same name may share
# memory, which must then be enough for `widest` columns.
Allocate = Callable[[str, int, int], Tensor]


def fresh_buffers(x: Tensor) -> Allocate:
    """Allocate a new buffer each time, with one row for each sample of x."""
    return lambda _name, columns, _widest: x.new_empty(prod(x.shape[:-1]), columns)


class Descent(NamedTuple):
    """How parameters follow their gradients; the names are those of `torch.optim.SGD`."""

    momentum: float
    weight_decay: float


class Computation(NamedTuple):
    """What a pass computes.

    input_activations: What comes before the first layer, usually nothing.
    layers: From the input on.
    cost: What is minimised.
    descent: How the parameters follow their gradients.
    """

    input_activations: Sequence[Activation]
    layers: Sequence[_net.Layer]
    cost: Cost
    descent: Descent

    @property
    def learned(self) -> list[str]:
        """The names of the parameters that are not frozen."""
        return [n for layer in self.layers for n, p in layer.parameters.items() if p.requires_grad]


class Pass:
    """Forward, backward and update for batches of one size, in preallocated buffers.

    Args:
        computation: What is computed.
        values: The parameters, by their names in the network.
        velocities: Those of the learned parameters under momentum, by the same names; else empty.
        samples: The shape of x without its last dimension.
        allocate: Makes the buffers.
        rate_is_tensor: Whether η will be a tensor, shape ().

    Attributes:
        state: All that a step changes: the values that are learned, and their velocities.
    """

    def __init__(
        self,
        computation: Computation,
        values: Mapping[str, Tensor],
        velocities: Mapping[str, Tensor],
        samples: Sequence[int],
        allocate: Allocate,
        *,
        rate_is_tensor: bool = False,
    ) -> None:
        self._input_activations, layers, cost, self._descent = computation
        self._followers = [(values[n], velocities[n]) for n in computation.learned if velocities]
        self.state = [values[n] for n in computation.learned] + [v for _, v in self._followers]
        targets = {name: velocities.get(name, values[name]) for name in computation.learned}
        widest = max(len(layer.w) for layer in layers)
        self._layers: list[_PassLayer] = []
        for l, layer in enumerate(layers):
            # Backward needs the δ of two neighbouring layers at a time: two buffers are enough.
            delta = allocate(f"delta {l % 2}", len(layer.w), widest)
            self._layers.append(_PassLayer(layer, l, values, targets, delta, allocate))
        for below, above in pairwise(self._layers):
            above.a_prev = below.a
        learns = [layer.learns_w or layer.learns_b for layer in layers]
        lowest = learns.index(True) if any(learns) else len(layers)
        self._downwards = self._layers[lowest:][::-1]
        for above, below in pairwise(self._downwards):
            above.below = below
        self._top = top = self._layers[-1]
        shape = (*samples, top.a.shape[-1])
        self._error_, self._sample_weight = bind(cost, top.a.view(shape), top.delta.view(shape))
        self._rate_is_tensor = rate_is_tensor
        weight = 1.0 if rate_is_tensor else self._sample_weight
        self._sample_weights = top.delta.new_full((top.delta.shape[0],), weight)
        self._lr: Any = None
        self._factors = _Factors(None, None, {}, {})

    def __call__(self, x: Tensor, y: Tensor, lr: Any) -> Tensor:
        """Take one step of gradient descent; returns C before the step."""
        # 1. Input, one sample a row.
        a = x if x.ndim == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])
        for activation in self._input_activations:
            a = activation.forward(a)
        a_first = a

        # 2. Forward: each a takes the memory of its z.
        for layer in self._layers:
            if layer.b is None:
                torch.mm(a, layer.w_t, out=layer.z)
            else:
                torch.addmm(layer.b, a, layer.w_t, out=layer.z)
            layer.sigma_()
            a = layer.a

        # 3. Output error.
        cost = self._error_(y)  # BP1: ∇_a C
        self._top.times_sigma_prime_(self._top.delta)  # BP1: ⊙ σ'(z)

        # 4. Backward, and 5. gradients.
        if self._rate_is_tensor or lr != self._lr:
            self._lr, self._factors = lr, self._factors_of(lr)
        self._descend(a_first)
        if self._followers:
            self._follow_velocities(lr)
        return cost

    def _descend(self, a_first: Tensor) -> None:
        """Backward; each gradient is added to its parameter, or velocity, as it is computed."""
        keep, rate, kwargs_b, kwargs_w = self._factors
        for layer in self._downwards:
            below = layer.below
            if below is not None:
                torch.mm(layer.delta, layer.w, out=below.delta)  # BP2: wᵀδ, before w is updated
            if rate is not None:
                layer.delta.mul_(rate)
            if layer.target_b is not None:
                if keep is not None:
                    layer.target_b.mul_(keep)
                # Not in one call of addmv_, which rounds b once for every sample.
                torch.mv(layer.delta_t, self._sample_weights, out=layer.grad_b)  # BP3
                layer.target_b.add_(layer.grad_b, **kwargs_b)
            if layer.target_w is not None:
                if not kwargs_w and keep is not None:
                    layer.target_w.mul_(keep)
                a_prev = a_first if layer.a_prev is None else layer.a_prev
                layer.target_w.addmm_(layer.delta_t, a_prev, **kwargs_w)  # BP4
            if below is not None:  # its a may be overwritten now
                below.times_sigma_prime_(below.delta)  # BP2: ⊙ σ'(z)

    def _factors_of(self, lr: Any) -> "_Factors":
        momentum, weight_decay = self._descent
        keep = 1 - lr * weight_decay if weight_decay else None
        rate, rate_w = -lr, -lr * self._sample_weight
        if momentum:
            keep, rate, rate_w = momentum, 1.0, self._sample_weight
        if self._rate_is_tensor:
            return _Factors(keep, rate_w, {}, {})
        # A beta of 1 is left out: reading it takes PyTorch a tenth of a small product's time.
        beta = {} if keep is None else {"beta": keep}
        return _Factors(keep, None, {"alpha": rate}, {"alpha": rate_w} | beta)

    def _follow_velocities(self, lr: Any) -> None:
        for value, velocity in self._followers:
            if self._descent.weight_decay:
                velocity.add_(value, alpha=self._descent.weight_decay)
            if isinstance(lr, Tensor):
                value.addcmul_(velocity, lr, value=-1)
            else:
                value.add_(velocity, alpha=-lr)


class _Factors(NamedTuple):
    """The numbers in the additions of BP3 and BP4.

    keep: What a parameter or velocity is multiplied by first; None for 1.
    rate: What δ is multiplied by; None if `kwargs_b` and `kwargs_w` hold the rate.
    kwargs_b, kwargs_w: Keyword arguments of the two additions. Those for w include keep.
    """

    keep: Any
    rate: Any
    kwargs_b: dict[str, float]
    kwargs_w: dict[str, float]


class _PassLayer:
    """One layer's parameters and buffers in a pass.

    Attributes:
        w: Weights (out, in); w_t: the same, (in, out); b: biases (out,), or None.
        target_w: What BP4 is added to, w or its velocity; None if w is frozen; target_b likewise.
        z: Where weighted inputs go, (N, out). The first activation turns them into a, in place.
        a: The output of the last activation: z itself, unless there are several.
        a_prev: The a of the layer below; None for the first layer.
        sigma_: Computes a from z, in the buffers.
        times_sigma_prime_: Turns ∂C/∂a into δ, in place.
        delta: Its error, (N, out); delta_t: the same, (out, N).
        grad_b: The buffer of ∂C/∂b, (out,).
        below: The layer that δ is propagated to, if any.
    """

    __slots__ = (
        "a", "a_prev", "b", "below", "delta", "delta_t", "grad_b", "sigma_", "target_b", "target_w",
        "times_sigma_prime_", "w", "w_t", "z",
    )  # fmt: skip

    def __init__(
        self,
        layer: _net.Layer,
        l: int,
        values: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        delta: Tensor,
        allocate: Allocate,
    ) -> None:
        w, b = f"{layer.name}.weight", f"{layer.name}.bias"
        self.w, self.b = values[w], values.get(b)
        self.w_t = self.w.mT
        self.target_w, self.target_b = targets.get(w), targets.get(b)
        out = len(self.w)
        self.z = self.a = allocate(f"z {l}", out, out)
        self.delta, self.delta_t = delta, delta.mT
        self.grad_b = self.w.new_empty(out)
        self.a_prev: Tensor | None = None
        self.below: _PassLayer | None = None
        sigmas: list[Callable[[], object]] = []
        primes: list[Callable[[Tensor], object]] = []
        for i, activation in enumerate(layer.activations):
            if i > 0:  # a buffer for each, because σ' of an inner activation needs its own a
                inner, self.a = self.a, allocate(f"z {l} {i}", out, out)
                sigmas.append(partial(self.a.copy_, inner))
            sigma_, times_sigma_prime_ = activation.bind(self.a)
            sigmas.append(sigma_)
            primes.append(times_sigma_prime_)
        self.sigma_ = _one_after_another(sigmas)
        self.times_sigma_prime_ = _one_after_another(primes[::-1])


def _one_after_another(calls: Sequence[Callable[..., object]]) -> Callable[..., object]:
    """One function that makes all the calls, with the same arguments."""
    if len(calls) == 1:
        return calls[0]

    def call(*args: Tensor) -> None:
        for each in calls:
            each(*args)

    return call
