"""Backpropagation, the whole algorithm, without autograd: BP1 to BP4 in order.

In the notes a sample is a column; here it is a row, so every transpose moves:

    BP1    δ^L = ∇_a C ⊙ σ'(z^L)                  delta[L] = grad_a * sigma_prime(L)
    BP2    δ^l = ((w^(l+1))ᵀ δ^(l+1)) ⊙ σ'(z^l)   delta[l] = (delta[l+1] @ w[l+1]) * sigma_prime(l)
    BP3    ∂C/∂b^l = δ^l                          grad_b[l] = delta[l].sum(0)
    BP4    ∂C/∂w^l = δ^l (a^(l-1))ᵀ               grad_w[l] = delta[l].mT @ a[l-1]

In the notes, BP3 and BP4 are for one sample. For a batch they are summed over its rows, which
`.sum(0)` and the matrix product do.

Source: Nielsen, Neural Networks and Deep Learning, chapter 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manual_bp._net import parse, require_cost, require_input
from manual_bp.costs._cost import Cost, checked_gradient
from manual_bp.layers._activation import Activation
from manual_bp.layers._affine import as_rows
from manual_bp.layers.linear import linear
from manual_bp.trace import Call, LayerTrace, Trace


@torch.no_grad()
def backprop(net: nn.Sequential, x: Tensor, y: Tensor, cost: Cost) -> Trace:
    """The cost of a network on a batch, and all its gradients, by the four equations alone.

    Args:
        net: Linear layers and activations, ours or `torch.nn`'s own of the same kind, or
            `LinearSigmoid`s, in an `nn.Sequential`. A linear layer that no activation follows has
            a = z; for one that several follow, σ is their composition.
        x: Inputs, the a^0 of the notes, shape (N, in); also (in,) and (..., in).
        y: Targets, as the cost takes them.
        cost: A `Cost` reduced by "mean" or "sum". The cross-entropies are functions of z: they
            need a net that ends with a linear layer.

    Returns:
        A `Trace`. Its gradients are those of the reduced cost, equal to `.grad` after
        `cost(net(x), y).backward()`. Parameters and their `.grad` are left as they were. Nothing
        in the Trace is part of an autograd graph.

    Raises:
        TypeError: net is not an nn.Sequential, or it holds a module of another kind, or one that
            does more than its formula (hooks, a reparametrised weight); the message names it. Or
            cost is not a `Cost`, or x or y is not a tensor of real numbers.
        ValueError: net has no linear layer; its sizes and devices, x and y do not fit each other;
            or the cost is not reduced.

    Examples:
        >>> net, x, y = nn.Sequential(Linear(3, 2), Sigmoid()), torch.rand(5, 3), torch.rand(5, 2)
        >>> trace = backprop(net, x, y, QuadraticCost())
        >>> trace["0"].delta.shape, trace["0"].grad_w.shape
        (torch.Size([5, 2]), torch.Size([2, 3]))
    """
    input_activations, layers = parse(net)
    require_input(x, layers[0])
    require_cost(cost)

    last = len(layers)
    layer = dict(enumerate(layers, start=1))
    w = {l: layer[l].w for l in layer}
    b = {l: layer[l].b for l in layer}
    a: dict[int, Tensor] = {}
    z: dict[int, Tensor] = {}
    delta: dict[int, Tensor] = {}
    grad_w: dict[int, Tensor] = {}
    grad_b: dict[int, Tensor] = {}

    def sigma_prime(l: int) -> Tensor | int:
        return _sigma_prime(layer[l].activations, z[l], a[l])

    # 1. Input.
    a[0] = _sigma(input_activations, x.detach())

    # 2. Forward: every z and a is kept.
    for l in range(1, last + 1):
        z[l] = linear(a[l - 1], w[l], b[l])
        a[l] = _sigma(layer[l].activations, z[l])

    # 3. Output error.
    grad_a = checked_gradient(cost, a[last], y)
    delta[last] = grad_a * sigma_prime(last)  # BP1

    # 4. Backward.
    for l in range(last - 1, 0, -1):
        delta[l] = (delta[l + 1] @ w[l + 1]) * sigma_prime(l)  # BP2

    # 5. Gradients, of the parameters that are not frozen.
    for l in range(1, last + 1):
        if layer[l].learns_b:
            grad_b[l] = as_rows(delta[l]).sum(0)  # BP3
        if layer[l].learns_w:
            grad_w[l] = as_rows(delta[l]).mT @ as_rows(a[l - 1])  # BP4

    return Trace(
        cost=cost(a[last], y),
        output=a[last],
        layers=tuple(
            LayerTrace(
                name=layer[l].name,
                w=w[l],
                b=b[l],
                calls=(Call(a[l - 1], z[l], a[l], delta[l], tuple(layer[l].activations)),),
                scale=len(x) if cost.reduction == "mean" and x.ndim > 1 else 1,
                given=(_in_dtype_of(w[l], grad_w.get(l)), _in_dtype_of(b[l], grad_b.get(l))),
            )
            for l in layer
        ),
        parameter_names={parameter: name for name, parameter in net.named_parameters()},
    )


def _sigma(activations: Sequence[Activation], z: Tensor) -> Tensor:
    for activation in activations:
        z = activation.forward(z)
    return z


def _sigma_prime(activations: Sequence[Activation], z: Tensor, a: Tensor) -> Tensor | int:
    if not activations:
        return 1  # a = z
    *inner, outer = activations
    if not inner:
        return outer.sigma_prime(a)
    return outer.sigma_prime(a) * _sigma_prime(inner, z, _sigma(inner, z))


def _in_dtype_of(parameter: Tensor | None, grad: Tensor | None) -> Tensor | None:
    # Under autocast the products come in a lower dtype, and `.grad` must be in the parameter's.
    return None if parameter is None or grad is None else grad.to(parameter.dtype)
