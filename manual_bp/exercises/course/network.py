"""The whole algorithm, and two ways to look at its gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.backprop import backprop
from manual_bp.costs.quadratic import QuadraticCost
from manual_bp.exercises._exercise import Exercise, Mistake, Part, Values, combined
from manual_bp.layers.linear import Linear
from manual_bp.layers.sigmoid import Sigmoid
from manual_bp.layers.sigmoid import sigmoid_prime as slope


def _right(v: Values) -> Any:
    layers = []
    for w, b in zip(v.weights, v.biases, strict=True):
        layer = Linear(w.shape[1], w.shape[0], dtype=w.dtype)
        layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)
        layers += [layer, Sigmoid()]
    trace = backprop(nn.Sequential(*layers), v.x, v.y, QuadraticCost())
    return [layer.grad_w for layer in trace], [layer.grad_b for layer in trace]


_RIGHT: dict[str, Any] = {
    "biases": 1,
    "linear": False,
    "first": lambda a, y: (a - y) * slope(a),
    "back": lambda delta, w, l: delta @ w[l],
    "factor": lambda a, l: slope(a[l]),
    "below": lambda a, l: a[l],
    "again": lambda delta, _: delta,
    "scales": lambda _: (1, 1),
    "transposed": False,
    "layers": (0, 1, 2),
}


def _net(v: Values, *ways: Any) -> Any:
    """The gradients, with each step done in the way given for it.

    Args:
        v: The arguments.
        ways: Each a dict with some of these:
            biases: Whether the forward pass adds them.
            linear: Whether the last layer is left without σ.
            first: δ of the output layer, without 1/N, from a and y.
            back: BP2's product, from δ^(l+1), all w (from w[0]) and l.
            factor: BP2's σ', from all a and l.
            below: BP4's a^(l−1), from all a and l − 1.
            again: The δ that is passed down, from that of the layer and that of the output.
            scales: Factors of the gradients of weights and biases.
            transposed: Whether the gradients of weights are.
            layers: Those whose gradients are not zero.
    """
    way = _RIGHT | {name: option for given in ways for name, option in given.items()}
    a = [v.x]
    for w, b in zip(v.weights, v.biases, strict=True):
        z = a[-1] @ w.mT + b * way["biases"]
        a.append(z if way["linear"] and w is v.weights[-1] else torch.sigmoid(z))
    delta = output = way["first"](a[-1], v.y) / len(v.x)
    grads_w: list[Tensor] = []
    grads_b: list[Tensor] = []
    scale_w, scale_b = way["scales"](len(v.x))
    for l in (2, 1, 0):
        counts = l in way["layers"]
        grad_w = delta.mT @ way["below"](a, l) * scale_w * counts
        grads_w.insert(0, grad_w.mT if way["transposed"] else grad_w)
        grads_b.insert(0, delta.sum(0) * scale_b * counts)
        if l:
            delta = way["back"](way["again"](delta, output), v.weights, l) * way["factor"](a, l)
    return grads_w, grads_b


def _way(**ways: Any) -> Callable[[Values], Any]:
    return lambda _: ways


_PARTS: tuple[Part, ...] = (
    {"": lambda v: v},
    {
        "": _way(),
        "the 1/N of the mean is missing: C is the mean over the N = {N} samples": _way(
            scales=lambda n: (n, n)
        ),
        "averaged twice: the 1/N of the cost is in δ already, and BP3 and BP4 are sums": _way(
            scales=lambda n: (1 / n, 1 / n)
        ),
        "the gradients of the biases are averaged twice: BP3 is a sum": _way(
            scales=lambda n: (1, 1 / n)
        ),
        "the gradients of the weights are averaged twice: BP4 is a sum": _way(
            scales=lambda n: (1 / n, 1)
        ),
        "2 times too large: the 2 of the derivative cancels against the ½ of the cost": _way(
            scales=lambda _: (2, 2)
        ),
        "all gradients are 0 but those of the last layer": _way(layers=(2,)),
    },
    {
        "": _way(),
        "y − a where a − y belongs, so that all gradients have the wrong sign": _way(
            first=lambda a, y: (y - a) * slope(a)
        ),
        "σ'(z^L) is missing in the output layer: δ = a − y is the error of the cross-entropy cost, "
        "and here the cost is quadratic": _way(first=lambda a, y: a - y),
        "σ' of a, not of z, in the output layer: σ is applied twice": _way(
            first=lambda a, y: (a - y) * slope(a.sigmoid())
        ),
        "the last layer has no σ: here it is a sigmoid layer like the others": _way(
            linear=True, first=lambda a, y: a - y
        ),
    },
    {
        "": _way(),
        "the factor σ'(z) is missing in the hidden layers": _way(
            factor=lambda a, l: torch.ones_like(a[l])
        ),
        "σ' of a, not of z, in the hidden layers: σ is applied twice": _way(
            factor=lambda a, l: slope(a[l].sigmoid())
        ),
        "σ' of the wrong layer: BP2 takes w and δ of layer l+1, but σ'(z^l)": _way(
            factor=lambda a, l: slope(a[l + 1])
        ),
        "σ(z) where σ'(z) belongs, in the hidden layers": _way(factor=lambda a, l: a[l]),
    },
    {
        "": _way(),
        "{wt} where {w} belongs in BP2": _way(back=lambda delta, w, l: delta @ w[l].mT),
        "w^l where w^(l+1) belongs: BP2 takes the weights above the layer": _way(
            back=lambda delta, w, l: delta @ w[l - 1]
        ),
    },
    {
        "": _way(),
        "every layer gets the delta of the output layer: BP2 takes that of the next layer, so "
        "delta must be replaced on the way down": _way(again=lambda _, output: output),
    },
    {
        "": _way(),
        "a^l where a^(l−1) belongs: BP4 takes the activations below the layer": _way(
            below=lambda a, l: a[l + 1]
        ),
        "each gradient of a weight matrix is transposed: it has the shape of w": _way(
            transposed=True
        ),
    },
    {"": _way(), "the forward pass is without b": _way(biases=0)},
)


def _error_alone(v: Values) -> Any:
    """What is passed down is wᵀ times what came, without the σ' of the layer between."""
    grads_w: list[Tensor] = []
    grads_b: list[Tensor] = []
    a = [v.x]
    for w, b in zip(v.weights, v.biases, strict=True):
        a.append(torch.sigmoid(a[-1] @ w.mT + b))
    error = (a[-1] - v.y) / len(v.x)
    for l in (2, 1, 0):
        delta = error * slope(a[l + 1])
        grads_w.insert(0, delta.mT @ a[l])
        grads_b.insert(0, delta.sum(0))
        error = error @ v.weights[l]
    return grads_w, grads_b


_SHAPES: Any = {
    "weights": [("h1", "in"), ("h2", "h1"), ("out", "h2")],
    "biases": [("h1",), ("h2",), ("out",)],
}

BACKPROP = Exercise(
    "backprop",
    "A whole net: BP1 to BP4",
    """All gradients of a net of sigmoid layers, a^l = σ(w^l a^(l−1) + b^l), here three of them.

    C is the mean over the N samples of C_x = ½‖y − a^L‖². weights[0] and biases[0] are those of
    the first layer. Return two lists in the same order.""",
    arguments={"x": ("N", "in"), "y": ("N", "out"), **_SHAPES},
    results={"grads_w": _SHAPES["weights"], "grads_b": _SHAPES["biases"]},
    right=_right,
    mistakes=(
        *combined(_net, *_PARTS),
        Mistake(
            "the error is passed down without the σ' of the layer above: δ^(l+1) contains it, "
            "w^(l+1) times ∂C/∂a does not",
            _error_alone,
        ),
    ),
    where="manual_bp/backprop.py",
)
