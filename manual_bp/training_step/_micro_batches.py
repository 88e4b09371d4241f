"""One step on a batch that is read in parts: gradients are added up, and then followed once."""

from typing import Any

import torch
from torch import Tensor

from manual_bp import _net, _require
from manual_bp.training_step import _clip
from manual_bp.training_step._learn import Learned
from manual_bp.training_step._plan import Plan
from manual_bp.training_step._rules import for_each_network


class MicroBatches:
    """The sums of the gradients of a plan's learned parameters, and how these follow them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._reads_values = plan.device.type == "cpu"
        descent, state = plan.computation.descent, plan.learned_state
        with torch.inference_mode(False), torch.no_grad():
            options: Any = {"reads_values": self._reads_values, "networks": plan.networks}
            learned = {name: plan.parameters[name].detach() for name in plan.computation.learned}
            self._sums = {name: torch.zeros_like(p) for name, p in learned.items()}
            self._learned = {
                n: Learned(n, p, descent, state, p, **options) for n, p in learned.items()
            }

    def __call__(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        """Take one step on a whole batch; returns C before it."""
        plan = self._plan
        size = _require.count("micro_batch", size)
        _net.require_input(x, plan.computation.layers[0])
        _require.tensor("y", y)
        if x.ndim < 2:
            raise ValueError(f"x must have a dimension to split; got shape {tuple(x.shape)}")
        if not y.ndim or len(y) != len(x):
            raise ValueError(
                f"y must have the first size of x, {len(x)}, to be split; got {tuple(y.shape)}"
            )
        for total in self._sums.values():
            total.zero_()
        cost = plan.norm.new_zeros(())
        is_mean = plan.computation.cost.reduction == "mean"
        for part, target in zip(torch.split(x, size), torch.split(y, size), strict=True):
            share = len(part) / max(1, len(x)) if is_mean and len(x) else 1.0
            run = plan.pass_for(part, self._sums)
            cost = cost + share * run(part, target, -share)
        self._follow()
        return cost.to(plan.dtype)

    def _follow(self) -> None:
        descent = self._plan.descent
        if descent.max_norm is not None:
            norm, of_each = self._plan.norm, bool(self._plan.networks)
            norms = [_clip.norm_of(total, of_each=of_each) for total in self._sums.values()]
            reads_values = self._reads_values and not of_each
            factor = _clip.factor(norms, descent.max_norm, norm, reads_values=reads_values)
            for total in self._sums.values() if factor is not None else ():
                total.mul_(for_each_network(factor, total))
        for name, learned in self._learned.items():
            learned.begin(self._plan.lr)
            for number, (rows, _, _) in enumerate(learned.blocks):
                learned.update(self._sums[name][rows], number)
