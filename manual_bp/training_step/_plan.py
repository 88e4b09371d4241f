"""All that is derived from a network, a cost and the numbers, and rebuilt when they change."""

import math
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
from manual_bp.training_step._clip import norm_dtype
from manual_bp.training_step._layer import Allocate
from manual_bp.training_step._overlap import memory_of
from manual_bp.training_step._pass import Computation, Pass
from manual_bp.training_step._rules import STEPS, Descent, State
from manual_bp.training_step._snapshot import Snapshot

# For how many shapes of x a pass is kept. Each holds only views, but there may be any number.
MOST_PASSES = 100


class Plan:
    """What is derived from a network, a cost and the numbers of gradient descent.

    It is built whole or, if anything is refused, not at all; the errors are those of
    `TrainingStep`. Once `is_current()` is false, a new one must replace it.

    What the rule has kept so far is taken over by the names of the parameters. A parameter that
    learns and has none of its shape starts from 0.

    Attributes:
        lr, descent: As given. lr may be set.
        networks: The shape in front of every parameter: (), or (K,) in an ensemble.
        computation: What a step computes.
        parameters: By their names in the network.
        state: What the rule keeps: by its kind, and then by those names.
        dtype, device: Those of the parameters.
        norm: That of the last gradient, if it was clipped; of the shape `networks`.
        micro_batches: Made when they are first needed.
        guard: The context in which a step runs.
        is_current: Whether network and cost are still what they were.
    """

    def __init__(
        self,
        net: nn.Sequential,
        cost: Cost,
        lr: float,
        descent: Descent,
        state: State,
    ) -> None:
        _net.require_cost(cost)
        input_activations, layers = _net.parse(net)
        _checks.require_trainable(layers)
        parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
        lr, descent = _checks.checked_numbers(layers[0].w.dtype, lr, descent, parameters)
        self._prepare(Computation(input_activations, layers, cost, descent), parameters, lr, state)
        with torch.inference_mode(False), torch.no_grad():
            self.is_current = Snapshot([(net, layers)], cost).is_unchanged

    def _prepare(
        self, computation: Computation, parameters: Mapping[str, Tensor], lr: Any, state: State
    ) -> None:
        self.computation, self.parameters, self.lr = computation, parameters, lr
        self.descent, cost = computation.descent, computation.cost
        w = parameters[f"{computation.layers[0].name}.weight"]
        self.dtype, self.device, self.networks = w.dtype, w.device, w.shape[:-2]
        with torch.inference_mode(False), torch.no_grad():
            self.state = self._continued(state)
            self.norm = w.new_full(self.networks, math.nan, dtype=norm_dtype(w.dtype))
        self._memories = [memory_of(self.parameters[name]) for name in self.computation.learned]
        # A cost without a bind that fits may use autograd in its forward and gradient.
        self.guard: Any = below_autograd if bind_fits(cost) else torch.no_grad
        self._forget_passes(capacity=0)
        self.micro_batches: Any = None

    def _continued(self, state: State) -> dict[str, dict[str, Tensor]]:
        slots, learned = self.descent.chosen.slots, set(self.computation.learned)
        kept: dict[str, dict[str, Tensor]] = {slot: {} for slot in ("velocities", *slots)}
        for name, parameter in self.parameters.items():
            before = {slot: state[slot][name] for slot in kept if name in state.get(slot, ())}
            fits = all(
                t.shape == (() if slot == STEPS else parameter.shape) for slot, t in before.items()
            )
            if fits and before.keys() >= set(slots):
                for slot, t in before.items():  # the network may have been moved or cast
                    dtype = torch.float64 if slot == STEPS else parameter.dtype
                    kept[slot][name] = t.to(parameter.device, dtype)
            elif name in learned:
                for slot in slots:
                    kept[slot][name] = _zeros(slot, parameter)
        return kept

    @property
    def learned_state(self) -> dict[str, dict[str, Tensor]]:
        """What the rule keeps of the parameters that learn; empty without momentum."""
        learned, slots = self.computation.learned, self.descent.chosen.slots
        return {slot: {name: self.state[slot][name] for name in learned} for slot in slots}

    def pass_for(self, x: Tensor, sums: Mapping[str, Tensor] | None = None) -> Pass:
        """The pass for x, which is kept for all batches of its shape.

        With sums, the one that adds to them; they must be the same each time.
        """
        is_like_parameters = (
            isinstance(x, Tensor)
            and x.dtype is self.dtype
            and x.device == self.device
            and x.layout is strided
            and not x.is_nested
        )
        passes = self._passes if sums is None else self._adding_passes
        run = passes.get(x.shape) if is_like_parameters else None
        return self._prepare_pass(x, sums) if run is None else run

    def _prepare_pass(self, x: Tensor, sums: Mapping[str, Tensor] | None) -> Pass:
        _net.require_input(x, self.computation.layers[0])
        samples = prod(x.shape[:-1]) if not self.networks else x.shape[-2]
        kept = len(self._passes) + len(self._adding_passes)
        if samples > self._capacity or kept == MOST_PASSES:
            self._forget_passes(capacity=samples)
        run = self.new_pass(x.shape[:-1], partial(self._reused_buffer, samples), sums=sums)
        passes = self._passes if sums is None else self._adding_passes
        passes[x.shape] = run
        return run

    def _forget_passes(self, capacity: int) -> None:
        self._passes: dict[torch.Size, Pass] = {}
        self._adding_passes: dict[torch.Size, Pass] = {}
        self._buffers: dict[str, Tensor] = {}
        self._capacity = capacity

    def _reused_buffer(
        self, samples: int, name: str, columns: int, widest: int, rows: int | None = None
    ) -> Tensor:
        """The beginning of the one buffer of that name, which is large enough for every batch."""
        if name not in self._buffers:
            size = self._capacity * widest * prod(self.networks) if rows is None else widest
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        shape = (*self.networks, samples, columns) if rows is None else (rows, columns)
        return self._buffers[name][: prod(shape)].view(shape)

    def new_pass(self, samples: torch.Size, allocate: Allocate, **options: Any) -> Pass:
        """A pass that trains the network's parameters; for the arguments see `Pass`."""
        with torch.inference_mode(False), torch.no_grad():
            # Not the parameters themselves: the views that a pass makes would keep references to
            # them. torch.utils.swap_tensors, which may move a module, refuses such parameters.
            values = {name: p.detach() for name, p in self.parameters.items()}
            computation, state = self.computation, self.learned_state
            return Pass(computation, values, state, samples, allocate, self.norm, **options)

    def apart(self, t: Tensor) -> Tensor:
        """The same values in memory that no learned parameter shares: a copy, if need be."""
        start, end = memory_of(t)
        if any(start < last and first < end for first, last in self._memories):
            return t.clone()
        return t


def _zeros(slot: str, parameter: Tensor) -> Tensor:
    if slot == STEPS:
        return parameter.new_zeros((), dtype=torch.float64)
    return torch.zeros_like(parameter)
