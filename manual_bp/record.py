"""The Trace of any model that is trained through autograd: hooks collect the pairs (a, δ).

A hook on every linear layer notes its input a and its output z; a hook on the node that made z
notes the gradient that backward brings there, which is δ. No product is computed for it, and
nothing that the model computes is touched. Watching the functions that are called tells which
activation a z goes through, and when backward begins, and of which cost.

A pair is complete when its δ arrives. So what a checkpoint computes again counts once, whichever of
the two calls the gradient goes through.
"""

import math
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from manual_bp import _require
from manual_bp._function import transforms_are_active, without_autocast
from manual_bp._graph import Graph, reduction_of
from manual_bp.layers import ACTIVATIONS, Activation
from manual_bp.layers._formula import as_ours, has_formula_of, is_kind_of
from manual_bp.layers.linear import Linear, linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid, linear_sigmoid
from manual_bp.layers.sigmoid import Sigmoid, sigmoid_prime
from manual_bp.trace import Call, LayerTrace, Trace
from manual_bp.trace._layer import version

Reduction = Literal["mean", "sum"]
Layers = Iterable[str | type[nn.Module]]


def record(
    model: nn.Module, reduction: Reduction = "mean", layers: Layers | None = None
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

    Returns:
        A context manager, which gives the Trace.

    Raises:
        TypeError: model is no nn.Module, or layers are neither names nor types; or, from the
            forward pass, the input of a layer is nested, or its weight is no dense tensor.
        ValueError: reduction is neither; model has no linear layer, or none that is chosen; or,
            from backward(), the cost is plainly reduced in the other way.
        RuntimeError: From backward(), a second call of it within one block. On entering a block
            that was entered before. On leaving it: no backward pass reached a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    _require.one_of("reduction", reduction, ("mean", "sum"))
    return _Recorder(model, reduction, layers)


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

    def __init__(self, model: nn.Module, reduction: Reduction, layers: Layers | None) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self.is_chosen = layers is not None
        self.modules = dict(model.named_modules())
        self.names = _choose(self.modules, layers)
        self.pending: dict[nn.Module, list[_Pending]] = {}
        self.leads_on: dict[int, _Pending] = {}  # from a tensor, by its id
        self.last_product: _Product | None = None
        self.unseen: set[nn.Module] = set()
        self.output: Any = None
        self.has_trained = False
        self.sees_modules = False
        self.count = 0
        self.is_in_backward = False
        self.removers: list[Callable[[], None]] = []
        self.thread: int | None = None
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

    def _add_hooks_on_activations(self) -> None:
        self.sees_modules = True
        for module in self.modules.values():
            kind = next((ours for ours in ACTIVATIONS if is_kind_of(ours, module)), None)
            if kind is not None:
                self._add_hook(module, partial(self._see_module, kind))

    def remove_hooks(self) -> None:
        for remove in self.removers:
            remove()
        for pending in self.all_pending:
            pending.hook.remove()
        self.removers, self.pending, self.leads_on, self.last_product = [], {}, {}, None

    def require_filled(self) -> None:
        """Refuse to leave the block with an empty trace."""
        if self.is_filled:
            return
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

    def _see_output(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            is_tensor = isinstance(output, Tensor)
            self.output = (
                output.detach() if is_tensor else tree_map_only(Tensor, Tensor.detach, output)
            )

    def _see_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls = self.pending.setdefault(layer, [])
        if not getattr(output, "requires_grad", False):
            return  # not now; a checkpoint may run it again in backward
        product = self._product(layer, args, kwargs, output)
        if product is None:
            self.unseen.add(layer)
            return
        a_prev, w, b, is_fused = product
        place = f"of layer {self.names[layer]!r}"
        if a_prev.layout is not torch.strided and not a_prev.is_nested:
            a_prev = a_prev.detach().to_dense()  # a trace is made of rows
        _require.tensor(f"the input {place}", a_prev)
        _require.tensor(f"the weight {place}", w)
        pending = _Pending(is_fused, a_prev, w, b, output)
        pending.number = self.count = self.count + 1
        calls.append(pending)
        self.leads_on[id(output)] = pending

    def _product(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
        """The a, w and b of a layer's call, and whether σ is in it; None if no product was seen.

        w is the one that was seen, not `layer.weight`, which may compute it anew (weight norm;
        spectral norm takes a step each time). Within backward, calls of functions are not seen;
        there, what a layer holds will do, if it has no forward of its own.
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
        if func in _BACKWARDS and not self.is_in_backward:
            return self._watch_pass(func, args, kwargs)
        if func in _ACTIVATION_OF:
            return self._see_function(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _PRODUCTS and isinstance(result, Tensor):
            self.last_product = _Product(result, version(result), func, args, kwargs)
        return result

    def _see_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        z, *options = args or (kwargs.get("input"),)
        pending = self.leads_on.get(id(z))
        if pending is not None and pending.has_changed(z):
            pending.is_forked = True  # something in place stands between
        a = func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name != "input"}
        self._follow(z, lambda: _activation(_ACTIVATION_OF[func], options, named), a)
        return a

    def _see_module(self, kind: Any, module: nn.Module, args: Any, _: Any, a: Tensor) -> None:
        # Elsewhere its function is seen; but functions do not show that backward calls, which
        # a reentrant checkpoint does.
        if self.is_in_backward and args:
            self._follow(args[0], lambda: cast("Activation", as_ours(kind, module)), a)

    def _follow(self, z: Any, activation: Callable[[], Activation | None], a: Tensor) -> None:
        pending = self.leads_on.get(id(z))
        if pending is not None and a.requires_grad and pending.follow(activation(), z, a):
            self.leads_on[id(a)] = pending

    def _watch_pass(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a backward pass; if it is the model's, fill the trace from it.

        The first call of backward() is the one that counts. One of autograd.grad(), or of
        backward() for inputs that are none of the model's parameters, does as long as there is
        none: it may be but a part of the cost, as a penalty on gradients is.
        """
        roots = _roots(*args, **kwargs)
        graph = Graph(roots)
        all_pending = self.all_pending
        is_of_model = any(pending.node in graph.nodes for pending in all_pending)
        is_training = func is not torch.autograd.grad and self._is_for_parameters(kwargs)
        if is_of_model and is_training and self.has_trained:
            raise RuntimeError(
                "record is of one backward pass, which has run; open another block for another"
            )
        is_other = self.has_trained or not (is_of_model or graph.has_hidden_parts)
        if is_other or transforms_are_active() or kwargs.get("is_grads_batched"):
            return func(*args, **kwargs)
        if is_of_model and is_training:
            self._check_reduction(roots)
        for pending in all_pending:
            pending.gradient = None  # of a pass before, which may have failed
        if graph.has_hidden_parts and not self.sees_modules:
            self._add_hooks_on_activations()
        self.is_in_backward = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.is_in_backward = False
        if self._fill(func, roots, kwargs, graph):
            self.has_trained = is_training
        return result

    def _is_for_parameters(self, kwargs: Any) -> bool:
        inputs = _inputs(kwargs)
        return inputs is None or any(_is_among(inputs, p) for p in self.model.parameters())

    def _check_reduction(self, roots: Sequence[Tensor]) -> None:
        all_pending = self.all_pending
        shape = all_pending[0].way[0].detached.shape
        if len(roots) != 1 or len(shape) < 2 or shape[0] == 1:
            return  # of one sample, the mean is the sum
        found = reduction_of(roots[0].grad_fn, {pending.node for pending in all_pending})
        if found is not None and found != self.reduction:
            raise ValueError(
                f"reduction must be that of the cost; got {self.reduction!r}, and a cost that is "
                f"the {found} over samples: record(model, reduction={found!r})"
            )

    def _fill(self, func: Any, roots: Sequence[Tensor], kwargs: Any, graph: Graph) -> bool:
        """Fill the trace from the δ that have come; whether there were any."""
        missed = dict.fromkeys(self.names.values(), "it did not run")
        reached: dict[nn.Module, list[_Pending]] = {}
        for layer, calls in self.pending.items():
            # Others may come of a pass that somebody's hook ran within this one.
            of_pass = [x for x in calls if x.node in graph.nodes or graph.has_hidden_parts]
            come = [pending for pending in of_pass if pending.gradient is not None]
            reason = self._reason_to_miss(layer, come)
            if reason is None:
                reached[layer] = come
                del missed[self.names[layer]]
            else:
                missed[self.names[layer]] = reason
        if not reached:
            return False
        if not graph.has_hidden_parts:  # which run in another order
            reached = dict(sorted(reached.items(), key=lambda item: item[1][0].number))
        is_backward = func is not torch.autograd.grad
        inputs = _inputs(kwargs) if is_backward else None
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for calls in reached.values():
            for pending in calls:
                pending.is_forked |= graph.ways_to(pending.node) > 1
        self.trace.cost = _cost(roots, kwargs)
        self.trace.output = self.output
        self.trace.parameter_names = names
        self.trace.missed = missed
        self.trace.elsewhere = _elsewhere(graph, names, reached, self.pending)
        self.trace.chosen = self.is_chosen
        self.trace.is_assigned = is_backward
        self.trace.layers = tuple(
            self._layer_trace(self.names[layer], calls, inputs) for layer, calls in reached.items()
        )
        return True

    def _reason_to_miss(self, layer: nn.Module, come: Sequence[_Pending]) -> str | None:
        if layer in self.unseen:
            return "it ran, but what came out was not the product that was seen"
        if not come:
            return "it ran, but no error came back to it"
        if any(pending.w is not come[0].w or pending.b is not come[0].b for pending in come):
            return "it ran with several weights"
        return None

    def _layer_trace(
        self, name: str, reached: Sequence[_Pending], inputs: Sequence[Any] | None
    ) -> LayerTrace:
        with without_autocast(reached[0].a_prev.detached):
            calls = tuple(pending.call() for pending in reached)
        scale = calls[0].samples if self.reduction == "mean" else 1
        first = reached[0]
        learns: Sequence[bool | None] = (None, None)
        if inputs is not None:  # of backward(): gradients of nothing else are wanted
            learns = [_is_among(inputs, p) for p in (first.w, first.b)]
        return LayerTrace(
            name=name,
            w=first.w,
            b=first.b,
            calls=calls,
            scale=scale,
            w_version=first.versions[0],
            learns_w=learns[0],
            learns_b=learns[1],
        )


def _elsewhere(
    graph: Graph,
    names: Mapping[Tensor, str],
    reached: Mapping[nn.Module, Sequence[_Pending]],
    pending: Mapping[nn.Module, Sequence[_Pending]],
) -> tuple[str, ...]:
    """The parameters that the cost depends on by other ways than the calls that were seen."""
    seen: Counter[Tensor] = Counter()
    for layer, calls in pending.items():
        # Calls that no δ came back from count as well, unless the whole layer is missed for it.
        if layer in reached or not any(call.gradient is not None for call in calls):
            for call in calls:
                if call.node in graph.nodes:
                    seen.update(p for p in (call.w, call.b) if p is not None)
    recorded = {p for calls in reached.values() for call in calls for p in (call.w, call.b)}
    return tuple(
        name
        for parameter, name in names.items()
        if parameter.requires_grad
        and (
            graph.uses[parameter] > seen[parameter]
            or (graph.has_hidden_parts and parameter not in recorded)
        )
    )


def _inputs(kwargs: Any) -> Sequence[Any] | None:
    """What backward() was told to find gradients of; None for all."""
    inputs = kwargs.get("inputs")
    if inputs is None:
        return None
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


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


def _choose(modules: Mapping[str, nn.Module], layers: Layers | None) -> dict[nn.Module, str]:
    """The linear layers of a model's modules that are to be recorded, with their names."""
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
    if layers is None:
        return linear_layers
    choices = [layers] if isinstance(layers, str | type) else list(layers)
    if not choices:
        raise ValueError("layers must choose at least one linear layer, or be None; got none")
    chosen = set()
    for choice in choices:
        fitting = [m for m, name in linear_layers.items() if _fits(choice, m, name)]
        if not fitting:
            names = ", ".join(repr(name) for name in linear_layers.values())
            raise ValueError(
                f"layers must choose linear layers of the model, {names}; got {choice!r}"
            )
        chosen.update(fitting)
    return {module: name for module, name in linear_layers.items() if module in chosen}


def _has_linear_forward(module: nn.Module) -> bool:
    return is_kind_of(Linear, module) or has_formula_of(LinearSigmoid, module)


def _fits(choice: object, module: nn.Module, name: str) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    if isinstance(choice, type):
        return isinstance(module, choice)
    raise TypeError(f"layers must be names or types; got {type(choice).__name__}")


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
        return cast("Activation", as_ours(kind, kind(*options, **dict(named))))
    except (TypeError, ValueError):  # options that ours does not have
        return None


def _functions_of(kind: Any) -> Iterator[Any]:
    """All functions of PyTorch's and of ours by the name of an activation, in place or not."""
    name = kind.__module__.rpartition(".")[2]
    for room in (torch, F, Tensor, sys.modules[kind.__module__]):
        for function in (getattr(room, name, None), getattr(room, f"{name}_", None)):
            if function is not None:
                yield function


_BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_PRODUCTS = {
    F.linear: ("input", "weight", "bias"),
    linear: ("a", "w", "b"),
    linear_sigmoid: ("a", "w", "b"),
}
_ACTIVATION_OF = {function: kind for kind in ACTIVATIONS for function in _functions_of(kind)}


def _roots(tensors: Any, *_: Any, **__: Any) -> list[Tensor]:
    """What backward is called on: the first argument of each of the three functions."""
    return (
        [tensors] if isinstance(tensors, Tensor) else [t for t in tensors if isinstance(t, Tensor)]
    )
