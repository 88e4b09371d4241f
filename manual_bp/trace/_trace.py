"""One pass of the algorithm, whole: its cost, its output, and its layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from manual_bp import _require
from manual_bp._function import values_are_at_hand
from manual_bp.trace import _per_sample
from manual_bp.trace._call import Pair, SharedMemory, joined
from manual_bp.trace._diagnostics import Diagnostics
from manual_bp.trace._layer import LayerTrace
from manual_bp.trace._measure import diagnose


@dataclass(eq=False, repr=False)
class Trace:
    """One pass of the algorithm: the cost, the output, and every linear layer in forward order.

    cost: The cost, of shape ().
    output: What the network gave.
    layers: The linear layers that an error reached.
    parameter_names: The name of every parameter, as `named_parameters()` of the network has it.
    missed: The linear layers that no error reached, each with the reason.
    elsewhere: The names of parameters whose gradient comes, wholly or in part, from elsewhere than
        `layers`: a LayerNorm's, or a weight that is an Embedding's as well; or from layers that
        have no samples. Per-sample results do not have that part.
    chosen: Whether the layers are a choice out of all.
    is_assigned: Whether `.grad` has the gradients of this pass already, as `backward()` adds them.
    batch: N, where what went into the model and came out of it tells it.
    """

    cost: Tensor
    output: Any
    layers: tuple[LayerTrace, ...]
    parameter_names: Mapping[Tensor, str]
    missed: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    chosen: bool = False
    is_assigned: bool = False
    batch: int | None = None

    def __copy__(self) -> "Trace":
        trace = Trace.__new__(Trace)
        vars(trace).update(vars(self))
        return trace

    def __getstate__(self) -> dict[str, Any]:
        """What deep copies, pickles and files are made of; these answer as the trace does."""
        state = dict(vars(self))
        if self._is_filled:
            shared = SharedMemory()
            state["layers"] = tuple(
                layer.with_calls(tuple(call.with_tensors(shared) for call in layer.calls))
                for layer in self.layers
            )
            state["output"] = tree_map_only(Tensor, shared, self.output)
        return state

    def __iter__(self) -> Iterator[LayerTrace]:
        """The layers."""
        return iter(self.layers)

    def __contains__(self, name: object) -> bool:
        """Whether there is a layer of that name."""
        return any(layer.name == name for layer in self.layers)

    def __getitem__(self, name: str) -> LayerTrace:
        """The layer of that name.

        Raises:
            KeyError: No layer has that name; the message lists those that there are.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        if name in self.missed:
            raise KeyError(f"layer {name!r} is not in this trace: {self.missed[name]}")
        names = ", ".join(repr(layer.name) for layer in self.layers)
        raise KeyError(f"no layer {name!r} in this trace, which has {names}; see trace.layers")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Of the attributes that each trace has once it is filled: asked for too early.
            if name in Trace.__dataclass_fields__:
                raise AttributeError(
                    f"this trace has no {name} yet: record fills it when backward() has run"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def assign_grads(self) -> None:
        """Add every ∂C/∂w and ∂C/∂b to its parameter's `.grad`, as `backward()` would.

        Adding means that a second pass accumulates, and that a parameter used by two layers gets
        the sum of both. The trace keeps its own tensors: what is later done to `.grad` does not
        reach it.

        Raises:
            RuntimeError: `backward()` has done so already, as it has for what `record` made.
        """
        if self.is_assigned:
            raise RuntimeError(
                "assign_grads must not add what .grad has already; got a trace that record made "
                "from backward()"
            )
        for layer in self.layers:
            _accumulate(layer.w, layer.grad_w)
            _accumulate(layer.b, layer.grad_b)

    @property
    def samples(self) -> int:
        """N, the number of samples: the first dimension of the input of every layer that has them.

        Raises:
            ValueError: The layers do not agree, with each other or with the model's input and
                output; or none has samples.
        """
        return self._layers_of_samples()[0].samples

    def _layers_of_samples(self) -> list[LayerTrace]:
        layers = [layer for layer in self.layers if layer.has_samples]
        without = [layer.name for layer in self.layers if not layer.has_samples]
        if without and (self.chosen or not layers):
            raise ValueError(
                f"layers that are chosen must have samples in their input; got {_some(without)}, "
                f"named as one without, or fed with nothing but what the model itself holds or "
                f"counts: see no_samples of record"
            )
        seen = [(layer.samples, repr(layer.name)) for layer in layers]
        if self.batch is not None:
            seen.append((self.batch, "the model's input and output"))
        for samples, where in seen:
            if samples != seen[0][0]:
                raise ValueError(
                    f"every layer must see the same samples in its input's first dimension; got "
                    f"{seen[0][0]} in {seen[0][1]} and {samples} in {where}: name layers whose "
                    f"rows are no samples, as record(model, no_samples=[...])"
                )
        return layers

    def per_sample_grads(self) -> dict[str, Tensor]:
        """Every sample's own gradient: for each parameter that learns, (N, *its shape), by name.

        In the unit of the notes, dC_x/dw: their mean over samples is `.grad` where the cost is
        the mean, and their sum where it is the sum. A parameter that several layers use has one
        entry, of all of them. This takes N times the memory of the gradients: see `split`.

        Raises:
            ValueError: The layers saw different numbers of samples; or the gradient of one of
                these parameters comes in part from elsewhere (see `elsewhere`), and the layers
                are not chosen; or there is none that learns.
            RuntimeError: a or δ was written over since the pass.
        """
        return {share.name: share.grads() for share in self._shares()}

    def per_sample_norms(self) -> Tensor:
        """The norm of every sample's gradient over all parameters of `layers`: (N,).

        In the unit of the notes, ‖dC_x/d(all w and b)‖, and in at least single precision. From the
        pairs (a, δ), without making the gradients. What is `elsewhere`, a LayerNorm's gradient
        say, is not in it. Errors as of `per_sample_grads`.
        """
        dtype = torch.promote_types(self.layers[0].w.dtype.to_real(), torch.float32)
        return _norms(self._shares()).to(dtype)

    def clipped_grads(self, max_norm: float) -> dict[str, Tensor]:
        """The gradient with each sample's own scaled down to a norm of at most max_norm, by name.

        Reduced as the cost is: the mean, or the sum, of the scaled gradients dC_x/dw. As in
        differentially private training, before the noise.

        Args:
            max_norm: The most that the norm of a sample's gradient, over all parameters of
                `layers` together, may be; in the unit of `per_sample_norms`.

        Raises:
            TypeError: max_norm is no number.
            ValueError: max_norm is not above 0; or as of `per_sample_grads`; or there are
                parameters whose gradients are not in this trace, which this would leave
                unclipped, and the layers are not chosen.
        """
        _require.above("max_norm", max_norm, 0)
        if self.elsewhere and not self.chosen:
            raise ValueError(
                f"clipped_grads must have the whole gradient of a sample; got a model where that "
                f"of {_some(self.elsewhere)} comes from elsewhere than linear layers: freeze "
                f"these, or choose what is to be clipped, as record(model, layers=[...])"
            )
        shares = self._shares()
        norms = _norms(shares)
        # An infinite norm gives no usable weight: 0 would drop the sample silently.
        weights = (max_norm / norms).clamp(max=1).masked_fill(norms.isinf(), torch.nan)
        return {share.name: share.weighted(weights) for share in shares}

    def split(self, size: int) -> Iterator["Trace"]:
        """This trace some samples at a time, so that per-sample gradients fit into the memory.

        Layers that have no samples are left out.

        Args:
            size: How many samples at a time; the last part may have fewer.

        Yields:
            Traces of `size` samples each, in the same unit. Their gradients, and their clipped
            ones, are shares of the whole: they add up to it. Cost and output are still the whole
            ones.

        Raises:
            TypeError: size is no integer.
            ValueError: size is below 1; or the layers saw different numbers of samples.
        """
        _require.count("size", size)
        layers, batch = self._layers_of_samples(), self.samples
        for start in range(0, batch, size):
            parts = tuple(layer.part(start, start + size) for layer in layers)
            yield replace(self, layers=parts, batch=None)

    def diagnostics(self, learning_rate: float | None = None) -> Diagnostics:
        """How well each layer learns, and why not: numbers, and a verdict; prints as a table.

        Args:
            learning_rate: That of plain gradient descent, to tell how large an update is beside
                the weights.

        Raises:
            TypeError: The layers are of complex numbers.
            RuntimeError: The weights are no longer those of the pass: ask before they are updated.
        """
        without = [layer for layer in self.layers if not layer.has_samples]
        shown = {p for layer in without for p in (layer.w, layer.b) if p is not None}
        names = {name for p, name in self.parameter_names.items() if p in shown}
        elsewhere = tuple(name for name in self.elsewhere if name not in names)
        return diagnose(self.layers, learning_rate, elsewhere)

    def _shares(self) -> list["_Share"]:
        """Each parameter that learns once, with all pairs that its gradient is made of."""
        layers = self._layers_of_samples()
        pairs: dict[Tensor, list[Pair]] = {}
        names = dict(self.parameter_names)
        weights = set()
        for layer in layers:
            # What torch.func.functional_call put in place is none of the network's own.
            names.setdefault(layer.w, f"{layer.name}.weight".lstrip("."))
            if layer.b is not None:
                names.setdefault(layer.b, f"{layer.name}.bias".lstrip("."))
            if not (layer.learns_w or layer.learns_b):
                continue
            a, delta = layer.pair
            if layer.learns_w:
                pairs.setdefault(layer.w, []).append((a, delta))
                weights.add(layer.w)
            if layer.b is not None and layer.learns_b:
                pairs.setdefault(layer.b, []).append((delta, delta))  # no a in BP3
        shares = [
            _Share(p, names[p], p in weights, joined(iter(of_p)), layers[0].scale)
            for p, of_p in pairs.items()
        ]
        if not shares:
            raise ValueError(
                "a layer of the trace must have a parameter that learns; all are frozen, or "
                "computed from others"
            )
        partly = [s.name for s in shares if s.name in self.elsewhere]
        if partly and not self.chosen:
            raise ValueError(
                f"a parameter's whole gradient must come from linear layers; got {_some(partly)}, "
                f"used elsewhere as well: choose layers, as record(model, layers=[...]), to have "
                f"what comes through them"
            )
        return shares

    @property
    def _is_filled(self) -> bool:
        return "layers" in vars(self)

    def __repr__(self) -> str:
        if not self._is_filled:
            return "Trace(not filled yet)"
        return f"Trace(cost={_as_text(self.cost)}, layers={list(self.layers)})"


class _Share(NamedTuple):
    """A parameter, and the pairs (a, δ) that its gradient is made of, whatever layers saw them."""

    parameter: Tensor
    name: str
    is_weight: bool
    pair: Pair
    scale: int

    def grads(self) -> Tensor:
        a, delta = self.pair
        delta = delta * self.scale  # before the product, which is far larger
        grads = _per_sample.grad_w(a, delta) if self.is_weight else _per_sample.grad_b(delta)
        return grads.to(self.parameter.dtype)

    def norms(self, known: dict[Tensor, Tensor]) -> Tensor:
        a, delta = self.pair
        if delta not in known and (a.shape[1] == 1 or not self.is_weight):
            known[delta] = _per_sample.norm_b(delta)  # once, for w and b
        if not self.is_weight:
            return known[delta] * self.scale
        return _per_sample.norm_w(a, delta, known.get(delta)) * self.scale

    def weighted(self, weights: Tensor) -> Tensor:
        a, delta = self.pair
        if self.is_weight:
            grad = _per_sample.weighted_grad_w(a, delta, weights)
        else:
            grad = _per_sample.weighted_grad_b(delta, weights)
        return grad.to(self.parameter.dtype)


def _norms(shares: Sequence[_Share]) -> Tensor:
    """The norm of each sample's gradient over all of these parameters, (N,), float64."""
    known: dict[Tensor, Tensor] = {}
    return reduce(torch.hypot, (share.norms(known) for share in shares))


def _as_text(cost: Tensor) -> str:
    """The number, or where there is none, as on the meta device, what PyTorch shows instead."""
    is_known = values_are_at_hand(cost) and not cost.is_meta and cost.numel() == 1
    return f"{cost.item():.6g}" if is_known else repr(cost)


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _accumulate(parameter: Tensor | None, grad: Tensor | None) -> None:
    if parameter is None or grad is None:
        return
    # Outside of any inference mode: what that makes, a later backward() could not add to.
    with torch.inference_mode(False), torch.no_grad():
        if parameter.grad is None:
            parameter.grad = grad.clone()
        else:
            parameter.grad += grad
