"""A network, its cost and its learning rate: all that one step of training needs, kept ready."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from manual_bp._torch import transforms_are_active
from manual_bp.costs._cost import Cost
from manual_bp.training_step import _checks, _epoch, _state
from manual_bp.training_step._forms import Forms
from manual_bp.training_step._micro_batches import MicroBatches
from manual_bp.training_step._plan import Plan
from manual_bp.training_step._rules import Adam, Descent


class TrainingStep(Forms):
    """Backpropagation and gradient descent in one, in place, close to the speed of the products.

    A call does what `cost(net(x), y).backward()` and a step of `torch.optim.SGD` do, up to
    rounding, without a graph: `.grad` is neither read nor written. Adam, AdamW and
    `clip_grad_norm_` are options.

    Args:
        net: As for `backprop`: linear layers and activations, ours or `torch.nn`'s, or
            `LinearSigmoid`s, in an `nn.Sequential`. No parameter that learns may share memory with
            another. Parameters are updated in place, so the network can be used and saved between
            any two steps. Frozen ones stay as they are.
        cost: A `Cost` reduced by "mean" or "sum".
        lr: The learning rate η, at least 0.
        momentum: μ, at least 0.
        weight_decay: λ, at least 0; for weights and biases alike, unless groups say otherwise.
        dampening: τ, at least 0: how much less of a gradient enters its velocity.
        nesterov: Whether momentum is Nesterov's, which needs momentum and no dampening.
        rule: `Adam()` or `AdamW()` instead of SGD; then momentum and dampening must be 0. None is
            SGD.
        groups: By patterns of parameter names, as `*.bias` or `0.*`, which options differ for
            these: "weight_decay", and "lr_scale", by which lr is multiplied. A parameter takes the
            options of each pattern that fits its name in `net.state_dict()`; the last one counts.
        max_norm: What the norm of the whole gradient is clipped to, above 0, before any parameter
            changes; None does not clip, infinity only measures.

    Attributes:
        lr: As given; it may be set between any two steps, as schedules do.
        grad_norm: The norm of the last gradient before it was clipped.

    A step, for each parameter p with the gradient g of the cost:

        p ← p − η (g + λ p)                            without momentum
        v ← μ v + g + λ p,  then  p ← p − η v          with momentum, starting from v = 0

    With dampening, (1 − τ) (g + λ p) enters v, except for the first time. With Nesterov's momentum,
    p ← p − η (g + λ p + μ v). `Adam` and `AdamW` state their own.

    Clipping multiplies g by max_norm / (norm + 1e-6), if that is below 1. A norm that is nan makes
    all parameters nan, as with `clip_grad_norm_`: `grad_norm` tells.

    Memory besides the parameters, and what the rule keeps for each (v; m and v for Adam): the
    activations of the largest batch so far, and two δ, each as wide as the widest layer. Nesterov,
    dampening and Adam need the gradient of a weight: one buffer for 2¹⁸ numbers on the CPU (or one
    row, if that is longer), and for the largest weight on an accelerator. Clipping needs that
    buffer, a δ for each layer, a copy of the widest activations, and for a moment two matrices
    (N, N), together at most half a weight. Buffers are allocated at the first batch, and again at
    a larger one.

    Two threads must not call it at once. A step notices whether modules, their options, parameters
    or attributes of the cost have been replaced, moved, cast, loaded, frozen or set since the last
    one. A parameter that replaces another of its shape takes over the velocity. Hooks that are
    registered later are not noticed, and do not run; nor is a change inside an attribute of the
    cost, as in a list.

    Raises:
        TypeError: net, cost or an option is of the wrong kind (see `backprop`); a parameter is not
            of float16, bfloat16, float32 or float64; or it is of float16, whose range is too small
            for Adam and for clipping.
        ValueError: Sizes do not match; a parameter that learns shares memory with another,
            overlaps itself, or was made in inference mode; the cost is not reduced; a number is
            below 0 or too large for the parameters' dtype; options exclude each other; a pattern
            fits no parameter; or a Softplus has a threshold below 20.

    Source: Nielsen, Neural Networks and Deep Learning, chapter 2 for the algorithm, chapter 3 for
    momentum and weight decay.

    Examples:
        >>> step = TrainingStep(nn.Sequential(Linear(3, 2), Sigmoid()), QuadraticCost(), lr=3.0)
        >>> cost = step(torch.rand(5, 3), torch.rand(5, 2))
    """

    def __init__(
        self,
        net: nn.Sequential,
        cost: Cost,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        rule: Adam | None = None,
        groups: Mapping[str, Mapping[str, float]] | None = None,
        max_norm: float | None = None,
    ) -> None:
        self._net, self._cost = net, cost
        groups = {} if groups is None else groups
        descent = Descent(momentum, weight_decay, dampening, nesterov, rule, groups, max_norm)
        self._plan = Plan(net, cost, lr, descent, {})

    @property
    def net(self) -> nn.Sequential:
        """The network that is trained."""
        return self._net

    @property
    def cost(self) -> Cost:
        """What is minimised."""
        return self._cost

    @property
    def lr(self) -> float:
        """The learning rate η."""
        return float(self._plan.lr)

    @lr.setter
    def lr(self, value: float) -> None:
        lr, plan = _checks.checked_number("lr", value), self._plan
        try:
            _checks.require_within(plan.dtype, lr, plan.descent)
        except ValueError:
            if plan.is_current():  # otherwise the next step checks it against the new dtype
                raise
        plan.lr = lr

    @property
    def momentum(self) -> float:
        """How much of a velocity is kept, μ."""
        return float(self._plan.descent.momentum)

    @property
    def weight_decay(self) -> float:
        """How strongly parameters are drawn to 0, λ."""
        return float(self._plan.descent.weight_decay)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last gradient before it was clipped, shape (); nan before the first step.

        None if gradients are not clipped. Of float32 for parameters of 16 bits.
        """
        return None if self._plan.descent.max_norm is None else self._plan.norm.clone()

    def __call__(self, x: Tensor, y: Tensor, *, micro_batch: int | None = None) -> Tensor:
        """Take one step of gradient descent on a batch.

        Args:
            x: Inputs, shape (N, in); also (in,) and (..., in). Of the parameters' dtype, on their
                device.
            y: Targets, as the cost takes them.
            micro_batch: If given, the first dimension is read in parts of this size (or less), and
                their gradients are added up. This is the same step, up to rounding. It needs
                buffers for a part only, but a gradient for each parameter.

        Returns:
            The cost of the batch before the step, shape (), without a graph. It is a new tensor at
            each call. On an accelerator, nothing is waited for.

        Raises:
            TypeError, ValueError: x or y does not fit; or the network, the cost or a number no
                longer does (see `TrainingStep`).
            RuntimeError: autocast is on; or a transform of `torch.func`, or `torch.export`, traces
                the call.

        After one of these errors, or one that the cost raises, neither parameters nor velocities
        have changed. In code compiled by `torch.compile`, the step is a graph break and runs in
        eager mode.
        """
        if is_compiling() or transforms_are_active():
            return _checks.call_untraced(self, self, x, y, micro_batch=micro_batch)
        plan = self._refresh()
        _checks.refuse_autocast()
        if micro_batch is not None:
            with plan.guard():
                plan.micro_batches = plan.micro_batches or MicroBatches(plan)
                return plan.micro_batches(x, y, micro_batch)  # type: ignore[no-any-return]
        run = plan.pass_for(x)
        with plan.guard():
            # BP4 of the first layer reads x after other parameters have changed.
            return run(plan.apart(x), y, plan.lr)

    def epoch(self, x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> Tensor:
        """Take a step for each batch of samples, in one call.

            costs = step.epoch(x, y, torch.randperm(len(x)), batch_size=10)

        For progress, or another rate, in between, hand over a part of the order at a time.

        Args:
            x: Samples, (M, ..., in).
            y: Their targets, (M, ...).
            order: The indices of the samples in the order in which they are visited, (K,).
            batch_size: How many make a batch. The last batch may be smaller.

        Returns:
            The cost of each batch before its step, one number a batch.

        Raises:
            TypeError, ValueError, RuntimeError: x, y, order or batch_size does not fit; else as for
                a single step. A target that the cost refuses ends the epoch before its batch.
        """
        if _checks.is_traced():
            return _checks.call_untraced(self, self.epoch, x, y, order, batch_size)
        plan = self._refresh()
        _checks.refuse_autocast()
        _epoch.require_epoch(x, y, order, batch_size)
        with plan.guard():
            x, y = plan.apart(x), plan.apart(y)
            return _epoch.run_epoch(
                lambda x, y: plan.pass_for(x)(x, y, plan.lr), x, y, order, batch_size
            )

    def _refresh(self) -> Plan:
        """The plan for network and cost as they are now."""
        plan = self._plan
        if not plan.is_current():
            plan = Plan(self._net, self._cost, plan.lr, plan.descent, plan.state)
            self._plan = plan
        return plan

    def state_dict(self) -> dict[str, Any]:
        """What to save besides `net.state_dict()` to continue training later.

        The numbers by their names, as far as they are not the default, and copies of what the rule
        keeps (velocities; exp_avg, exp_avg_sq and steps), by the names of the parameters.
        """
        plan = self._plan
        return _state.saved(plan.lr, plan.descent, plan.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, with its numbers and its rule.

        A parameter without a velocity in it starts from v = 0; likewise with Adam.

        Raises:
            KeyError: A key is missing or unknown, or a velocity belongs to no parameter of net.
            TypeError, ValueError: It is not a mapping, a number is not valid, or a velocity has
                another shape than its parameter.

        After one of these errors, nothing has changed.
        """
        lr, descent, kept = _state.read(state, self._refresh().parameters)
        self._plan = Plan(self._net, self._cost, lr, descent, kept)

    def __getstate__(self) -> dict[str, Any]:
        # Not the plan: the passes of a copy would go on writing to the buffers of the original.
        plan = self._plan
        return vars(self) | {"_plan": (plan.lr, plan.descent, plan.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = Plan(self._net, self._cost, *state["_plan"])

    def __repr__(self) -> str:
        defaults = Descent()._asdict()
        changed = "".join(
            f", {name}={value!r}"
            for name, value in self._plan.descent._asdict().items()
            if name in ("momentum", "weight_decay") or value != defaults[name]
        )
        return f"{type(self).__name__}(net={self.net!r}, cost={self.cost!r}, lr={self.lr}{changed})"
