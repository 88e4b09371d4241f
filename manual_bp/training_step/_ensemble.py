"""Networks of one shape trained at once, as a search for the best settings does it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from manual_bp import _require
from manual_bp.costs._cost import Cost
from manual_bp.training_step import _checks, _epoch, _state
from manual_bp.training_step._micro_batches import MicroBatches
from manual_bp.training_step._rules import STEPS, Adam, Descent
from manual_bp.training_step._stack import EnsemblePlan, gathered, naming, networks, spread, stacked

Numbers = float | Sequence[float] | Tensor


class EnsembleStep:
    """`TrainingStep` for K networks of one shape at once, each with settings of its own.

    A call does what K `TrainingStep`s do, up to rounding: the matrix products of all networks are
    batched. If one network diverges, the others are not affected.

    Args:
        nets: The networks, which must be alike in all but the values of their parameters: layers,
            activations and their options, dtypes, devices, and what is frozen.
        cost: As for `TrainingStep`. A cost without a `bind` of ours is called for each network.
        lr: The learning rate η of all networks, or K of them.
        momentum: μ of all networks, or K of them.
        weight_decay: λ, likewise.
        dampening: τ, likewise.
        nesterov: As for `TrainingStep`, the same for all networks.
        rule: Likewise.
        groups: Likewise: a weight decay in them is that of all networks.
        max_norm: What the norm of the gradient of each network is clipped to, or K such limits;
            infinity only measures.

    Attributes:
        nets, cost: As given; nets is a tuple.
        lr: The learning rates, (K,), of float64; may be set, as the argument, or changed in place.
        grad_norm: The norm of the last gradient of each network before it was clipped, (K,).

    The step moves the parameters into common memory, when it is made and whenever they have been
    moved since. They remain the same parameters of the networks, which can be used, saved, moved,
    cast and loaded between any two steps, and frozen if it is done in all of them. Views of a
    parameter that were made before no longer share its memory, as after `net.to(...)`.

    Memory: K times that of a `TrainingStep`, without its (N, N) matrices, as gradients are always
    computed for clipping. If all networks read the same x, clipping also needs the δ of the first
    layers a second time. The common memory lasts as long as any of the networks: to keep one only,
    keep a `copy.deepcopy` of it.

    Raises:
        TypeError, ValueError: As for `TrainingStep`; or networks are not alike, share memory with
            each other, or are in memory shared by processes; or the parameters are of float16.

    Source: see `TrainingStep`.

    Examples:
        >>> nets = [nn.Sequential(Linear(3, 2), Sigmoid()) for _ in range(4)]
        >>> step = EnsembleStep(nets, QuadraticCost(), lr=[0.1, 0.3, 1.0, 3.0])
        >>> costs = step(torch.rand(5, 3), torch.rand(5, 2))
        >>> costs.shape
        torch.Size([4])
    """

    def __init__(
        self,
        nets: Sequence[nn.Sequential],
        cost: Cost,
        lr: Numbers,
        *,
        momentum: Numbers = 0.0,
        weight_decay: Numbers = 0.0,
        dampening: Numbers = 0.0,
        nesterov: bool = False,
        rule: Adam | None = None,
        groups: Mapping[str, Mapping[str, float]] | None = None,
        max_norm: Numbers | None = None,
    ) -> None:
        self._nets, self._cost = networks(nets), cost
        groups = {} if groups is None else groups
        descent = Descent(momentum, weight_decay, dampening, nesterov, rule, groups, max_norm)
        self._adopt(EnsemblePlan(self._nets, cost, lr, descent, {}))

    def _adopt(self, plan: EnsemblePlan) -> None:
        with torch.inference_mode(False):
            self._plan, self._lr = plan, torch.tensor(plan.rates, dtype=torch.float64, device="cpu")

    @property
    def nets(self) -> tuple[nn.Sequential, ...]:
        """The networks that are trained."""
        return self._nets

    @property
    def cost(self) -> Cost:
        """What is minimised."""
        return self._cost

    @property
    def lr(self) -> Tensor:
        """The learning rate η of each network, (K,), on the CPU."""
        return self._lr

    @lr.setter
    def lr(self, value: Numbers) -> None:
        # A new tensor: the old one may be what a schedule starts from.
        self._adopt(self._refresh(spread("lr", value, len(self.nets))))

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last gradient of each network before it was clipped, (K,).

        As `TrainingStep.grad_norm`: None if gradients are not clipped.
        """
        return None if self._plan.descent.max_norm is None else self._plan.norm.clone()

    def __call__(self, x: Tensor, y: Tensor, *, micro_batch: int | None = None) -> Tensor:
        """Take one step of gradient descent with each network.

        Args:
            x: A batch for all networks, (N, in), or one for each of them, (K, N, in). Of the
                parameters' dtype, on their device.
            y: Its targets, as the cost takes them; or, with a batch for each, these stacked.
            micro_batch: As for `TrainingStep`, for a batch for all.

        Returns:
            The cost of the batch in each network before the step, (K,), without a graph. It is a
            new tensor at each call.

        Raises:
            TypeError, ValueError: x or y does not fit; or the networks, the cost or a number no
                longer does (see `EnsembleStep`).
            RuntimeError: See `TrainingStep`.

        After one of these errors, or one that the cost raises, nothing has changed.
        """
        if _checks.is_traced():
            return _checks.call_untraced(self, self, x, y, micro_batch=micro_batch)
        plan = self._refresh()
        _checks.refuse_autocast()
        self._require_batch(x, y)
        with plan.guard():
            if micro_batch is None:
                # BP4 of the first layer reads x after other parameters have changed.
                costs = self._take_step(plan.apart(x), y)
            else:
                costs = self._take_in_parts(x, y, micro_batch)
        increment_version(plan.learned)
        return costs

    def epoch(self, x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> Tensor:
        """Take a step for each batch of samples: see `TrainingStep.epoch`.

        Every network sees the same batches.

        Returns:
            The cost of each batch before its step, (batches, K).
        """
        if _checks.is_traced():
            return _checks.call_untraced(self, self.epoch, x, y, order, batch_size)
        plan = self._refresh()
        _checks.refuse_autocast()
        _epoch.require_epoch(x, y, order, batch_size)
        _require.matrix("x", x, "(M, in)")
        self._require_batch(x[:batch_size], y[:batch_size])
        try:
            with plan.guard():
                x, y = plan.apart(x), plan.apart(y)
                costs = _epoch.run_epoch(self._take_step, x, y, order, batch_size)
        finally:
            increment_version(plan.learned)
        return costs.view(-1 if len(costs) else 0, len(self.nets))

    def _take_step(self, x: Tensor, y: Tensor) -> Tensor:
        return self._plan.pass_for(x)(x, y, self._plan.lr)

    def _take_in_parts(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        if x.ndim == 3:
            raise ValueError(
                f"micro_batch must be None with a batch for each network; got {size} and x of "
                f"shape {tuple(x.shape)}"
            )
        plan = self._plan
        plan.micro_batches = plan.micro_batches or MicroBatches(plan)
        costs: Tensor = plan.micro_batches(x, y, size)
        return costs

    def _require_batch(self, x: Tensor, y: Tensor) -> None:
        """Refuse a batch that is neither one for all networks nor one for each."""
        _require.tensor("x", x)
        _require.tensor("y", y)
        if x.ndim != 2 and (x.ndim != 3 or len(x) != len(self.nets)):
            raise ValueError(
                f"x must have shape (N, in), or (K, N, in) for K = {len(self.nets)} networks; got "
                f"{tuple(x.shape)}"
            )
        if y.shape[: x.ndim - 1] != x.shape[:-1]:
            raise ValueError(
                f"y must have the first sizes of x, {tuple(x.shape[:-1])}; got {tuple(y.shape)}"
            )

    def _refresh(self, lr: Numbers | None = None) -> EnsemblePlan:
        """The plan for networks, cost and rates as they are now, or for other rates."""
        plan, lr = self._plan, self._lr if lr is None else lr
        if not plan.is_current():
            plan = EnsemblePlan(self._nets, self._cost, lr, *plan.given)
            self._plan = plan
        plan.set_rates(lr)
        return plan

    def state_dicts(self) -> list[dict[str, Any]]:
        """What to save besides the networks' `state_dict()`, for each of them.

        Each is what `TrainingStep.state_dict` of that network alone would return, so that a single
        network can go on in a `TrainingStep`.
        """
        plan = self._plan
        found = []
        for k, (lr, descent) in enumerate(zip(self.lr.tolist(), plan.each, strict=True)):
            state = {
                slot: {n: t if slot == STEPS else t[k] for n, t in kept.items()}
                for slot, kept in plan.state.items()
            }
            found.append(_state.saved(lr, descent, state))
        return found

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what `state_dicts` returned, or as many of `TrainingStep.state_dict`.

        Raises:
            KeyError, TypeError, ValueError: states is not a sequence of one for each network, one
                of them does not fit its network (see `TrainingStep`), or they differ in what must
                be the same for all.

        After one of these errors, nothing has changed.
        """
        plan = self._refresh()
        if isinstance(states, Mapping) or not isinstance(states, Sequence):
            raise TypeError(
                f"states must be a sequence, as state_dicts() gives it; got {type(states).__name__}"
            )
        if len(states) != len(self.nets):
            raise ValueError(
                f"states must be one for each of {len(self.nets)} networks; got {len(states)}"
            )
        read = []
        for k, state in enumerate(states):
            with naming(k):
                own = {name: t[k] for name, t in plan.parameters.items()}
                read.append(_state.read(state, own))
        rates, descents, kept = zip(*read, strict=True)
        descent, state = gathered(descents), stacked(kept)
        self._adopt(EnsemblePlan(self._nets, self._cost, rates, descent, state))

    def __getstate__(self) -> dict[str, Any]:
        # Not the plan: see TrainingStep.
        return vars(self) | {"_plan": self._plan.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = EnsemblePlan(self._nets, self._cost, self._lr, *state["_plan"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.nets)} times {self.nets[0]!r}, cost={self.cost!r}, "
            f"lr={self.lr.tolist()})"
        )
