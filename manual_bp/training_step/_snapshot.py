"""What a plan was built for, to notice when that has changed."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from manual_bp import _net
from manual_bp._torch import own_buffers, own_modules, own_parameters
from manual_bp.costs._cost import Cost, bind_fits
from manual_bp.layers._activation import ACTIVATIONS
from manual_bp.layers._formula import is_equivalent

# The attributes of any cost that a plan reads once.
_READ_ONCE = ("reduction", "forward", "gradient")


class CostAttributes:
    """The attributes of a cost and of the modules in it, to notice when one is set.

    names: Which attributes of the cost itself to look at; None for all, the modules' included.
    """

    def __init__(self, cost: Cost, names: Sequence[str] | None = None) -> None:
        self._names = names
        self._attributes: list[dict[str, Any]] = [vars(cost)]
        if names is None:
            self._attributes = [
                attributes
                for module in cost.modules()
                for attributes in (
                    vars(module),
                    own_parameters(module),
                    own_buffers(module),
                    own_modules(module),
                )
            ]
        self._then = [attributes.copy() for attributes in self._chosen()]

    def _chosen(self) -> list[dict[str, Any]]:
        if self._names is None:
            return self._attributes
        return [{name: values.get(name) for name in self._names} for values in self._attributes]

    def are_unchanged(self) -> bool:
        """Whether none has been set to another value since."""
        try:
            return self._chosen() == self._then
        except Exception:  # from the comparison of two tensors or arrays, whose result is no bool
            return False


class Frozen:
    """The network, cost and velocities that a captured or compiled step was made for.

    Args:
        verb: How it was made: "captur" or "compil".
        is_current: Whether the plan that it was made from is still that of its TrainingStep.
        cost: Its attributes have the values that they had then.
    """

    def __init__(self, verb: str, is_current: Callable[[], bool], cost: Cost) -> None:
        self._verb, self._is_current = verb, is_current
        # A plan looks at all attributes of a cost with a bind of its own.
        self._attributes = None if bind_fits(cost) else CostAttributes(cost)

    def require(self) -> None:
        """Refuse to go on once something has changed."""
        kept = self._attributes is None or self._attributes.are_unchanged()
        if not (kept and self._is_current()):
            raise RuntimeError(
                f"network, cost and velocities must be what was {self._verb}ed; got others: "
                f"{self._verb}e again"
            )


class Snapshot:
    """The modules of networks, their options, parameters and memory; and a cost's attributes.

    Hooks are left out: to find them, every step would have to look into every module.
    """

    def __init__(
        self, networks: Sequence[tuple[nn.Sequential, Sequence[_net.Layer]]], cost: Cost
    ) -> None:
        self._modules = [
            (modules, tuple(modules.values()))
            for modules in (own_modules(net) for net, _ in networks)
        ]
        self._options = [
            (module, name, getattr(module, name))
            for _, modules in self._modules
            for module in modules
            for kind in ACTIVATIONS
            if is_equivalent(kind, module)
            for name in kind.options
        ]
        # A bind of the cost's own may have captured the value of any attribute. Otherwise forward
        # and gradient read them at each call, and may set some, such as a counter.
        self._cost = CostAttributes(cost, None if bind_fits(cost) else _READ_ONCE)
        self._held: list[tuple[dict[str, Any], str, Any, bool, Any, int]] = []
        for layer in [layer for _, layers in networks for layer in layers]:
            holders = own_parameters(layer.module), own_buffers(layer.module)
            for name, p in (("weight", layer.w), ("bias", layer.b)):
                then: Any = (p, False, None, 0)
                if p is not None:
                    then = (p, p.requires_grad, p.detach(), p.data_ptr())
                self._held += [(held, name, *then) for held in holders if p is None or name in held]

    def is_unchanged(self) -> bool:
        """Whether network and cost are what they were."""
        for held, name, parameter, learns, memory, address in self._held:
            if held.get(name) is not parameter:
                return False
            # share_memory_ changes the address of a storage, which remains the same object.
            if parameter is not None and (
                parameter.requires_grad is not learns
                or not parameter.is_set_to(memory)
                or parameter.data_ptr() != address
            ):
                return False
        for module, name, option in self._options:
            if getattr(module, name) != option:
                return False
        for modules, then in self._modules:
            if tuple(modules.values()) != then:
                return False
        return self._cost.are_unchanged()
