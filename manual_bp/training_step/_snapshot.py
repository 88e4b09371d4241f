"""What buffers and CUDA graphs were made for, to notice when that has changed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from manual_bp import _net
from manual_bp.costs._cost import Cost
from manual_bp.layers._activation import ACTIVATIONS

# What changes what a cost computes.
_OF_A_COST = ("reduction", "forward", "gradient")


class Snapshot:
    """Modules, their settings, parameters, where and how these lie, and which learn; and the cost.

    Not hooks, for which every step would have to look into every module.
    """

    def __init__(self, net: nn.Sequential, layers: Sequence[_net.Layer], cost: Cost) -> None:
        self._modules, self._there = net._modules, tuple(net._modules.values())
        self._settings = [(vars(cost), name, vars(cost).get(name)) for name in _OF_A_COST]
        options = {name for activation in ACTIVATIONS for name in activation.options}
        for module in self._there:
            has = vars(module)
            self._settings += [(has, name, has[name]) for name in options if name in has]
        self._held: list[tuple[dict[str, Any], str, Tensor, bool, Tensor]] = []
        self._absent: list[dict[str, Any]] = []
        for layer in layers:
            parameters: dict[str, Any] = layer.module._parameters
            buffers: dict[str, Any] = layer.module._buffers
            for name, p in (("weight", layer.w), ("bias", layer.b)):
                if p is None:
                    self._absent += [parameters, buffers]
                else:
                    holder = parameters if name in parameters else buffers
                    self._held.append((holder, name, p, p.requires_grad, p.detach()))

    def is_as_it_was(self) -> bool:
        """Whether nothing of it has changed."""
        for parameters, name, parameter, learns, memory in self._held:
            if (
                parameters.get(name) is not parameter
                or parameter.requires_grad is not learns
                or not parameter.is_set_to(memory)
            ):
                return False
        for values, name, value in self._settings:
            if values.get(name) != value:
                return False
        for parameters in self._absent:
            if parameters.get("bias") is not None:
                return False
        return tuple(self._modules.values()) == self._there
