"""The numbers of the page: every matrix of one step of learning, by name.

A name is a quantity and its layer: `a0` is the input, `delta2` the error of layer 2. Matrices have
the shapes of the code: (N, neurons) for what samples have, (out, in) for weights, and (1, out) for
biases.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from manual_bp import Cost, LayerTrace, Trace, backprop, linear

Matrices = Mapping[str, Tensor]


def parameters(net: nn.Sequential, x: Tensor, y: Tensor, cost: Cost) -> Matrices:
    """`w1`, `b1` and so on: what all samples share."""
    found = {}
    for l, layer in enumerate(backprop(net, x, y, cost), start=1):
        found[f"w{l}"] = layer.w.detach()
        found[f"b{l}"] = _bias(layer).detach()[None]
    return found


def one_pass(
    net: nn.Sequential, x: Tensor, y: Tensor, cost: Cost, learning_rate: float
) -> Matrices:
    """Every matrix that a batch makes, from its activations to the weights after one step.

    a, z, sigma_prime, delta, grad_w, grad_b, w_new, b_new: one for each layer.
    back: ∂C/∂a of each layer below the last, the factor (w^(l+1))ᵀ δ^(l+1) of BP2.
    y, grad_a, losses: Targets, ∂C/∂output and the loss C_x of each sample.
    cost, cost_new, a_new: C before and after the step, (1, 1), and the output after it.
    """
    trace = backprop(net, x, y, cost)
    stepped = _after_a_step(net, trace, learning_rate)
    after = backprop(stepped, x, y, cost)
    found = {"a0": x, "y": y, "grad_a": cost.gradient(trace.output, y)}
    found["losses"] = type(cost)(reduction="none")(trace.output, y)[:, None].detach()
    for l, (layer, new) in enumerate(zip(trace, after, strict=True), start=1):
        if layer.grad_w is None or layer.grad_b is None:
            raise ValueError(f"layer {layer.name!r} must learn both w and b; got one that is frozen")
        found |= {f"z{l}": layer.z, f"a{l}": layer.a, f"delta{l}": layer.delta}
        found |= {f"grad_w{l}": layer.grad_w, f"grad_b{l}": layer.grad_b[None]}
        found |= {f"w_new{l}": new.w.detach(), f"b_new{l}": _bias(new).detach()[None]}
        for activation in layer.activations:
            found[f"sigma_prime{l}"] = activation.sigma_prime(layer.a)
    found |= {f"back{l}": back for l, back in enumerate(_sent_back(trace), start=1)}
    found |= {"cost": trace.cost.view(1, 1), "cost_new": after.cost.view(1, 1)}
    return found | {"a_new": after.output}


def _sent_back(trace: Trace) -> Iterator[Tensor]:
    """What the backward of each linear layer but the first sends to the layer below it."""
    for below, layer in zip(trace.layers, trace.layers[1:], strict=False):
        a = below.a.clone().requires_grad_()
        (grad_a,) = torch.autograd.grad(linear(a, layer.w.detach(), layer.b), a, layer.delta)
        yield grad_a


def _after_a_step(net: nn.Sequential, trace: Trace, learning_rate: float) -> nn.Sequential:
    stepped = deepcopy(net)
    names = {p: name for p, name in trace.parameter_names.items()}
    new = dict(stepped.named_parameters())
    for layer in trace:
        for p, grad in ((layer.w, layer.grad_w), (layer.b, layer.grad_b)):
            if p is not None:
                new[names[p]].grad = grad
    torch.optim.SGD(stepped.parameters(), learning_rate).step()
    return stepped


def _bias(layer: LayerTrace) -> Tensor:
    if layer.b is None:
        raise ValueError(f"layer {layer.name!r} must have a bias; got none")
    return layer.b
