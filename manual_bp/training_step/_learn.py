"""One learned parameter in a pass: what its gradient is added to, or the rule that receives it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from manual_bp.training_step._rules import (
    STEPS,
    Descent,
    State,
    add,
    for_each_network,
    is_used,
    subtract,
)

# How many numbers of a gradient are computed at a time on the CPU, so that they stay in its cache
# (but at least one row; in an ensemble, at least one network).
BLOCK = 2**18


class Learned:
    """One parameter that learns.

    Args:
        name: The parameter's, in the network.
        value: The parameter.
        descent: How it follows its gradient.
        state: What the rule keeps, of all parameters.
        target: What the gradient is added to: the parameter, or its velocity under momentum, or a
            sum of gradients. Not used by a rule that needs the gradient itself.
        reads_values: Whether a number of steps may be read from its tensor.
        networks: The shape in front of every parameter: (), or (K,) in an ensemble.

    Attributes:
        target: As given.
        keep: What target is multiplied by before the gradient is added; None for 1.
        decay: How much of target is subtracted before that, η λ; None for 0.
        kwargs: Keyword arguments of the addition.
        blocks: The slice of rows of each block of a gradient; with those rows of the parameter,
            and of what is kept of it. In an ensemble the rows are networks.
    """

    __slots__ = (
        "_factors", "_momentum", "_options", "_rate", "_reads_values", "_rule", "_steps", "_value",
        "blocks", "decay", "keep", "kwargs", "target",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        value: Tensor,
        descent: Descent,
        state: State,
        target: Tensor,
        *,
        reads_values: bool,
        networks: Sequence[int],
    ) -> None:
        self._value, self.target, self._reads_values = value, target, reads_values
        descent = Descent(*(for_each_network(number, value) for number in descent))
        self._rule, self._options = descent.chosen, descent.options(name)
        self._momentum = descent.momentum
        kept = {slot: state[slot][name] for slot in self._rule.slots}
        self._steps = kept.pop(STEPS, None)
        rows = max(1, BLOCK // max(1, value[:1].numel()))
        slices = [slice(i, i + rows) for i in range(0, len(value), rows)]
        is_vector = value.ndim == 1 + len(networks)  # its gradient is computed at once
        if is_vector or not reads_values or len(slices) < 2:
            slices = [slice(None)]
        self.blocks = [(s, value[s], [t[s] for t in kept.values()]) for s in slices]
        self.keep: Any = None
        self.decay: Any = None
        self.kwargs: dict[str, float] = {}
        self._rate: Any = None
        self._factors: Any = None

    def set_rate(self, lr: Any, weight: float, *, is_in_delta: bool) -> None:
        """Prepare the numbers of the additions.

        Args:
            lr: η, a number or a tensor.
            weight: That of a sample, unless the gradient that is added includes it.
            is_in_delta: Whether δ is multiplied by −η and the weight (by the weight alone under
                momentum).
        """
        scale, weight_decay = self._options
        self._rate = rate = for_each_network(lr, self._value) * scale
        keep: Any
        if is_used(self._momentum):
            keep, alpha = self._momentum, 1.0 if is_in_delta else weight
        else:
            # Not a factor 1 − η λ, whose rounding would be the same at every step and add up.
            self.decay = rate * weight_decay if is_used(weight_decay) else None
            keep = None
            alpha = scale if is_in_delta else -rate * weight
        # A factor of 1 is left out: reading it takes PyTorch a tenth of a small product's time.
        self.kwargs, self.keep = {} if alpha == 1 else {"alpha": alpha}, keep
        if keep is not None and self._value.ndim == 2 and not is_in_delta:
            self.kwargs, self.keep = self.kwargs | {"beta": keep}, None

    def follow_velocity(self) -> None:
        """Take the step of momentum, once the gradient is in the velocity."""
        if is_used(self._options.weight_decay):
            add(self.target, self._value, self._options.weight_decay)
        subtract(self._value, self.target, self._rate)

    def begin(self, lr: Any) -> None:
        """Count a step with this learning rate, whose gradient follows block by block."""
        t: Any = self._steps
        if t is not None:
            t.add_(1)
            t = t.item() if self._reads_values else t
        scale, weight_decay = self._options
        rate = for_each_network(lr, self._value) * scale
        self._factors = self._rule.factors(rate, weight_decay, t)

    def update(self, g: Tensor, block: int = 0) -> None:
        """Update the rows of one block by the rule; g is overwritten."""
        rows, value, kept = self.blocks[block]
        factors = self._factors
        if len(self.blocks) > 1:
            factors = [f[rows] if isinstance(f, Tensor) and f.ndim else f for f in factors]
        self._rule.update(value, g, kept, factors)
