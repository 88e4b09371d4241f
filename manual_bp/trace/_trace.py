"""One whole pass of the algorithm: its cost, its output, and its layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manual_bp import _require
from manual_bp._function import has_concrete_values
from manual_bp._torch import map_tensors
from manual_bp.trace._call import DistinctMemory, Pair, joined
from manual_bp.trace._diagnostics import Diagnostics
from manual_bp.trace._gradient import Gradient, norms_of
from manual_bp.trace._layer import LayerTrace
from manual_bp.trace._measure import diagnose


@dataclass(eq=False, repr=False)
class Trace:
    """One pass of the algorithm: the cost, the output, and every linear layer in forward order.

    Attributes:
        cost: The cost, of shape ().
        output: The network's output.
        layers: The linear layers that an error reached.
        parameter_names: The name of every parameter in the network's `named_parameters()`.
        missed: The linear layers that no error reached, with the reason for each.
        elsewhere: The names of parameters whose gradient comes, wholly or in part, from elsewhere
            than `layers`, such as a LayerNorm's or that of a weight which is also an Embedding's;
            or from layers that have no samples. Per-sample results lack that part.
        chosen: Whether the user chose the layers.
        is_assigned: Whether `backward()` has added the gradients of this pass to `.grad` already.
        batch: N, if the model's input and output show it.

    Examples:
        >>> net, x, y = nn.Sequential(Linear(3, 2), Sigmoid()), torch.rand(5, 3), torch.rand(5, 2)
        >>> backprop(net, x, y, QuadraticCost()).per_sample_norms().shape
        torch.Size([5])
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
        """The state for deep copies, pickles and files, which behave as the trace does."""
        state = dict(vars(self))
        if self._is_filled:
            distinct = DistinctMemory()
            state["layers"] = tuple(
                layer.with_calls(tuple(call.with_tensors(distinct) for call in layer.calls))
                for layer in self.layers
            )
            state["output"] = map_tensors(distinct, self.output)
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
            KeyError: No layer has that name; the message lists the names.
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
            if name in Trace.__dataclass_fields__:
                raise AttributeError(
                    f"this trace has no {name} yet: record fills it when backward() has run"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def assign_grads(self) -> None:
        """Add every ∂C/∂w and ∂C/∂b to its parameter's `.grad`, as `backward()` would.

        So a second pass accumulates, and a parameter used by two layers gets the sum of both. The
        trace keeps its own tensors: later changes to `.grad` do not affect it.

        Raises:
            RuntimeError: `backward()` has added them already, as it does under `record`.
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
    def labels(self) -> dict[str, str]:
        """What to call each layer where a person reads it, by its name: "1: 64→30 sigmoid".

        Place, shape and activation; in place of the place, the name, unless that is a number.
        """
        return {layer.name: layer.label(place) for place, layer in enumerate(self.layers, 1)}

    @property
    def samples(self) -> int:
        """N, the number of samples: the first dimension of the input of every layer that has them.

        Raises:
            ValueError: The layers disagree with each other, or with the model's input and output;
                or none has samples.
        """
        return self._layers_of_samples()[0].samples

    def _layers_of_samples(self) -> list[LayerTrace]:
        layers = [layer for layer in self.layers if layer.has_samples]
        without = [layer.name for layer in self.layers if not layer.has_samples]
        if without and (self.chosen or not layers):
            raise ValueError(
                f"layers that are chosen must have samples in their input; got {_some(without)}, "
                f"named in no_samples of record, or fed only with parameters, buffers and "
                f"positions of the model itself"
            )
        first = layers[0]
        others: list[tuple[int, str | None]] = [(layer.samples, layer.name) for layer in layers[1:]]
        if self.batch is not None:
            others.append((self.batch, None))
        for samples, name in others:
            if samples != first.samples:
                where = "the model's input and output" if name is None else repr(name)
                raise ValueError(
                    f"every layer must see the same samples in its input's first dimension; got "
                    f"{first.samples} in {first.name!r} and {samples} in {where}: name layers "
                    f"whose rows are not samples, in record(model, no_samples=[...])"
                )
        return layers

    def per_sample_grads(self) -> dict[str, Tensor]:
        """Every sample's own gradient: for each parameter that learns, (N, *its shape), by name.

        In the unit of the notes, dC_x/dw: `.grad` is their mean over samples if the cost is the
        mean, and their sum if it is the sum. A parameter that several layers use has one entry,
        for all of them. This takes N times the memory of the gradients: see `split`.

        Raises:
            ValueError: The layers saw different numbers of samples; or the gradient of one of
                these parameters comes in part from elsewhere (see `elsewhere`), and the layers
                are not chosen; or no parameter learns.
            RuntimeError: a or δ was changed in place since the pass.
        """
        return {gradient.name: gradient.per_sample() for gradient in self._gradients()}

    def per_sample_norms(self) -> Tensor:
        """The norm of every sample's gradient over all parameters of `layers`: (N,).

        In the unit of the notes, ‖dC_x/d(all w and b)‖, and in float32 or float64. They come from
        the pairs (a, δ), without computing the gradients. What is `elsewhere`, such as a
        LayerNorm's gradient, is not included. Raises the same errors as `per_sample_grads`.
        """
        dtype = torch.promote_types(self.layers[0].w.dtype.to_real(), torch.float32)
        return norms_of(self._gradients()).to(dtype)

    def clipped_grads(self, max_norm: float) -> dict[str, Tensor]:
        """The gradient with each sample's own scaled down to a norm of at most max_norm, by name.

        Reduced as the cost is: the mean, or the sum, of the scaled gradients dC_x/dw. This is what
        differentially private training adds its noise to.

        Args:
            max_norm: The largest norm that a sample's gradient, over all parameters of `layers`
                together, may have; in the unit of `per_sample_norms`.

        Raises:
            TypeError: max_norm is not a number.
            ValueError: max_norm is not above 0; or the layers are not chosen, and some parameters
                have gradients that are not in this trace and would stay unclipped; or for the same
                reasons as `per_sample_grads`.
            RuntimeError: a or δ was changed in place since the pass.
        """
        _require.above("max_norm", max_norm, 0)
        if self.elsewhere and not self.chosen:
            raise ValueError(
                f"clipped_grads must have the whole gradient of a sample; got a model where that "
                f"of {_some(self.elsewhere)} comes from elsewhere than linear layers: freeze "
                f"these, or choose the layers to clip, with record(model, layers=[...])"
            )
        gradients = self._gradients()
        norms = norms_of(gradients)
        # An infinite norm gives no usable weight: 0 would drop the sample silently.
        weights = (max_norm / norms).clamp(max=1).masked_fill(norms.isinf(), torch.nan)
        return {gradient.name: gradient.weighted(weights) for gradient in gradients}

    def split(self, size: int) -> Iterator["Trace"]:
        """This trace a few samples at a time, so that per-sample gradients fit into memory.

        Layers that have no samples are left out.

        Args:
            size: How many samples at a time; the last part may have fewer.

        Yields:
            Traces of `size` samples each, in the same unit. Their gradients add up to those of the
            whole, and so do their clipped ones. Cost and output are still those of the whole batch.

        Raises:
            TypeError: size is not an integer.
            ValueError: size is below 1; or the layers saw different numbers of samples.
        """
        size = _require.count("size", size)
        layers, batch = self._layers_of_samples(), self.samples
        for start in range(0, batch, size):
            parts = tuple(layer.part(start, start + size) for layer in layers)
            yield replace(self, layers=parts, batch=None)

    def diagnostics(self, learning_rate: float | None = None) -> Diagnostics:
        """How well each layer learns, or why it does not: numbers and a verdict; prints as a table.

        Args:
            learning_rate: The learning rate of plain gradient descent, to compare the size of an
                update with that of the weights.

        Raises:
            TypeError: The layers are complex; or learning_rate is not a number.
            ValueError: learning_rate is not above 0.
            RuntimeError: w, z, a or δ was changed since the pass: ask before the optimiser's step.
        """
        # Parameters of layers without samples count as elsewhere, but these layers are shown.
        without = [layer for layer in self.layers if not layer.has_samples]
        shown = {p for layer in without for p in (layer.w, layer.b) if p is not None}
        names = {name for p, name in self.parameter_names.items() if p in shown}
        elsewhere = tuple(name for name in self.elsewhere if name not in names)
        return diagnose(self.layers, learning_rate, elsewhere)

    def _gradients(self) -> list[Gradient]:
        """The gradient of each parameter that learns, as all the pairs that it is made of."""
        pairs: dict[int, list[Pair]] = {}  # by the id of the parameter
        parameters: list[tuple[Tensor, str, bool]] = []

        def add(p: Tensor, layer: LayerTrace, kind: str, pair: Pair) -> None:
            if id(p) not in pairs:
                # Parameters put in place by torch.func.functional_call are not in parameter_names.
                name = self.parameter_names.get(p, f"{layer.name}.{kind}".lstrip("."))
                parameters.append((p, name, kind == "weight"))
            pairs.setdefault(id(p), []).append(pair)

        layers = self._layers_of_samples()
        for layer in layers:
            if not (layer.learns_w or layer.learns_b):
                continue
            a, delta = layer.pair
            if layer.learns_w:
                add(layer.w, layer, "weight", (a, delta))
            if layer.b is not None and layer.learns_b:
                add(layer.b, layer, "bias", (delta, delta))  # BP3 has no a
        gradients = [
            Gradient(p, name, is_weight, joined(pairs[id(p)]), layers[0].scale)
            for p, name, is_weight in parameters
        ]
        if not gradients:
            raise ValueError(
                "a layer of the trace must have a parameter that learns; all are frozen, or "
                "computed from others"
            )
        partly = [gradient.name for gradient in gradients if gradient.name in self.elsewhere]
        if partly and not self.chosen:
            raise ValueError(
                f"a parameter's whole gradient must come from linear layers; got {_some(partly)}, "
                f"used elsewhere as well: choose layers, with record(model, layers=[...]), to get "
                f"only what comes through them"
            )
        return gradients

    @property
    def _is_filled(self) -> bool:
        return "layers" in vars(self)

    def __repr__(self) -> str:
        if not self._is_filled:
            return "Trace(not filled yet)"
        return f"Trace(cost={_as_text(self.cost)}, layers={list(self.layers)})"


def _as_text(cost: Tensor) -> str:
    """The number, or PyTorch's own repr if there is none, as on the meta device."""
    is_known = has_concrete_values(cost) and not cost.is_meta and cost.numel() == 1
    return f"{cost.item():.6g}" if is_known else repr(cost)


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _accumulate(parameter: Tensor | None, grad: Tensor | None) -> None:
    if parameter is None or grad is None:
        return
    # Outside of inference mode, since a later backward() could not add to a tensor made in it.
    with torch.inference_mode(False), torch.no_grad():
        if parameter.grad is None:
            parameter.grad = grad.clone()
        else:
            parameter.grad += grad
