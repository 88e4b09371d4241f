"""What one pass of the algorithm leaves behind: for every layer (a, δ) and its gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False, repr=False)
class LayerTrace:
    """One linear layer, and the activation that follows it, as one pass saw them.

    For N samples, a layer of in_features and out_features:

        name     the layer's key in the network, as "0"
        w, b     its parameters: the nn.Parameter objects themselves; b may be None
        a_prev   a^(l-1), its input            (N, in)
        z        its weighted inputs           (N, out)
        a        a^l = σ(z), its output        (N, out)
        delta    δ^l = ∂C/∂z of the reduced cost, one sample a row      (N, out)
        grad_w   ∂C/∂w, summed over the rows of delta                   (out, in)
        grad_b   ∂C/∂b, likewise                                        (out,)

    Under the mean over samples, a row of delta carries its 1/N. A gradient is None where the
    parameter is frozen or absent, as `.grad` would be. The first layer's a_prev shares the memory
    of x: nothing is copied.
    """

    name: str
    w: nn.Parameter
    b: nn.Parameter | None
    a_prev: Tensor
    z: Tensor
    a: Tensor
    delta: Tensor
    grad_w: Tensor | None
    grad_b: Tensor | None

    def __repr__(self) -> str:
        out_features, in_features = self.w.shape
        return f"LayerTrace({self.name!r}, {in_features} to {out_features})"


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """One pass of the algorithm: the cost, the output, and every linear layer in forward order."""

    cost: Tensor
    output: Tensor
    layers: tuple[LayerTrace, ...]

    def __getitem__(self, name: str) -> LayerTrace:
        """The layer of that name.

        Raises:
            KeyError: No layer has that name; the message lists those that there are.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(repr(layer.name) for layer in self.layers)
        raise KeyError(f"no layer {name!r} in this trace, which has {names}; see trace.layers")

    def assign_grads(self) -> None:
        """Add every ∂C/∂w and ∂C/∂b to its parameter's `.grad`, as `backward()` would.

        Adding means that a second pass accumulates, and that a parameter used by two layers gets
        the sum of both. The trace keeps its own tensors: what is later done to `.grad` does not
        reach it.
        """
        for layer in self.layers:
            _accumulate(layer.w, layer.grad_w)
            _accumulate(layer.b, layer.grad_b)

    def __repr__(self) -> str:
        return f"Trace(cost={self.cost.item():.6g}, layers={list(self.layers)})"


def _accumulate(parameter: nn.Parameter | None, grad: Tensor | None) -> None:
    if parameter is None or grad is None:
        return
    # Outside of any inference mode: what that makes, a later backward() could not add to.
    with torch.inference_mode(False), torch.no_grad():
        if parameter.grad is None:
            parameter.grad = grad.clone()
        else:
            parameter.grad += grad
