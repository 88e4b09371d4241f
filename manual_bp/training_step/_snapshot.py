"""What buffers and CUDA graphs were made for, to notice when it is so no more."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from manual_bp import _net
from manual_bp.costs._cost import Cost


class Snapshot:
    """The modules of a network, its parameters, where they lie and which learn; and the cost.

    Not hooks, for which every step would have to look into every module.
    """

    def __init__(self, net: nn.Sequential, layers: Sequence[_net.Layer], cost: Cost) -> None:
        self._modules, self._there = net._modules, tuple(net._modules.values())
        self._cost, self._reduction = cost, cost.reduction
        self._held: list[tuple[dict[str, Any], str, nn.Parameter, bool, int]] = []
        self._absent: list[dict[str, Any]] = []
        for layer in layers:
            parameters = layer.module._parameters
            for name, p in (("weight", layer.w), ("bias", layer.b)):
                if p is None:
                    self._absent.append(parameters)
                else:
                    self._held.append((parameters, name, p, p.requires_grad, p.data_ptr()))

    def is_as_it_was(self) -> bool:
        """Whether nothing of it has changed."""
        for parameters, name, parameter, learns, address in self._held:
            if (
                parameters.get(name) is not parameter
                or parameter.requires_grad is not learns
                or parameter.data_ptr() != address
            ):
                return False
        return (
            tuple(self._modules.values()) == self._there
            and self._cost.reduction is self._reduction
            and not any(parameters["bias"] is not None for parameters in self._absent)
        )
