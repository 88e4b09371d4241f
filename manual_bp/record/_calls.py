"""The calls of layers in a block: the input of each, where its z goes, and the δ that arrives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import _require
from manual_bp._autocast import without_autocast
from manual_bp._torch import node_that_made, own_buffers, own_parameters, version
from manual_bp.layers._activation import Activation
from manual_bp.layers._formula import has_forward_of, is_equivalent
from manual_bp.layers.linear import Linear, linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid, linear_sigmoid
from manual_bp.layers.sigmoid import Sigmoid, sigmoid_prime
from manual_bp.record._activations import activation_of
from manual_bp.record._choose import Names
from manual_bp.record._samples import OwnTensors
from manual_bp.trace import Call

# The functions that compute w a + b, with their names for a, w and b.
PRODUCTS = {
    F.linear: ("input", "weight", "bias"),
    linear: ("a", "w", "b"),
    linear_sigmoid: ("a", "w", "b"),
}


class Product(NamedTuple):
    """The arguments of w a + b, and whether the same function applied σ to it."""

    a_prev: Tensor
    w: Tensor
    b: Tensor | None
    is_fused: bool


class Kept:
    """A tensor without its graph, and whether it has been overwritten since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.detached = tensor.detach()
        self.version = version(tensor)

    def has_changed(self) -> bool:
        return version(self.detached) != self.version


class PendingCall:
    """A call of a layer, from the moment that it ran until its δ arrives.

    node: The node of autograd's graph that made z, where δ arrives.
    gradient: What arrived there; None until then.
    number: Its place among all calls in the block, from 1.
    is_own: Whether its input is one of the model's own tensors (see `OwnTensors`).
    """

    def __init__(
        self, product: Product, a_prev: Kept, z: Tensor, number: int, is_own: bool
    ) -> None:
        _, self.w, self.b, self.is_fused = product
        self.number, self.is_own = number, is_own
        self.w_version, self._b_version = self._versions()
        self._a_prev = a_prev
        self._path = [Kept(z)]  # from z to a; if the call is fused, z is a already
        self._activations: list[Activation] = []
        self._is_forked = False  # z goes two ways: there is no single a
        self._z_again: Tensor | None = None
        self._z_is_known = True
        self.gradient: Tensor | None = None
        self.node = node_that_made(z)
        # A node's hook runs after those of tensors, which may change the gradient.
        self._hook = self.node.register_prehook(self._receive)

    @property
    def shape(self) -> torch.Size:
        return self._path[0].detached.shape

    @property
    def end(self) -> Kept:
        """The last tensor on the path from z to a, as far as it is known."""
        return self._path[-1]

    def release(self) -> None:
        self._hook.remove()

    def _versions(self) -> tuple[int, int]:
        return version(self.w), 0 if self.b is None else version(self.b)

    def _receive(self, gradients: Sequence[Tensor | None]) -> None:
        # The object itself: if it were a view, autograd might take its memory for a `.grad`.
        self.gradient = gradients[0]
        if self.is_fused or self._path[0].has_changed():
            # Computed now, since an optimiser may step w as soon as its gradient has arrived.
            self._z_again = self._product_again(self._path[0].detached.dtype)

    def _product_again(self, dtype: torch.dtype) -> Tensor:
        a_prev = self._a_prev.detached
        if self._a_prev.has_changed() or self._versions() != (self.w_version, self._b_version):
            self._z_is_known = False
            return a_prev.new_full((*a_prev.shape[:-1], len(self.w)), math.nan, dtype=dtype)
        w, b = self.w.detach().to(dtype), None if self.b is None else self.b.detach().to(dtype)
        with without_autocast(a_prev):
            return F.linear(a_prev.to(dtype), w, b)

    def prepare_to_follow(self, z: Tensor) -> None:
        """Note that z is about to go into an activation, unless it was changed in place before."""
        if z is self.end.tensor and self.end.has_changed():
            self._is_forked = True

    def follow(self, activation: Activation | None, z: Tensor, a: Tensor) -> bool:
        """Note that z went into an activation; None for one that is not one of ours.

        Returns whether the path leads through it, to a.
        """
        if activation is None or z is not self.end.tensor:
            self._is_forked = True
            return False
        self._activations.append(activation)
        self._path.append(Kept(a))
        return True

    def complete(self, uses: int) -> Call:
        """The call with its δ, which has arrived; uses is how often the graphs use z."""
        gradient = cast("Tensor", self.gradient)
        z = self._path[0].detached
        delta = gradient.detach() if gradient.requires_grad else gradient
        if delta.shape != z.shape:
            delta = delta.reshape(z.shape)
        is_forked = self._is_forked or uses > 1
        activations = [] if is_forked else self._activations
        if self.is_fused:
            delta = delta * sigmoid_prime(z)  # BP1, BP2: the factor ⊙ σ'(z)
            activations = [Sigmoid(), *activations]
        if self._z_again is not None:
            z = self._z_again
        a = self.end.detached if activations else z
        if activations and (is_forked or self.end.has_changed()):
            a = z
            with without_autocast(z):
                for activation in activations:
                    a = activation.forward(a)
        versions = self._a_prev.version, version(z), version(a), version(delta)
        a_prev = self._a_prev.detached
        return Call(a_prev, z, a, delta, tuple(activations), self._z_is_known, versions)


class SeenCalls:
    """The calls of layers that were seen.

    names: The layers to record, with their names.
    by_layer: The calls of each layer that ran, if gradients may come to them.
    unseen: The layers with an output that was not the product seen in the call.
    """

    def __init__(self, names: Names, own: OwnTensors) -> None:
        self.names, self._own = names, own
        self.by_layer: dict[nn.Module, list[PendingCall]] = {}
        self.unseen: set[nn.Module] = set()
        self._path_of: dict[int, PendingCall] = {}  # from the id of each tensor on a path
        self._last_product: tuple[Product, Tensor, int] | None = None  # with z and its version
        self._count = 0
        self._count_before_pass: int | None = None  # None outside of backward

    @property
    def all(self) -> list[PendingCall]:
        return [call for calls in self.by_layer.values() for call in calls]

    def release(self) -> None:
        """Remove the hooks, and release all calls."""
        for call in self.all:
            call.release()
        self.by_layer, self._path_of, self._last_product = {}, {}, None

    def begin_pass(self) -> None:
        """Forget the δ of an earlier pass, which may have failed."""
        for call in self.all:
            call.gradient = None
        self._count_before_pass = self._count

    def end_pass(self) -> None:
        self._count_before_pass = None

    def see_product(self, func: Any, args: Any, kwargs: Any, z: Any) -> None:
        """Note that one of `PRODUCTS` was called."""
        if isinstance(z, Tensor):
            a, w, b = names = PRODUCTS[func]
            given = dict(zip(names, args, strict=False)) | kwargs
            product = Product(given[a], given[w], given.get(b), func is linear_sigmoid)
            self._last_product = product, z, version(z)

    def see_layer(self, layer: nn.Module, args: Any, kwargs: Any, z: Any) -> None:
        """Note that a layer was called.

        Raises:
            TypeError: Its input is nested, or its weight is not dense.
        """
        calls = self.by_layer.setdefault(layer, [])
        if not getattr(z, "requires_grad", False):
            return  # a checkpoint may run it again in backward
        product = self._product(layer, args, kwargs, z)
        if product is None:
            self.unseen.add(layer)
            return
        # Asked now, since a parameter may be overwritten once its gradient has arrived.
        is_own = product.a_prev in self._own
        self._count += 1
        call = PendingCall(product, self._input(layer, product), z, self._count, is_own)
        calls.append(call)
        self._path_of[id(z)] = call

    def _input(self, layer: nn.Module, product: Product) -> Kept:
        a_prev, w = product.a_prev, product.w
        if a_prev.layout is not torch.strided and not a_prev.is_nested:
            a_prev = a_prev.detach().to_dense()  # a trace is made of rows
        if a_prev.is_nested or w.is_nested or w.layout is not torch.strided:
            _require.tensor(f"the input of layer {self.names[layer]!r}", a_prev)
            _require.tensor(f"the weight of layer {self.names[layer]!r}", w)
        return Kept(a_prev)

    def _product(self, layer: nn.Module, args: Any, kwargs: Any, z: Tensor) -> Product | None:
        """The product that a layer's call made; None if none was seen.

        w is the one that was seen, not `layer.weight`, which may compute a new one (weight norm;
        spectral norm takes a step each time). Within backward, not every call of a function is
        seen; there, the layer's own weight and bias are taken, unless it has a custom forward.
        """
        last, self._last_product = self._last_product, None
        if last is not None and last[1] is z and last[2] == version(z):
            return last[0]
        held: dict[str, Any] = own_buffers(layer) | own_parameters(layer)
        if self._count_before_pass is None or not held.keys() >= {"weight", "bias"}:
            return None
        if not (is_equivalent(Linear, layer) or has_forward_of(LinearSigmoid, layer)):
            return None
        a_prev = args[0] if args else kwargs["input"]
        return Product(a_prev, held["weight"], held["bias"], isinstance(layer, LinearSigmoid))

    def see_activation(self, kind: type[Activation], func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that computes an activation, and follow a z through it."""
        z, *options = args or (kwargs.get("input"),)
        call = self._path_of.get(id(z))
        # What backward does with a z of the forward pass is not an activation of it.
        if call is None or call.number <= (self._count_before_pass or 0):
            return func(*args, **kwargs)
        call.prepare_to_follow(z)
        a = func(*args, **kwargs)
        if a.requires_grad:
            named = {name: value for name, value in kwargs.items() if name != "input"}
            if call.follow(activation_of(kind, options, named), z, a):
                self._path_of[id(a)] = call
        return a
