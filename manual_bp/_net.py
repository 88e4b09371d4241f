"""The networks that the explicit algorithm takes: linear layers and activations in a Sequential."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from manual_bp import _require
from manual_bp._autocast import autocast
from manual_bp._torch import (
    has_backward_hooks,
    has_forward_hooks,
    has_tensor_hooks,
    own_buffers,
    own_modules,
)
from manual_bp.costs._cost import Cost
from manual_bp.layers._activation import ACTIVATIONS, Activation
from manual_bp.layers._formula import copy_as, has_forward_of, is_equivalent
from manual_bp.layers.linear import Linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid
from manual_bp.layers.sigmoid import Sigmoid


class Layer(NamedTuple):
    """A linear layer, and the activations up to the next one: none, one, or a composition."""

    name: str
    module: nn.Module
    w: Tensor
    b: Tensor | None
    activations: list[Activation]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """w, and b if there is one, by their names in the network's state_dict.

        A frozen one may be a buffer of the module.
        """
        named = {f"{self.name}.weight": self.w, f"{self.name}.bias": self.b}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def learns_w(self) -> bool:
        return self.w.requires_grad

    @property
    def learns_b(self) -> bool:
        return self.b is not None and self.b.requires_grad


def parse(net: nn.Sequential) -> tuple[list[Activation], list[Layer]]:
    """The activations before the first linear layer (usually none), and the layers.

    Raises:
        TypeError: net is not an nn.Sequential, or holds a module that the algorithm does not take.
        ValueError: net has no linear layer, or its sizes or devices do not fit each other.
    """
    if not has_forward_of(nn.Sequential, net):
        raise TypeError(
            f"net must be an nn.Sequential of linear layers and activations; "
            f"got {type(net).__name__}"
        )
    _refuse_hooks("net", net)
    input_activations: list[Activation] = []
    layers: list[Layer] = []
    # Not named_children(), which skips a module that occurs a second time.
    for name, module in own_modules(net).items():
        place = f"net[{name!r}]"
        if is_equivalent(Linear, module):
            layers.append(_linear_layer(place, name, module, layers))
        elif has_forward_of(LinearSigmoid, module):
            layers.append(_linear_layer(place, name, module, layers))
            layers[-1].activations.append(_activation(place, Sigmoid()))
        elif not has_forward_of(nn.Identity, module):  # convert(fuse=True) makes some
            activations = layers[-1].activations if layers else input_activations
            activations.append(_activation(place, module))
        _refuse_hooks(place, module)
    if not layers:
        raise ValueError(
            f"net must hold at least one linear layer; got {len(net)} modules, none of them linear"
        )
    return input_activations, layers


def _linear_layer(place: str, name: str, module: Any, below: Sequence[Layer]) -> Layer:
    w = _parameter(f"{place}.weight", module.weight, module)
    _require.matrix(f"{place}.weight", w, "(out, in)")
    b = None if module.bias is None else _parameter(f"{place}.bias", module.bias, module)
    if b is not None:
        _require.like(f"{place}.bias", b, f"{place}.weight", w)
        _require.shape(f"{place}.bias", b, w.shape[:1], f"the first size of {place}.weight")
    if below:
        _require.like(f"{place}.weight", w, f"net[{below[-1].name!r}].weight", below[-1].w)
    if below and below[-1].w.shape[0] != w.shape[1]:
        raise ValueError(
            f"{place} must take the {below[-1].w.shape[0]} outputs of net[{below[-1].name!r}]; "
            f"got in_features={w.shape[1]}"
        )
    return Layer(name, module, w, b, [])


def _parameter(place: str, value: Tensor, module: nn.Module) -> Tensor:
    if is_lazy(value):
        raise TypeError(f"{place} must be initialised; got a lazy one that has seen no input yet")
    is_buffer = any(value is buffer for buffer in own_buffers(module).values())
    if is_buffer and value.requires_grad:
        raise TypeError(f"{place} must be a parameter if it is to learn; got a buffer")
    if not (is_buffer or isinstance(value, nn.Parameter)):
        raise TypeError(
            f"{place} must be a parameter; got a tensor computed from others (pruning, weight "
            f"norm), which gets no gradient"
        )
    _require.tensor(place, value)
    if has_tensor_hooks(value):
        raise TypeError(f"{place} must have no hooks, which would not run; got some")
    return value


def _activation(place: str, module: Any) -> Activation:
    for ours in ACTIVATIONS:
        if is_equivalent(ours, module):
            # Not in place, because a trace keeps z.
            return cast("Activation", copy_as(ours, module))
    known = ", ".join(sorted(ours.__name__ for ours in ACTIVATIONS))
    raise TypeError(
        f"{place} must be a Linear, LinearSigmoid or an activation ({known}), of manual_bp or "
        f"torch.nn; got {type(module).__name__}"
    )


def _refuse_hooks(place: str, module: nn.Module) -> None:
    if has_forward_hooks(module) or has_backward_hooks(module):
        raise TypeError(
            f"{place} must have no hooks, which would not run; "
            f"got a {type(module).__name__} with hooks"
        )


def require_input(x: Tensor, first: Layer) -> None:
    """Raise an error unless x fits the first layer."""
    name = f"net[{first.name!r}]"
    _require.real("x", x)
    x, w = autocast(x, first.w)
    _require.like("x", x, f"{name}.weight", w)
    _require.components("x", x, w.shape[1], f"the in_features of {name}")


def require_cost(cost: object) -> None:
    """Raise an error unless cost is a reduced `Cost` without hooks."""
    if not isinstance(cost, Cost):
        raise TypeError(
            f"cost must be a manual_bp.Cost, such as QuadraticCost(); got {type(cost).__name__}"
        )
    _refuse_hooks("cost", cost)
    if cost.reduction == "none":
        raise ValueError("cost must be reduced by 'mean' or 'sum'; got reduction='none'")
