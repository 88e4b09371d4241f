"""The numbers of the page: every matrix of one step of learning, by name.

A name is a quantity and its layer: `a0` is the input, `delta2` the error of layer 2. Matrices have
the shapes of the code: (N, neurons) for what samples have, (out, in) for weights, and (1, out) for
biases.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn

from manual_bp import Cost, Trace, backprop, linear

Matrices = Mapping[str, Tensor]


def parameters(net: nn.Sequential) -> Matrices:
    """`w1`, `b1` and so on: what all samples share."""
    layers = [module for module in net if isinstance(module, nn.Linear)]
    found: dict[str, Tensor] = {}
    for k, layer in enumerate(layers, start=1):
        found |= {f"w{k}": layer.weight.detach(), f"b{k}": layer.bias.detach()[None]}
    return found


def one_pass(
    net: nn.Sequential, x: Tensor, y: Tensor, cost: Cost, learning_rate: float
) -> Matrices:
    """Every matrix that a batch makes, from its activations to the weights after one step.

    a, z, sigma_prime, delta, grad_w, grad_b, w_new, b_new: One for each layer; a also for layer 0.
    back: ∂C/∂a of each layer below the last, the factor (w^(l+1))ᵀ δ^(l+1) of BP2.
    y, grad_a, losses: Targets, ∂C/∂output, and the loss C_x of each sample.
    cost, cost_new, a_new: C before and after the step, (1, 1), and the output after it.
    """
    trace = backprop(net, x, y, cost)
    stepped = _after_a_step(net, trace, learning_rate)
    after = backprop(stepped, x, y, cost)
    found = {"a0": x, "y": y, "grad_a": cost.gradient(trace.output, y), "a_new": after.output}
    found["losses"] = type(cost)(reduction="none")(trace.output, y)[:, None]
    found |= {"cost": trace.cost.view(1, 1), "cost_new": after.cost.view(1, 1)}
    for k, layer in enumerate(trace, start=1):
        assert layer.grad_w is not None  # nothing is frozen
        assert layer.grad_b is not None
        found |= {f"z{k}": layer.z, f"a{k}": layer.a, f"delta{k}": layer.delta}
        found |= {f"grad_w{k}": layer.grad_w, f"grad_b{k}": layer.grad_b[None]}
        if layer.activations:
            (activation,) = layer.activations
            found[f"sigma_prime{k}"] = activation.sigma_prime(layer.a)
    found |= {f"back{k}": grad_a for k, grad_a in enumerate(_sent_back(trace), start=1)}
    new = parameters(stepped)
    return found | {f"{name[0]}_new{name[1:]}": matrix for name, matrix in new.items()}


def _sent_back(trace: Trace) -> Iterator[Tensor]:
    """What the backward of each linear layer but the first sends to the layer below it."""
    for below, layer in pairwise(trace):
        a = below.a.clone().requires_grad_()
        (grad_a,) = torch.autograd.grad(linear(a, layer.w.detach()), a, layer.delta)
        yield grad_a


def _after_a_step(net: nn.Sequential, trace: Trace, learning_rate: float) -> nn.Sequential:
    stepped = deepcopy(net)
    names = trace.parameter_names
    gradients = {
        names[p]: grad
        for layer in trace
        for p, grad in ((layer.w, layer.grad_w), (layer.b, layer.grad_b))
        if p is not None
    }
    for name, p in stepped.named_parameters():
        p.grad = gradients[name]
    torch.optim.SGD(stepped.parameters(), learning_rate).step()
    return stepped
