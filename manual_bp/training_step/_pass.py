"""Backpropagation and gradient descent in one pass, in place: BP1 to BP4 without a gradient.

What `backprop` keeps in dictionaries is kept here in buffers, which every batch of a size reuses:
a layer's z and then its a in one buffer, δ in one of two buffers, which the layers use in turn.
The gradient of a weight has no buffer: w is updated within the matrix product of its BP4,

    w ← w − η ∂C/∂w                w.addmm_(delta.mT, a_prev, alpha=-lr/n)

after BP2 has read it. With momentum, the product is added to the velocity instead. A rule that
needs the gradient itself gets it in one buffer for all weights, on the CPU some rows at a time.

If the gradient is to be clipped, every δ is computed and kept before the first update.

In an ensemble of K networks of one shape, every parameter and buffer has one more dimension in
front, and the same products are batched.

η is a number. A CUDA graph and an exported program cannot change a number, so there η is a tensor,
and δ is multiplied by it after BP2 has read δ. (The range of float16 is too small for that.) An
ensemble does the same, with an η for each network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manual_bp import _net
from manual_bp.costs._cost import Cost, bind, bind_each
from manual_bp.layers._activation import Activation
from manual_bp.training_step import _clip
from manual_bp.training_step._layer import Allocate, PassLayer
from manual_bp.training_step._learn import Learned
from manual_bp.training_step._rules import (
    Descent,
    State,
    for_each_network,
    is_used,
    subtract,
)

Learn = Callable[[PassLayer, Tensor], None]


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
        values: The parameters, by their names in the network. In an ensemble, those of all networks
            in one tensor; then state, the buffers and norm have a K in front too.
        state: What the rule keeps of the learned ones, by the same names.
        samples: The shape of x without its last dimension. In an ensemble (N,), if all networks
            read the same x, else (K, N).
        allocate: Makes the buffers.
        norm: Where the norm of the gradient goes if it is clipped, shape ().
        rate_is_tensor: Whether η will be a tensor, shape (), that may be changed in place. (In an
            ensemble it always is a tensor, (K,), and a number only with sums.)
        sums: By the names of the learned parameters, what −η times their gradients are added to;
            values and state then stay as they are.

    Attributes:
        state: All that a step changes: the values that are learned, what is kept of them, norm.
    """

    def __init__(
        self,
        computation: Computation,
        values: Mapping[str, Tensor],
        state: State,
        samples: Sequence[int],
        allocate: Allocate,
        norm: Tensor,
        *,
        rate_is_tensor: bool = False,
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._input_activations, layers, cost, descent = computation
        descent = descent if sums is None else Descent()
        names, slots = computation.learned, descent.chosen.slots
        kept = [state[slot][n] for slot in slots for n in names]
        self.state = [*(values[n] for n in names), *kept, norm]
        self._networks = values[f"{layers[0].name}.weight"].shape[:-2]
        self._rate_may_change, self._momentum = rate_is_tensor, is_used(descent.momentum)
        self._rate_in_delta = rate_is_tensor or bool(self._networks)
        self._needs_gradient = descent.chosen.needs_gradient
        self._max_norm, self._norm = descent.max_norm, norm
        self._reads_values = not rate_is_tensor and norm.device.type == "cpu"
        targets = state.get("velocities", values) if sums is None else sums
        options: Any = {"reads_values": self._reads_values, "networks": self._networks}
        learned = {n: Learned(n, values[n], descent, state, targets[n], **options) for n in names}
        follows = self._momentum and not self._needs_gradient
        self._followers = list(learned.values()) if follows else []
        is_wide = bool(self._networks) and len(samples) == 1
        self._layers = self._make_layers(layers, values, learned, allocate, is_wide=is_wide)
        self._downwards = self._link_downwards(layers)
        self._top = top = self._layers[-1]
        if self._networks:
            self._error_, weight = bind_each(cost, top.a, top.grad_a, shared=is_wide)
        else:
            shape = (*samples, top.a.shape[-1])
            self._error_, weight = bind(cost, top.a.view(shape), top.grad_a.view(shape))
        in_error = self._clips or self._needs_gradient
        self._error_weight = weight if in_error else None
        self._sample_weight = 1.0 if in_error else weight
        self._bind_sums_of_delta()
        self._lr: Any = None
        self._rate: Any = None

    def _bind_sums_of_delta(self) -> None:
        weight = 1.0 if self._rate_in_delta else self._sample_weight
        sample_weights = self._top.delta.new_full(self._top.delta.shape[-2:-1], weight)
        for each in self._layers:
            # Not in one call of addmv_, which rounds b once for every sample.
            total = partial(torch.mv, each.delta_t, sample_weights)
            if self._networks:
                total = partial(torch.sum, each.delta, 1)
            each.sum_delta = partial(total, out=each.grad_b)  # BP3

    @property
    def _clips(self) -> bool:
        return self._max_norm is not None

    def _link_downwards(self, layers: Sequence[_net.Layer]) -> list[PassLayer]:
        """The layers from the top to the lowest that learns, each with the next as its `below`."""
        learns = [layer.learns_w or layer.learns_b for layer in layers]
        lowest = learns.index(True) if any(learns) else len(layers)
        downwards = self._layers[lowest:][::-1]
        for above, below in pairwise(downwards):
            above.below = below
        return downwards

    def _make_layers(
        self,
        layers: Sequence[_net.Layer],
        values: Mapping[str, Tensor],
        learned: Mapping[str, Learned],
        allocate: Allocate,
        *,
        is_wide: bool,
    ) -> list[PassLayer]:
        widest = max(len(layer.w) for layer in layers)
        made: list[PassLayer] = []
        for l, layer in enumerate(layers):
            out = len(layer.w)
            # Backward needs the δ of two neighbouring layers at a time: two buffers are enough,
            # unless all are kept.
            name, room = (f"delta of {l}", out) if self._clips else (f"delta {l % 2}", widest)
            delta = allocate(name, out, room)
            made.append(PassLayer(layer, l, values, learned, delta, allocate))
            if self._clips and layer is not layers[-1]:
                made[-1].keep_a(allocate("backup", out, widest))
        for below, above in pairwise(made):
            above.a_prev = below.a
        if is_wide:
            out, keeps_a = made[0].a.shape[-1], self._clips and len(made) > 1
            made[0].widen(allocate("delta side by side", out, out) if keeps_a else made[0].a)
        weights = [each for each in made if each.learned_w is not None]
        if weights and (self._clips or self._needs_gradient):
            room = max(each.largest_block for each in weights)
            for each in weights:
                each.make_blocks(allocate, room)
        return made

    def __call__(self, x: Tensor, y: Tensor, lr: Any) -> Tensor:
        """Take one step of gradient descent; returns C before the step."""
        # 1. Input, one sample a row.
        a = x
        if x.ndim != 2 and not self._networks:
            a = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        for activation in self._input_activations:
            a = activation.forward(a)
        a_first = a

        # 2. Forward: each a takes the memory of its z.
        for layer in self._layers:
            if layer.b is None:
                layer.mm(a, layer.w_t, out=layer.z)
            else:
                layer.addmm(layer.b, a, layer.w_t, out=layer.z)
            layer.sigma_()
            a = layer.a

        # 3. Output error.
        cost = self._error_(y)  # BP1: ∇_a C
        self._top.times_sigma_prime_(self._top.grad_a)  # BP1: ⊙ σ'(z)
        if self._error_weight is not None:
            self._top.delta.mul_(self._error_weight)

        # 4. Backward, and 5. gradients.
        if self._rate_may_change or lr is not self._lr:
            self._set_rate(lr)
        # Not kept: a reference to itself would keep the buffers of a replaced pass.
        learn = self._learn_from_gradients if self._needs_gradient else self._learn_in_products
        if self._clips:
            self._descend(a_first, _learn_later)
            self._clip_and_learn(a_first, learn)
        else:
            self._descend(a_first, learn)
        for learned in self._followers:
            learned.follow_velocity()
        return cost

    def _descend(self, a_first: Tensor, learn: Learn) -> None:
        """Backward; each layer learns as soon as BP2 has read its weights."""
        for layer in self._downwards:
            below = layer.below
            if below is not None:
                layer.mm(layer.delta, layer.w, out=below.grad_a)  # BP2: wᵀδ, before w is updated
            learn(layer, a_first if layer.a_prev is None else layer.a_prev)
            if below is not None:  # its a may be overwritten now
                below.times_sigma_prime_(below.grad_a)  # BP2: ⊙ σ'(z)

    def _clip_and_learn(self, a_first: Tensor, learn: Learn) -> None:
        """Measure the gradient, and only then update."""
        pairs = [
            (each, a_first if each.a_prev is None else each.a_prev) for each in self._downwards
        ]
        norms: list[Any] = []
        for layer, a_prev in pairs:
            if layer.learned_b is not None:
                layer.sum_delta()
                norms.append(_clip.norm_of(layer.grad_b, of_each=bool(self._networks)))
            if layer.learned_w is not None:
                norms += self._norms_of_w(layer, a_prev)
        assert self._max_norm is not None
        reads_values = self._reads_values and not self._networks
        factor = _clip.factor(norms, self._max_norm, self._norm, reads_values=reads_values)
        for layer, a_prev in pairs:
            if factor is not None:
                layer.delta.mul_(for_each_network(factor, layer.delta))
            learn(layer, a_prev)

    def _norms_of_w(self, layer: PassLayer, a_prev: Tensor) -> list[Any]:
        """The norms of parts of ∂C/∂w; in an ensemble, one of all of it for each network."""
        if self._networks:
            gradients = _gradients_of_w(layer, a_prev)
            return [torch.cat([_clip.norm_of(g, of_each=True) for g in gradients])]
        by_gram = _clip.norm_by_gram(layer.delta, a_prev) if self._reads_values else None
        if by_gram is None:
            return [_clip.norm_of(g) for g in _gradients_of_w(layer, a_prev)]
        return [by_gram]

    def _learn_in_products(self, layer: PassLayer, a_prev: Tensor) -> None:
        """Add each gradient to its parameter, velocity or sum as it is computed."""
        w, b = layer.learned_w, layer.learned_b
        if self._rate is not None:
            layer.delta.mul_(self._rate)
        if b is not None:
            if b.keep is not None:
                b.target.mul_(b.keep)
            if b.decay is not None:
                subtract(b.target, b.target, b.decay)
            layer.sum_delta()
            b.target.add_(layer.grad_b, **b.kwargs)
        if w is not None:
            if w.keep is not None:
                w.target.mul_(w.keep)
            if w.decay is not None:
                subtract(w.target, w.target, w.decay)
            layer.add_grad_w_(layer.delta_t, a_prev, **w.kwargs)  # BP4, added

    def _learn_from_gradients(self, layer: PassLayer, a_prev: Tensor) -> None:
        """Hand each gradient to the rule."""
        w, b = layer.learned_w, layer.learned_b
        if b is not None:
            layer.sum_delta()
            b.begin(self._lr)
            b.update(layer.grad_b)
        if w is not None:
            w.begin(self._lr)
            for block, grad_w in enumerate(_gradients_of_w(layer, a_prev)):
                w.update(grad_w, block)

    def _set_rate(self, lr: Any) -> None:
        self._lr = lr
        if self._needs_gradient:
            return
        if self._rate_in_delta:
            rate = self._sample_weight * (1 if self._momentum else -lr)
            self._rate = for_each_network(rate, self._top.delta)
        for layer in self._downwards:
            if layer.learned_b is not None:
                layer.learned_b.set_rate(lr, 1.0, is_in_delta=self._rate_in_delta)
            if layer.learned_w is not None:
                weight = self._sample_weight
                layer.learned_w.set_rate(lr, weight, is_in_delta=self._rate_in_delta)


def _learn_later(layer: PassLayer, a_prev: Tensor) -> None:
    """What a layer does in a backward whose gradient is to be clipped."""


def _gradients_of_w(layer: PassLayer, a_prev: Tensor) -> Iterator[Tensor]:
    """The blocks of ∂C/∂w, one after another in the same buffer."""
    for rows, delta_t, product, grad_w in layer.blocks:
        a = a_prev if a_prev.ndim == 2 else a_prev[rows]
        layer.mm(delta_t, a, out=product)  # BP4
        yield grad_w
