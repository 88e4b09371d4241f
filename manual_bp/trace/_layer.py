"""One linear layer in one pass: its parameters, and a pair (a, δ) for each time it ran."""

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from manual_bp._autocast import without_autocast
from manual_bp._torch import version
from manual_bp.layers._activation import Activation
from manual_bp.trace import _per_sample
from manual_bp.trace._call import Call, Pair, joined


@dataclass(frozen=True, eq=False, repr=False)
class LayerTrace:
    """One linear layer, and the activations that follow it, in one pass.

    For N samples and a layer of in_features and out_features:

        name     the layer's key in the network, such as "0", or its path in a model
        w, b     its parameters: the nn.Parameter objects themselves; b may be None
        a_prev   a^(l-1), its input            (N, in)
        z        its weighted inputs           (N, out)
        a        a^l = σ(z), its output        (N, out)
        delta    δ^l = ∂C/∂z of the reduced cost, a row for each sample     (N, out)
        grad_w   ∂C/∂w, summed over the rows of delta                       (out, in)
        grad_b   ∂C/∂b, likewise                                            (out,)

    or (N, ..., in) and (N, ..., out) if a sample has several rows; or (in,) and (out,).

    Under the mean over samples, each row of delta includes the factor 1/N. A gradient is None if
    the parameter is frozen or absent, as `.grad` would be. The first layer's a_prev shares the
    memory of x: nothing is copied.

    Attributes:
        calls: a_prev, z, a and delta for each time that the layer ran. If it ran more than once,
            they are found only here; the gradients are sums over all calls.
        scale: The factor that turns a row of delta into ∂C_x/∂z: N under "mean", 1 under "sum".
        learns_w: Whether w gets a gradient in this pass; None to look at w now.
        learns_b: Whether b does, likewise.
        w_is_leaf: Whether w was a leaf, not computed from other tensors; None to look at w now.
        given: ∂C/∂w and ∂C/∂b if they are known already; else they are computed when asked for.
        has_samples: Whether the input's first dimension is the samples, and not made by the model.
        w_version: What `version(w)` was in the pass; None for the present one.

    Examples:
        >>> net, x, y = nn.Sequential(Linear(3, 2), Sigmoid()), torch.rand(5, 3), torch.rand(5, 2)
        >>> layer = backprop(net, x, y, QuadraticCost())["0"]
        >>> layer.grad_w.shape, layer.per_sample_grad_w().shape
        (torch.Size([2, 3]), torch.Size([5, 2, 3]))
    """

    name: str
    w: Tensor
    b: Tensor | None
    calls: tuple[Call, ...]
    scale: int = 1
    given: tuple[Tensor | None, Tensor | None] | None = None
    w_version: int | None = None
    learns_w: bool | None = None
    learns_b: bool | None = None
    w_is_leaf: bool | None = None
    has_samples: bool = True

    def __post_init__(self) -> None:
        if self.w_version is None:
            object.__setattr__(self, "w_version", version(self.w))
        if self.w_is_leaf is None:
            object.__setattr__(self, "w_is_leaf", self.w.is_leaf)
        # Noted now, since a parameter may be frozen or unfrozen before results are asked for.
        if self.learns_w is None or self.learns_b is None:
            object.__setattr__(self, "learns_w", learns(self.w))
            object.__setattr__(self, "learns_b", self.b is not None and learns(self.b))

    def __getstate__(self) -> dict[str, Any]:
        w, b = (p if p is None or p.is_leaf else p.detach() for p in (self.w, self.b))
        writes = version(self.w) - (self.w_version or 0)
        # A tensor with a graph cannot be copied, and the version of a copied w starts from zero.
        return {**vars(self), "w": w, "b": b, "w_version": writes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, w_version=version(state["w"]) - state["w_version"])

    def with_calls(self, calls: tuple[Call, ...]) -> "LayerTrace":
        """The same layer with calls that hold the same numbers."""
        layer = object.__new__(LayerTrace)
        vars(layer).update(vars(self), calls=calls)
        return layer

    def label(self, place: int) -> str:
        """What to call the layer at that place of a trace: see `Trace.labels`."""
        out_features, in_features = self.w.shape
        name = str(place) if self.name.isdecimal() else self.name
        sigmas = [type(sigma).__name__.lower() for sigma in self.calls[0].activations]
        return " ".join([f"{name}: {in_features}→{out_features}", *sigmas])

    def require_unchanged(self) -> None:
        """Check that w, z, a and delta are still those of the pass.

        Raises:
            RuntimeError: One of them was changed in place.
        """
        changed = set[str]().union(*(call.changed for call in self.calls)) - {"a_prev"}
        if changed:
            raise RuntimeError(
                f"z, a and delta of layer {self.name!r} must still be those of the pass; got "
                f"{' and '.join(sorted(changed))} changed in place"
            )
        if version(self.w) != self.w_version:
            raise RuntimeError(
                f"the weights of layer {self.name!r} must still be those of the pass; they were "
                f"changed since: ask before the optimiser's step"
            )

    @property
    def a_prev(self) -> Tensor:
        """a^(l-1), the layer's input."""
        return self._call.a_prev

    @property
    def z(self) -> Tensor:
        """The weighted inputs."""
        return self._call.z

    @property
    def a(self) -> Tensor:
        """a^l = σ(z); z itself if no known activation follows."""
        return self._call.a

    @property
    def delta(self) -> Tensor:
        """δ^l = ∂C/∂z."""
        return self._call.delta

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activations that z went through, in order, as modules of ours; may be empty."""
        return self._call.activations

    @property
    def _call(self) -> Call:
        if len(self.calls) != 1:
            raise ValueError(
                f"layer {self.name!r} must have run once to have one a_prev, z, a and delta; "
                f"it ran {len(self.calls)} times: see its calls"
            )
        return self.calls[0]

    @cached_property
    def grad_w(self) -> Tensor | None:
        """∂C/∂w; None if w is frozen."""
        if self.given is not None:
            return self.given[0]
        if not self.learns_w:
            return None
        with without_autocast(self.w):
            rows = (call.rows for call in self.calls)
            grad_w = reduce(torch.add, (delta.mT @ a.conj() for a, delta in rows))  # BP4
        return grad_w.to(self.w.dtype)

    @cached_property
    def grad_b(self) -> Tensor | None:
        """∂C/∂b; None if b is frozen or absent."""
        if self.given is not None:
            return self.given[1]
        if self.b is None or not self.learns_b:
            return None
        grad_b = reduce(torch.add, (call.rows[1].sum(0) for call in self.calls))  # BP3
        return grad_b.to(self.b.dtype)

    def per_sample_grad_w(self) -> Tensor | None:
        """∂C_x/∂w of every sample x, (N, out, in); None if w is frozen.

        In the unit of the notes, that of the sample's own cost C_x: grad_w is their mean if the
        cost is the mean over samples, and their sum if it is the sum.

        Raises:
            ValueError: The layer has no samples, or did not see the same number of them each time
                that it ran.
            RuntimeError: a_prev or delta was changed in place since the pass.
        """
        if not self.learns_w:
            return None
        a, delta = self.pair
        return _per_sample.grad_w(a, delta * self.scale).to(self.w.dtype)

    def per_sample_grad_b(self) -> Tensor | None:
        """∂C_x/∂b of every sample x, (N, out); None if b is frozen or absent.

        In the same unit as `per_sample_grad_w`, and with the same errors.
        """
        if self.b is None or not self.learns_b:
            return None
        _, delta = self.pair
        return _per_sample.grad_b(delta * self.scale).to(self.b.dtype)

    @property
    def samples(self) -> int:
        """N.

        Raises:
            ValueError: The layer has no samples, or N was not the same each time that it ran.
        """
        self._require_same_samples()
        return self.calls[0].samples

    def _require_same_samples(self) -> None:
        if not self.has_samples:
            raise ValueError(
                f"layer {self.name!r} must have samples in its input's first dimension; it is "
                f"named in no_samples of record, or its input is made only of parameters, buffers "
                f"and positions of the model itself"
            )
        counts = {call.samples for call in self.calls}
        if len(counts) > 1:
            raise ValueError(
                f"layer {self.name!r} must see the same samples in its input's first dimension "
                f"each time that it runs; got {' and '.join(map(str, sorted(counts)))} of them"
            )

    @property
    def pair(self) -> Pair:
        """(a, δ) of all calls, (N, T, in) and (N, T, out): every call adds rows."""
        self._require_same_samples()
        return joined([call.pair for call in self.calls])

    def part(self, start: int, stop: int) -> "LayerTrace":
        """The same for the samples from start to stop; its gradients are sums over these."""
        return replace(self, calls=tuple(c.part(start, stop) for c in self.calls), given=None)

    def __repr__(self) -> str:
        out_features, in_features = self.w.shape
        return f"LayerTrace({self.name!r}, {in_features} to {out_features})"


def learns(parameter: Tensor) -> bool:
    """Whether it is a leaf that requires a gradient."""
    return parameter.requires_grad and parameter.is_leaf
