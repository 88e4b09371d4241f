"""All that is derived from a network, a cost and the numbers, and rebuilt when they change."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn, strided

from manual_bp import _net
from manual_bp._torch import below_autograd
from manual_bp.costs._cost import Cost, bind_fits
from manual_bp.training_step import _checks
from manual_bp.training_step._overlap import memory_of
from manual_bp.training_step._pass import Allocate, Computation, Descent, Pass
from manual_bp.training_step._snapshot import Snapshot

# For how many shapes of x a pass is kept. Each holds only views, but there may be any number.
MOST_PASSES = 100


class Plan:
    """What is derived from a network, a cost and the numbers of gradient descent.

    It is built whole or, if anything is refused, not at all; the errors are those of
    `TrainingStep`. Once `is_current()` is false, a new one must replace it.

    Velocities so far are taken over by the names of their parameters. Under momentum, a parameter
    that learns and has no velocity of its shape starts from 0.

    Attributes:
        lr, descent: As given. lr may be set.
        computation: What a step computes.
        parameters, velocities: By their names in the network.
        dtype, device: Those of the parameters.
        guard: The context in which a step runs.
        is_current: Whether network and cost are still what they were.
    """

    def __init__(
        self,
        net: nn.Sequential,
        cost: Cost,
        lr: float,
        descent: Descent,
        velocities: Mapping[str, Tensor],
    ) -> None:
        _net.require_cost(cost)
        input_activations, layers = _net.parse(net)
        _checks.require_trainable(layers)
        w = layers[0].w
        self.lr, self.descent = _checks.checked_numbers(w.dtype, lr, descent)
        self.computation = Computation(input_activations, layers, cost, self.descent)
        self.parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
        self.dtype, self.device = w.dtype, w.device
        with torch.inference_mode(False), torch.no_grad():
            self.velocities = self._continued(velocities)
            self.is_current = Snapshot(net, layers, cost).is_unchanged
        self._memories = [memory_of(self.parameters[name]) for name in self.computation.learned]
        # A cost without a bind that fits may use autograd in its forward and gradient.
        self.guard: Any = below_autograd if bind_fits(cost) else torch.no_grad
        self._forget_passes(capacity=0)

    def _continued(self, velocities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            velocity = velocities.get(name)
            if velocity is not None and velocity.shape == parameter.shape:
                kept[name] = velocity.to(parameter)  # the network may have been moved or cast
            elif self.descent.momentum and parameter.requires_grad:
                kept[name] = torch.zeros_like(parameter)
        return kept

    @property
    def learned_velocities(self) -> dict[str, Tensor] | None:
        """Those of the parameters that learn; None without momentum."""
        if not self.descent.momentum:
            return None
        return {name: self.velocities[name] for name in self.computation.learned}

    def pass_for(self, x: Tensor) -> Pass:
        """The pass for x, which is kept for all batches of its shape."""
        is_like_parameters = (
            isinstance(x, Tensor)
            and x.dtype is self.dtype
            and x.device == self.device
            and x.layout is strided
            and not x.is_nested
        )
        run = self._passes.get(x.shape) if is_like_parameters else None
        return self._prepare_pass(x) if run is None else run

    def _prepare_pass(self, x: Tensor) -> Pass:
        _net.require_input(x, self.computation.layers[0])
        samples = prod(x.shape[:-1])
        if samples > self._capacity or len(self._passes) == MOST_PASSES:
            self._forget_passes(capacity=samples)
        run = self.new_pass(x.shape[:-1], partial(self._reused_buffer, samples))
        self._passes[x.shape] = run
        return run

    def _forget_passes(self, capacity: int) -> None:
        self._passes: dict[torch.Size, Pass] = {}
        self._buffers: dict[str, Tensor] = {}
        self._capacity = capacity

    def _reused_buffer(self, samples: int, name: str, columns: int, widest: int) -> Tensor:
        """The beginning of the one buffer of that name, which is large enough for every batch."""
        if name not in self._buffers:
            size = self._capacity * widest
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][: samples * columns].view(samples, columns)

    def new_pass(self, samples: torch.Size, allocate: Allocate, **options: bool) -> Pass:
        """A pass that trains the network's parameters; for the arguments see `Pass`."""
        with torch.inference_mode(False), torch.no_grad():
            # Not the parameters themselves: the views that a pass makes would keep references to
            # them. torch.utils.swap_tensors, which may move a module, refuses such parameters.
            values = {name: p.detach() for name, p in self.parameters.items()}
            velocities = self.learned_velocities or {}
            return Pass(self.computation, values, velocities, samples, allocate, **options)

    def may_overlap_parameters(self, x: Tensor) -> bool:
        """Whether x may share memory with a parameter that learns."""
        start, end = memory_of(x)
        return any(start < last and first < end for first, last in self._memories)
