"""The Trace of any model that is trained through autograd: hooks collect the pairs (a, δ).

A hook on every linear layer notes its input a and its output z; a hook on the node that made z
notes the gradient that backward brings there, which is δ. No product is computed for it, and
nothing that the model computes is touched. Watching the functions that are called tells which
activation a z goes through, and when backward begins, and of which cost.

A pair is complete when its δ arrives. So what a checkpoint computes again counts once, whichever of
the two calls the gradient goes through.

What arrives in `.grad` is counted for each parameter, and passes within the pass are watched as
well. Whatever neither the graphs nor the pairs account for is said to be elsewhere.
"""

import math
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache, partial, wraps
from inspect import signature
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from manual_bp import _require
from manual_bp._autocast import without_autocast
from manual_bp._graph import Arrivals, Graph, reduction_of
from manual_bp._torch import below_modes, transforms_are_active, version
from manual_bp.costs.quadratic import quadratic_cost
from manual_bp.costs.sigmoid_cross_entropy import sigmoid_cross_entropy_cost
from manual_bp.costs.softmax_cross_entropy import softmax_cross_entropy_cost
from manual_bp.layers._activation import ACTIVATIONS, Activation
from manual_bp.layers._formula import copy_as, has_forward_of, is_equivalent
from manual_bp.layers.linear import Linear, linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid, linear_sigmoid
from manual_bp.layers.sigmoid import Sigmoid, sigmoid_prime
from manual_bp.trace import Call, LayerTrace, Trace
from manual_bp.trace._layer import learns

Reduction = Literal["mean", "sum"]
Layers = Iterable[str | type[nn.Module]]


def record(
    model: nn.Module,
    reduction: Reduction = "mean",
    layers: Layers | None = None,
    no_samples: Layers | None = None,
) -> AbstractContextManager[Trace]:
    """Record one backward pass through a model as a Trace, the same that `backprop` returns.

        with manual_bp.record(model) as trace:
            cost(model(x), y).backward()
        trace["encoder.fc1"].delta

    The trace is filled when `backward()` has run. Weights, gradients and random numbers are what
    they would be without; the hooks are gone when the block is left, however it is left, and copies
    and pickles of the model have none. What the trace holds is a and δ of every recorded layer,
    until it is let go of. Other threads may use the model meanwhile: what they do is not recorded.

    Args:
        model: Any module with linear layers within: `nn.Linear`, ours, `LinearSigmoid`. They may
            see inputs of any number of dimensions, run several times, share their weights, be
            frozen, or be within checkpoints. A sample is an index of the input's first dimension.
            A sparse input is kept as a dense one.
        reduction: How the cost is made of the costs C_x of its samples: their "mean" or "sum". It
            gives per-sample results their unit, that of C_x.
        layers: Which linear layers to record, by name (as "encoder.fc1", or a pattern with * and
            ?) or by type; None for all of them.
        no_samples: Which of them have something else than samples in their input's first
            dimension, as class prototypes, prompts, positions or the slots of an expert; named in
            the same way. They are recorded, but have no per-sample results, and their parameters
            are `elsewhere`. None for those whose input is made of nothing but the model's
            parameters and buffers, and of `arange` and the like; an empty list for none.

    Returns:
        A context manager, which gives the Trace.

    Raises:
        TypeError: model is no nn.Module, or layers or no_samples are neither names nor types; or,
            from the forward pass, the input of a layer is nested, or its weight is no dense tensor.
        ValueError: reduction is neither; model has no linear layer, or none that is chosen; or,
            from backward(), the cost is plainly reduced in the other way.
        RuntimeError: From backward(), a second call of it within one block. On entering a block
            that was entered before. On leaving it: no backward pass reached a layer, or none of
            those that it reached can be recorded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    _require.one_of("reduction", reduction, ("mean", "sum"))
    return _Recorder(model, reduction, layers, no_samples)


def _below_modes(see: Callable[..., None]) -> Callable[..., None]:
    """A hook that the mode does not watch."""

    @wraps(see)
    def see_below(*args: Any) -> None:
        with below_modes():
            see(*args)

    return see_below


class _Pending:
    """One call of a layer, whose δ is yet to come."""

    def __init__(
        self, is_fused: bool, a_prev: Tensor, w: Tensor, b: Tensor | None, z: Tensor
    ) -> None:
        self.w, self.b = w, b
        self.versions = version(w), 0 if b is None else version(b)
        self.a_prev = _Kept(a_prev)
        self.way = [_Kept(z)]  # from z to a, through one activation after another
        self.activations: list[Activation] = []
        self.is_forked = False
        self.is_fused = is_fused  # and z is a already
        self.number = 0
        self.is_own = False  # whether its input is the model's own
        # The node that the product made. Of a view, what is done to it in place makes another
        # its node, but leaves that of its base. And a node's hook comes after those of tensors,
        # which may change the gradient.
        node: Any = (z if z._base is None else z._base).grad_fn
        self.node = node
        self.gradient: Tensor | None = None
        self.z_again: Tensor | None = None
        self.z_is_known = True
        self.hook: Any = node.register_prehook(self.receive)

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        # The object itself: were it a view, autograd might take its memory for a `.grad`.
        self.gradient = gradients[0]
        if self.is_fused or self.way[0].has_changed():
            # Now, since an optimiser may step w as soon as its gradient is there.
            self.z_again = self._z_again(self.a_prev.detached, self.way[0].detached.dtype)

    def follow(self, activation: Activation | None, z: Tensor, a: Tensor) -> bool:
        """Note that z went through an activation; None if it is not quite one that is known.

        Returns whether the way to a leads through it.
        """
        if activation is None or z is not self.way[-1].tensor:
            self.is_forked = True  # two ways lead on from a z: there is no one a
            return False
        self.activations.append(activation)
        self.way.append(_Kept(a))
        return True

    def has_changed(self, z: Tensor) -> bool:
        """Whether z is the end of what is known, yet no longer what it was then."""
        return z is self.way[-1].tensor and self.way[-1].has_changed()

    def call(self) -> Call:
        """The call, now that its δ is there."""
        assert self.gradient is not None
        a_prev, z = self.a_prev.detached, self.way[0].detached
        delta = self.gradient.detach().reshape(z.shape)
        activations = [] if self.is_forked else self.activations
        if self.is_fused:
            delta = delta * sigmoid_prime(z)  # BP1, BP2: the factor ⊙ σ'(z)
            activations = [Sigmoid(), *activations]
        if self.z_again is not None:
            z = self.z_again
        a = self._a(z, activations)
        versions = (self.a_prev.version, *(version(t) for t in (z, a, delta)))
        return Call(a_prev, z, a, delta, tuple(activations), self.z_is_known, versions)

    def _z_again(self, a_prev: Tensor, dtype: torch.dtype) -> Tensor:
        versions = version(self.w), 0 if self.b is None else version(self.b)
        if self.a_prev.has_changed() or versions != self.versions:
            # There is no telling any more, and whoever asks for z is to see it.
            self.z_is_known = False
            return a_prev.new_full((*a_prev.shape[:-1], len(self.w)), math.nan, dtype=dtype)
        w, b = (None if p is None else p.detach().to(dtype) for p in (self.w, self.b))
        with without_autocast(a_prev):
            return F.linear(a_prev.to(dtype), cast("Tensor", w), b)

    def _a(self, z: Tensor, activations: Sequence[Activation]) -> Tensor:
        if not activations:
            return z
        if not (self.is_forked or self.way[-1].has_changed()):
            return self.way[-1].detached
        for activation in activations:
            z = activation.forward(z)
        return z


class _Kept:
    """A tensor as it is now, or at least the knowledge that it has been written over since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.detached = tensor.detach()
        self.version = version(tensor)

    def has_changed(self) -> bool:
        return version(self.detached) != self.version


class _Product(NamedTuple):
    """A call of one of the functions that compute w a + b, and how often z was changed by then."""

    z: Tensor
    version: int
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Hook:
    """A forward hook that is in a module for the length of a block, and in no copy of the module.

    Copies and pickles are made of a module's state; while the hook is there, that leaves it out.
    Where a class has its modules copied in another way, the copy of a hook does nothing.
    """

    def __init__(self, see: Callable[..., None] | None) -> None:
        self.see = see

    def __call__(self, *call: Any) -> None:
        if self.see is not None and not is_compiling():
            self.see(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)

    def add(self, module: nn.Module, prepend: bool) -> Callable[[], None]:
        """Put it into a module; what is returned takes it out again."""
        handle = module.register_forward_hook(self, prepend=prepend, with_kwargs=True)
        own = vars(module)
        # copy and pickle look for both on the object before its class. A class that has the second
        # (parametrized modules do) is not asked for its state.
        own["__getstate__"] = partial(_state, module)
        if hasattr(type(module), "__deepcopy__"):
            own["__deepcopy__"] = partial(_deepcopy, module)

        def remove() -> None:
            handle.remove()
            if not any(isinstance(hook, _Hook) for hook in module._forward_hooks.values()):
                own.pop("__getstate__", None)
                own.pop("__deepcopy__", None)

        return remove


def _state(module: Any) -> Any:
    kind: Any = type(module)
    state = kind.__getstate__(module)
    return _without_hooks(state) if isinstance(state, dict) else state


def _deepcopy(module: Any, memo: Any) -> Any:
    copied = type(module).__deepcopy__(module, memo)
    if copied is not module and isinstance(copied, nn.Module):
        copied.__dict__ = _without_hooks(vars(copied))
    return copied


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, as they are outside of the block."""
    kept = {k: v for k, v in state.items() if k not in ("__getstate__", "__deepcopy__")}
    hooks = state.get("_forward_hooks", {})
    ours = {key for key, hook in hooks.items() if isinstance(hook, _Hook)}
    for name in kept.keys() & {"_forward_hooks", "_forward_hooks_with_kwargs"}:
        kept[name] = OrderedDict((k, v) for k, v in state[name].items() if k not in ours)
    return kept


class _Recorder(TorchFunctionMode):
    """Sees every call of a function of PyTorch's, and of ours, while it is entered."""

    def __init__(
        self,
        model: nn.Module,
        reduction: Reduction,
        layers: Layers | None,
        no_samples: Layers | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.is_chosen = layers is not None
        modules = dict(model.named_modules())
        linear_layers = _linear_layers(modules)
        self.names = linear_layers
        if layers is not None:
            self.names = _choose("layers", layers, linear_layers)
            if not self.names:
                raise ValueError(
                    "layers must choose at least one linear layer, or be None; got none"
                )
        self.no_samples = None
        if no_samples is not None:
            self.no_samples = _choose("no_samples", no_samples, linear_layers)
        # From the id of a tensor that is the model's own, or made of nothing else.
        self.own: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for module in modules.values():
            self._note_own(*module._parameters.values(), *module._buffers.values())
        self.pending: dict[nn.Module, list[_Pending]] = {}
        self.leads_on: dict[int, _Pending] = {}  # from a tensor, by its id
        self.last_product: _Product | None = None
        self.unseen: set[nn.Module] = set()
        self.activation_of = {f: kind for kind in ACTIVATIONS for f in kind.functions}
        self.losses: dict[Any, str] = {}  # from the node of what a loss function gave
        self.output: Any = None
        self.batches: set[int | None] = set()
        self.is_fed = True
        self.count = 0
        self.is_in_backward = False
        self.removers: list[Callable[[], None]] = []
        self.thread: int | None = None
        self.graphs: list[Graph] = []  # of the pass that runs, and of those within it
        # Which pass the trace is of: whether of backward(), and whether for parameters.
        self.rank = (False, False)
        self.others: set[Tensor] = set()  # what other calls of backward() brought gradients to
        self.missed: dict[str, str] = {}
        self.trace = Trace.__new__(Trace)  # empty until backward() has run

    def __enter__(self) -> Trace:
        if self.thread is not None:
            raise RuntimeError(
                "what record returns must be entered once, since it records one backward pass; "
                "it was entered before: call record again for another block"
            )
        self.thread = threading.get_ident()
        self.add_hooks()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self.trace

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        try:
            if kind is None:
                self.require_filled()
        finally:
            self.remove_hooks()

    @property
    def is_filled(self) -> bool:
        return "layers" in vars(self.trace)

    @property
    def all_pending(self) -> list[_Pending]:
        """Every call that was seen, whatever its layer."""
        return [pending for calls in self.pending.values() for pending in calls]

    def add_hooks(self) -> None:
        try:
            for module in self.names:
                self._add_hook(module, self._see_layer)
            self._add_hook(self.model, self._see_output, prepend=False)
        except BaseException:
            self.remove_hooks()
            raise

    def _add_hook(
        self, module: nn.Module, see: Callable[..., None], *, prepend: bool = True
    ) -> None:
        def see_if_of_block(called: nn.Module, *call: Any) -> None:
            if called is module and self._is_of_block():
                see(called, *call)

        self.removers.append(_Hook(see_if_of_block).add(module, prepend))

    def _is_of_block(self) -> bool:
        """Whether what runs now is of the block, and not of another thread that uses the model.

        Backward may run in threads of autograd's, which are none of Python's own.
        """
        return threading.get_ident() == self.thread or (
            self.is_in_backward and isinstance(threading.current_thread(), threading._DummyThread)
        )

    def remove_hooks(self) -> None:
        for remove in self.removers:
            remove()
        for pending in self.all_pending:
            pending.hook.remove()
        self.removers, self.pending, self.leads_on, self.last_product = [], {}, {}, None
        self.graphs, self.losses = [], {}

    def require_filled(self) -> None:
        """Refuse to leave the block with an empty trace."""
        if self.is_filled:
            return
        if self.missed:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in self.missed.items())
            raise RuntimeError(
                f"a backward pass must reach a layer that can be recorded; got one through the "
                f"model's parameters that has none ({reasons})"
            )
        if any(self.pending.values()):
            raise RuntimeError(
                "backward() must run within the block of record, in its thread; it did not"
            )
        if self.unseen:
            raise RuntimeError(
                "a linear layer of the model must give out its product w a + b; none did: the "
                "outputs were replaced, by a hook or by a forward of the layer's own"
            )
        raise RuntimeError(
            "a linear layer of the model must run within the block of record, in its thread, with "
            "gradients on; none did: call the model there, forward and backward (one that is "
            "compiled does not show its layers: record the model that it was made of)"
        )

    @_below_modes
    def _see_output(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            inputs, outputs = _contents((args, kwargs)), _contents(output)
            self.batches.add(_batch_of(inputs, outputs))
            self.is_fed = not all(isinstance(t, _SETTINGS) or self._is_own(t) for t in inputs)
            is_tensor = isinstance(output, Tensor)
            self.output = (
                output.detach() if is_tensor else tree_map_only(Tensor, Tensor.detach, output)
            )

    @_below_modes
    def _see_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls = self.pending.setdefault(layer, [])
        if not getattr(output, "requires_grad", False):
            return  # not now; a checkpoint may run it again in backward
        product = self._product(layer, args, kwargs, output)
        if product is None:
            self.unseen.add(layer)
            return
        a_prev, w, b, is_fused = product
        # Now, since what it holds may be written over once its gradient is there.
        is_own = self._is_own(a_prev)
        place = f"of layer {self.names[layer]!r}"
        if a_prev.layout is not torch.strided and not a_prev.is_nested:
            a_prev = a_prev.detach().to_dense()  # a trace is made of rows
        _require.tensor(f"the input {place}", a_prev)
        _require.tensor(f"the weight {place}", w)
        pending = _Pending(is_fused, a_prev, w, b, output)
        pending.number = self.count = self.count + 1
        pending.is_own = is_own
        calls.append(pending)
        self.leads_on[id(output)] = pending

    def _product(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
        """The a, w and b of a layer's call, and whether σ is in it; None if no product was seen.

        w is the one that was seen, not `layer.weight`, which may compute it anew (weight norm;
        spectral norm takes a step each time). Within backward, not every call of a function is
        seen; there, what a layer holds will do, if it has no forward of its own.
        """
        product, self.last_product = self.last_product, None
        if product is not None and product.z is output and product.version == version(output):
            a, w, b = names = _PRODUCTS[product.func]
            operands = dict(zip(names, product.args, strict=False)) | product.kwargs
            return operands[a], operands[w], operands.get(b), product.func is linear_sigmoid
        own = layer._buffers | layer._parameters
        if self.is_in_backward and _has_linear_forward(layer) and own.keys() >= {"weight", "bias"}:
            a = args[0] if args else kwargs["input"]
            return a, cast("Tensor", own["weight"]), own["bias"], isinstance(layer, LinearSigmoid)
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            return func(*args, **kwargs)
        if func in _BACKWARDS:
            return self._watch_pass(func, args, kwargs)
        may_be_own = self._may_be_own(args)
        if func in self.activation_of:
            result = self._see_function(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            if func in _PRODUCTS and isinstance(result, Tensor):
                self.last_product = _Product(result, version(result), func, args, kwargs)
            elif func in _LOSSES:
                self._see_loss(func, args, kwargs, result)
        if may_be_own and isinstance(result, Tensor | tuple | list):
            self._see_whose(func, args, kwargs, result)
        return result

    def _see_loss(self, func: Any, args: Any, kwargs: Any, loss: Tensor) -> None:
        given = dict(zip(func.__code__.co_varnames, args, strict=False)) | kwargs
        reduction = given.get("reduction", "mean")
        if given.get("size_average") is not None or given.get("reduce") is not None:
            return  # which say it in a way of their own
        if given.get("weight") is not None and reduction != "mean":
            return  # weights may make a mean of a sum
        if loss.grad_fn is not None:
            self.losses[loss.grad_fn] = "mean" if reduction == "batchmean" else reduction

    def _note_own(self, *results: Any) -> None:
        for t in results:
            if isinstance(t, Tensor):
                self.own[id(t)] = weakref.ref(t), version(t)

    def _is_own(self, t: Any) -> bool:
        found = self.own.get(id(t))
        if found is None or not isinstance(t, Tensor):
            return False
        return found[0]() is t and version(t) == found[1]

    def _may_be_own(self, args: Sequence[Any]) -> bool:
        """Whether a function of these may make something of the model's own: seldom."""
        first = args[0] if args else None
        return not isinstance(first, Tensor) or _is_factor(first) or self._is_own(first)

    def _see_whose(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a result that is made of nothing but the model's own tensors.

        Its first dimension is then the model's as well, unless it was brought to another size.
        What is written in place was seen to be the model's own before.
        """
        results = (result,) if isinstance(result, Tensor) else result
        tensors = [t for t in _tensors((args, kwargs)) if not _is_factor(t)]
        own = [t for t in tensors if t is result or self._is_own(t)]
        is_own = func in _COUNTING or (0 < len(own) == len(tensors) and func not in _RESIZING)
        if func in _JOINING:
            if len({id(t) for t in tensors}) < len(tensors):  # one of them is repeated
                is_own = False
            elif func is not torch.stack:  # where one has the same rows as the result, so have all
                is_own |= any(t.ndim == result.ndim and 1 < len(t) == len(result) for t in own)
        if is_own:
            self._note_own(*results)

    def _see_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        z, *options = args or (kwargs.get("input"),)
        pending = self.leads_on.get(id(z))
        if pending is not None and pending.has_changed(z):
            pending.is_forked = True  # something in place stands between
        a = func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name != "input"}
        self._follow(z, lambda: _activation(self.activation_of[func], options, named), a)
        return a

    def _follow(self, z: Any, activation: Callable[[], Activation | None], a: Tensor) -> None:
        pending = self.leads_on.get(id(z))
        if pending is not None and a.requires_grad and pending.follow(activation(), z, a):
            self.leads_on[id(a)] = pending

    def _watch_pass(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a backward pass; if it is the model's, fill the trace from it.

        The first call of backward() that gets to a layer is the one that counts. One of
        autograd.grad(), or of backward() for inputs that are none of the parameters, does as long
        as there is none, for it may be but a part of the cost, as a penalty on gradients is; and
        of these the last that is for parameters.
        """
        if transforms_are_active() or kwargs.get("is_grads_batched"):
            return func(*args, **kwargs)
        roots = _roots(*args, **kwargs)
        graph = Graph(roots)
        if self.is_in_backward:
            return self._watch_inner_pass(func, args, kwargs, graph)
        names = self._names_of_parameters(graph)
        is_backward = func is not torch.autograd.grad
        inputs = _inputs(func, args, kwargs)
        is_wanted = inputs is None or any(_is_among(inputs, p) for p in names)
        rank = (is_backward and is_wanted, is_wanted)
        has_trained = self.is_filled and self.rank[0]
        reaches_layers = any(pending.node in graph.nodes for pending in self.all_pending)
        if reaches_layers and rank[0]:
            if has_trained:
                raise RuntimeError(
                    "record is of one backward pass, which has run; open another block for another"
                )
            self._check_reduction(roots)
        arrivals, result = self._run(func, args, kwargs, graph, names)
        arrived = {p for p, count in arrivals.counts.items() if count}
        is_of_model = reaches_layers or arrived or not graph.ends.keys().isdisjoint(names)
        is_filled_now = False
        if is_of_model and rank >= self.rank and not has_trained:
            # Even where it cannot be filled: it is not of a pass before.
            vars(self.trace).clear()
            self.rank = rank
            is_filled_now = self._fill(is_backward, _cost(roots, kwargs), arrivals, names)
        if is_backward and not is_filled_now:
            self.others |= arrived
            if has_trained:
                more = {p for p, name in names.items() if name in self.trace.elsewhere}
                self.trace.elsewhere = _named(names, self.others | more)
        return result

    def _watch_inner_pass(self, func: Any, args: Any, kwargs: Any, graph: Graph) -> Any:
        """Run a pass that backward runs within itself, as a reentrant checkpoint does."""
        if func is not torch.autograd.grad:
            self.graphs.append(graph)
            with self._entered_within(graph):
                return func(*args, **kwargs)
        # It brings nothing into `.grad`, but what it returns may be written there by hand.
        self.others.update(t for t in _inputs(func, args, kwargs) or () if isinstance(t, Tensor))
        # What comes to layers on its way is none of the pass.
        before = [(pending, pending.gradient) for pending in self.all_pending]
        try:
            return func(*args, **kwargs)
        finally:
            for pending, gradient in before:
                pending.gradient = gradient

    def _run(
        self, func: Any, args: Any, kwargs: Any, graph: Graph, names: Mapping[Tensor, str]
    ) -> tuple[Arrivals, Any]:
        for pending in self.all_pending:
            pending.gradient = None  # of a pass before, which may have failed
        # What backward does with z of the forward pass is no activation of it.
        leads_on, self.leads_on = self.leads_on, {}
        self.graphs, self.is_in_backward = [graph], True
        try:
            arrivals = Arrivals(names, graph, self._is_of_block)
            with arrivals, self._entered_within(graph):
                result = func(*args, **kwargs)
        finally:
            self.leads_on, self.is_in_backward = leads_on, False
        return arrivals, result

    @contextmanager
    def _entered_within(self, graph: Graph) -> Iterator[None]:
        """Enter the mode wherever a pass runs code of others, which may call what is to be seen.

        By hooks, since it is left while it handles a call, and backward() is one. Where that code
        fails, autograd itself goes back to the modes that were there before.
        """
        handles = []
        for node in graph.foreign:
            handles.append(node.register_prehook(self._enter))
            handles.append(node.register_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _: object) -> None:
        super().__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: object) -> None:
        super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _names_of_parameters(self, graph: Graph) -> dict[Tensor, str]:
        """The model's parameters, and those that functional_call put in their place."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for layer, calls in self.pending.items():
            for pending in calls:
                for p, name in ((pending.w, "weight"), (pending.b, "bias")):
                    if p is not None and p in graph.ends:
                        names.setdefault(p, f"{self.names[layer]}.{name}".lstrip("."))
        return names

    def _check_reduction(self, roots: Sequence[Tensor]) -> None:
        all_pending = self.all_pending
        shapes = [pending.way[0].detached.shape for pending in all_pending]
        if len(roots) != 1 or any(len(shape) < 2 or shape[0] == 1 for shape in shapes):
            return  # of one sample, the mean is the sum
        products = {pending.node for pending in all_pending}
        activations = tuple(name for kind in ACTIVATIONS for name in kind.node_names)
        found = reduction_of(roots[0].grad_fn, products, self.losses, activations)
        if found is not None and found != self.reduction:
            raise ValueError(
                f"reduction must be that of the cost; got {self.reduction!r}, and a cost that is "
                f"the {found} over samples: record(model, reduction={found!r})"
            )

    def _fill(
        self, is_backward: bool, cost: Tensor, arrivals: Arrivals, names: dict[Tensor, str]
    ) -> bool:
        """Fill the trace from the δ that have come; whether there were any."""
        # What passes within autograd.grad() bring is in `.grad`, and not in what that returns.
        graphs = self.graphs if is_backward else self.graphs[:1]
        missed = dict.fromkeys(self.names.values(), "it did not run")
        reached: dict[nn.Module, list[_Pending]] = {}
        of_pass = {
            layer: [call for call in calls if any(call.node in graph.nodes for graph in graphs)]
            for layer, calls in self.pending.items()
        }
        for layer, calls in of_pass.items():
            come = [pending for pending in calls if pending.gradient is not None]
            reason = self._reason_to_miss(layer, come)
            if reason is None:
                reached[layer] = come
                del missed[self.names[layer]]
            else:
                missed[self.names[layer]] = reason
        self.missed = missed
        if not reached:
            return False
        if len(graphs) == 1:  # others run in another order
            reached = dict(sorted(reached.items(), key=lambda item: item[1][0].number))
        for calls in reached.values():
            for pending in calls:
                pending.is_forked |= sum(graph.ways_to(pending.node) for graph in graphs) > 1
        layers = [
            self._layer_trace(layer, calls, arrivals if is_backward else None)
            for layer, calls in reached.items()
        ]
        without = {layer.name for layer in layers if not layer.has_samples}
        # Calls that no δ came back from count as well, unless the whole layer is missed for it.
        seen = [
            call
            for layer, calls in of_pass.items()
            if self.names[layer] not in without
            and (layer in reached or all(call.gradient is None for call in calls))
            for call in calls
        ]
        elsewhere = _elsewhere(graphs, seen, arrivals, is_backward) | self.others
        self.trace.cost = cost
        self.trace.output = self.output
        self.trace.parameter_names = names
        self.trace.missed = missed
        self.trace.elsewhere = _named(names, elsewhere)
        self.trace.chosen = self.is_chosen
        self.trace.is_assigned = is_backward
        self.trace.batch = next(iter(self.batches)) if len(self.batches) == 1 else None
        self.trace.layers = tuple(layers)
        return True

    def _reason_to_miss(self, layer: nn.Module, come: Sequence[_Pending]) -> str | None:
        if layer in self.unseen:
            return (
                "it ran, but what came out was not its product w a + b: a hook, or a forward of "
                "its own, made something else of it"
            )
        if not come:
            return "it ran, but no error came back to it"
        if any(pending.w is not come[0].w or pending.b is not come[0].b for pending in come):
            return "it ran with several weights"
        return None

    def _layer_trace(
        self, layer: nn.Module, reached: Sequence[_Pending], arrivals: Arrivals | None
    ) -> LayerTrace:
        with without_autocast(reached[0].a_prev.detached):
            calls = tuple(pending.call() for pending in reached)
        if self.no_samples is not None:
            has_samples = layer not in self.no_samples
        else:  # a model that is given nothing else makes its samples itself
            is_own = any(pending.is_own for pending in reached)
            has_samples = not (is_own and self.is_fed)
        first = reached[0]

        def learned(parameter: Tensor | None) -> bool:
            if parameter is None or arrivals is None or parameter not in arrivals.counts:
                return parameter is not None and learns(parameter)
            return arrivals.counts[parameter] > 0

        return LayerTrace(
            name=self.names[layer],
            w=first.w,
            b=first.b,
            calls=calls,
            scale=calls[0].samples if self.reduction == "mean" else 1,
            w_version=first.versions[0],
            learns_w=learned(first.w),
            learns_b=learned(first.b),
            has_samples=has_samples,
        )


def _elsewhere(
    graphs: Sequence[Graph],
    seen: Iterable[_Pending],
    arrivals: Arrivals,
    is_backward: bool,
) -> set[Tensor]:
    """The parameters with gradients that the calls that were seen do not account for.

    Which is where the graphs use a parameter more often than calls were seen, or where more
    gradients arrived than there are graphs to bring them.
    """
    uses: Counter[Tensor] = Counter()
    for graph in graphs:
        uses += graph.uses
    for call in seen:
        uses.subtract(p for p in (call.w, call.b) if p is not None)
    found = set()
    for p, count in arrivals.counts.items():
        brought = sum(p in graph.ends for graph in graphs) if is_backward else 0
        if count > brought or (uses[p] > 0 and (count or not is_backward)):
            found.add(p)
    return found


def _named(names: Mapping[Tensor, str], parameters: Collection[Tensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for p, name in names.items() if p in parameters))


def _inputs(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any] | None:
    """What gradients are wanted of; None for all leaves."""
    inputs = kwargs.get("inputs")
    if func is torch.autograd.grad and inputs is None:
        inputs = args[1]
    if inputs is None:
        return None
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _is_factor(t: Tensor) -> bool:
    """Whether it is a number, and no index: it makes no rows, and chooses none."""
    return t.ndim == 0 and t.is_floating_point()


def _contents(tree: Any) -> list[Any]:
    """What a model is given or gives out; of objects, as of dataclasses, what they hold."""
    found = []
    for leaf in tree_leaves(tree):
        is_object = hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor | nn.Module)
        found += tree_leaves(dict(vars(leaf))) if is_object else [leaf]
    return found


def _batch_of(inputs: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """N, where the first dimensions of all that went in and came out agree on it.

    Where nothing with more than one dimension went in, or nothing but numbers came out, as of a
    model that gives out its cost, the other side alone says it.
    """
    found, found_again = _first_dimensions(inputs, 2), _first_dimensions(outputs, 2)
    if not found_again:
        found_again = _first_dimensions(outputs, 1) or found
    elif not found:
        found = found_again
    return found.pop() if len(found) == 1 and found == found_again else None


def _first_dimensions(values: Iterable[Any], least: int) -> set[int]:
    return {t.shape[0] for t in values if isinstance(t, Tensor) and t.ndim >= least}


def _is_among(tensors: Sequence[Any], tensor: Tensor | None) -> bool:
    return any(tensor is other for other in tensors)  # `in` would compare numbers


def _cost(roots: Sequence[Tensor], kwargs: Any) -> Tensor:
    """What was differentiated, as one number: Σ root · gradient."""
    given = kwargs.get("gradient", kwargs.get("grad_tensors", kwargs.get("grad_outputs")))
    gradients = [given] if isinstance(given, Tensor) else given or [None] * len(roots)
    terms = [
        (root if gradient is None else root * gradient).detach().sum()
        for root, gradient in zip(roots, gradients, strict=True)
    ]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _linear_layers(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """The linear layers of a model's modules, with their names."""
    linear_layers: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise TypeError(
                f"model must not be compiled, since its layers then do not show; got "
                f"{type(module).__name__} {name!r}: record the model that it was made of, or "
                f"compile it later"
            )
        if isinstance(module, nn.Linear | LinearSigmoid):
            linear_layers[module] = name
    if not linear_layers:
        raise ValueError(
            f"model must have linear layers, nn.Linear or LinearSigmoid; got "
            f"{type(modules['']).__name__}, which has none"
        )
    return linear_layers


def _choose(
    argument: str, layers: Layers, linear_layers: Mapping[nn.Module, str]
) -> dict[nn.Module, str]:
    """Those of the linear layers that an argument chooses."""
    choices = [layers] if isinstance(layers, str | type) else list(layers)
    chosen = set()
    for choice in choices:
        fitting = [m for m, name in linear_layers.items() if _fits(argument, choice, m, name)]
        if not fitting:
            names = ", ".join(repr(name) for name in linear_layers.values())
            raise ValueError(
                f"{argument} must choose linear layers of the model, {names}; got {choice!r}"
            )
        chosen.update(fitting)
    return {module: name for module, name in linear_layers.items() if module in chosen}


def _has_linear_forward(module: nn.Module) -> bool:
    return is_equivalent(Linear, module) or has_forward_of(LinearSigmoid, module)


def _fits(argument: str, choice: object, module: nn.Module, name: str) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    if isinstance(choice, type):
        return isinstance(module, choice)
    raise TypeError(f"{argument} must be names or types; got {type(choice).__name__}")


def _activation(kind: Any, options: Sequence[Any], named: Mapping[str, Any]) -> Activation | None:
    """The activation that a function computes, as a module of ours that writes over nothing."""
    if not all(isinstance(option, int | float) for option in (*options, *named.values())):
        return None
    return _module(kind, tuple(options), tuple(named.items()))


@lru_cache
def _module(
    kind: Any, options: tuple[float, ...], named: tuple[tuple[str, float], ...]
) -> Activation | None:
    # Once for all: it has no state, and to make a module takes longer than a call.
    try:
        return cast("Activation", copy_as(kind, kind(*options, **dict(named))))
    except (TypeError, ValueError):  # options that ours does not have
        return None


_BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_PRODUCTS = {
    F.linear: ("input", "weight", "bias"),
    linear: ("a", "w", "b"),
    linear_sigmoid: ("a", "w", "b"),
}
# The functions of PyTorch's that take a reduction, and ours: all of them loss functions.
_LOSSES = {
    function
    for function in vars(F).values()
    if isinstance(function, FunctionType) and "reduction" in signature(function).parameters
} | {quadratic_cost, sigmoid_cross_entropy_cost, softmax_cross_entropy_cost}
_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack}
# What makes rows of nothing, as of positions. Others that do (zeros, randn) may do so for samples.
_COUNTING = {torch.arange, torch.linspace, torch.logspace, torch.eye}
# What repeats rows, as many times as it is told: for all samples, say.
_RESIZING = {
    torch.broadcast_to, torch.tile, torch.repeat_interleave, Tensor.broadcast_to, Tensor.tile,
    Tensor.repeat_interleave, Tensor.repeat, Tensor.expand, Tensor.expand_as, Tensor.new_empty,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
}  # fmt: skip
# What says how a model is to run, and holds no samples.
_SETTINGS = (int, float, torch.device, torch.dtype, type(None))


def _roots(tensors: Any, *_: Any, **__: Any) -> list[Tensor]:
    """What backward is called on: the first argument of each of the three functions."""
    return (
        [tensors] if isinstance(tensors, Tensor) else [t for t in tensors if isinstance(t, Tensor)]
    )
