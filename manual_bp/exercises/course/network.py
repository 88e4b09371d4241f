"""The whole algorithm, and two ways to look at its gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.backprop import backprop
from manual_bp.costs.quadratic import QuadraticCost
from manual_bp.exercises._exercise import Exercise, Mistake, Values
from manual_bp.layers.linear import Linear
from manual_bp.layers.sigmoid import Sigmoid
from manual_bp.layers.sigmoid import sigmoid_prime as slope

Step = Callable[[list[Tensor], int], Tensor]


def _right(v: Values) -> Any:
    layers = []
    for w, b in zip(v.weights, v.biases, strict=True):
        layer = Linear(w.shape[1], w.shape[0], dtype=w.dtype)
        layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)
        layers += [layer, Sigmoid()]
    trace = backprop(nn.Sequential(*layers), v.x, v.y, QuadraticCost())
    return [layer.grad_w for layer in trace], [layer.grad_b for layer in trace]


def _slope(a: list[Tensor], l: int) -> Tensor:
    return slope(a[l])


def _net(
    v: Values,
    *,
    biases: bool = True,
    first: Callable[[Tensor, Tensor], Tensor] = lambda a, y: (a - y) * slope(a),
    back: Callable[[Tensor, list[Tensor], int], Tensor] = lambda delta, w, l: delta @ w[l],
    factor: Step = _slope,
    below: Callable[[list[Tensor], int], Tensor] = lambda a, l: a[l],
    again: Callable[[Tensor, Tensor], Tensor] = lambda delta, _: delta,
) -> Any:
    """The gradients, with one step done in another way.

    Args:
        v: The arguments.
        biases: Whether the forward pass adds them.
        first: δ of the output layer, without 1/N, from a and y.
        back: BP2's product, from δ^(l+1), all w (from w[0]) and l.
        factor: BP2's σ', from all a and l.
        below: BP4's a^(l−1), from all a and l − 1.
        again: The δ that is passed down, from that of the layer and that of the output.
    """
    a = [v.x]
    for w, b in zip(v.weights, v.biases, strict=True):
        a.append(torch.sigmoid(a[-1] @ w.mT + (b if biases else 0)))
    delta = output = first(a[-1], v.y) / len(v.x)
    grads_w, grads_b = [], []
    for l in (2, 1, 0):
        grads_w.insert(0, delta.mT @ below(a, l))
        grads_b.insert(0, delta.sum(0))
        if l:
            delta = back(again(delta, output), v.weights, l) * factor(a, l)
    return grads_w, grads_b


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


def _scaled(v: Values, weights: float, biases: float) -> Any:
    grads_w, grads_b = _net(v)
    return [weights * g for g in grads_w], [biases * g for g in grads_b]


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
        Mistake(
            "the 1/N of the mean is missing: C is the mean over the N = {N} samples",
            lambda v: _scaled(v, len(v.x), len(v.x)),
        ),
        Mistake(
            "averaged twice: the 1/N of the cost is in δ already, and BP3 and BP4 are sums",
            lambda v: _scaled(v, 1 / len(v.x), 1 / len(v.x)),
        ),
        Mistake(
            "y − a where a − y belongs, so that all gradients have the wrong sign",
            lambda v: _scaled(v, -1, -1),
        ),
        Mistake(
            "2 times too large: the 2 of the derivative cancels against the ½ of the cost",
            lambda v: _scaled(v, 2, 2),
        ),
        Mistake(
            "the gradients of the biases are averaged twice: BP3 is a sum",
            lambda v: _scaled(v, 1, 1 / len(v.x)),
        ),
        Mistake(
            "the gradients of the weights are averaged twice: BP4 is a sum",
            lambda v: _scaled(v, 1 / len(v.x), 1),
        ),
        Mistake(
            "σ'(z^L) is missing in the output layer: δ = a − y is the error of the "
            "cross-entropy cost, and here the cost is quadratic",
            lambda v: _net(v, first=lambda a, y: a - y),
        ),
        Mistake(
            "the factor σ'(z) is missing in the hidden layers",
            lambda v: _net(v, factor=lambda a, l: torch.ones_like(a[l])),
        ),
        Mistake(
            "σ' of a, not of z: σ is applied twice",
            lambda v: _net(
                v,
                first=lambda a, y: (a - y) * slope(a.sigmoid()),
                factor=lambda a, l: slope(a[l].sigmoid()),
            ),
        ),
        Mistake(
            "σ' of the wrong layer: BP2 takes w and δ of layer l+1, but σ'(z^l)",
            lambda v: _net(v, factor=lambda a, l: slope(a[l + 1])),
        ),
        Mistake(
            "a^l where a^(l−1) belongs: BP4 takes the activations below the layer",
            lambda v: _net(v, below=lambda a, l: a[l + 1]),
        ),
        Mistake(
            "w^l where w^(l+1) belongs: BP2 takes the weights above the layer",
            lambda v: _net(v, back=lambda delta, w, l: delta @ w[l - 1]),
        ),
        Mistake(
            "{wt} where {w} belongs in BP2",
            lambda v: _net(v, back=lambda delta, w, l: delta @ w[l].mT),
        ),
        Mistake(
            "every layer gets the delta of the output layer: BP2 takes that of the next layer, so "
            "delta must be replaced on the way down",
            lambda v: _net(v, again=lambda _, output: output),
        ),
        Mistake(
            "the error is passed down without the σ' of the layer above: δ^(l+1) contains it, "
            "w^(l+1) times ∂C/∂a does not",
            _error_alone,
        ),
        Mistake("the forward pass is without b", lambda v: _net(v, biases=False)),
        Mistake(
            "each gradient of a weight matrix is transposed: it has the shape of w",
            lambda v: ([g.mT for g in _net(v)[0]], _net(v)[1]),
        ),
    ),
    where="manual_bp/backprop.py",
)


class _Bowl:
    """f(x) = ½ Σ c_i x_i² + ½ (Σ x_i)²: at small x, its slope is much smaller than its curvature."""

    def __init__(self, like: Tensor) -> None:
        self.c = torch.arange(1, like.numel() + 1, dtype=like.dtype).view(like.shape)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.c.dtype)
        return ((self.c * x * x).sum() + x.sum() ** 2) / 2

    def __str__(self) -> str:
        return "½ (Σ c x² + (Σ x)²) with c = 1, 2, 3, ..."

    def gradient(self, x: Tensor) -> Tensor:
        """∂f/∂x."""
        return self.c * x + x.sum()

    def curvature(self) -> Tensor:
        """∂²f/∂x_i²."""
        return self.c + 1


def _along(v: Values, way: Tensor) -> Tensor:
    """The slope if all elements of x move along together."""
    return (v.f.gradient(v.x) * way).sum()


def _differences(v: Values, h: float) -> Tensor:
    """Central differences, rounding errors included."""
    steps = h * torch.eye(v.x.numel(), dtype=v.x.dtype).view(-1, *v.x.shape)
    found = [(v.f(v.x + step) - v.f(v.x - step)) / (2 * h) for step in steps]
    return torch.stack(found).view_as(v.x)


NUMERICAL_GRADIENT = Exercise(
    "numerical_gradient",
    "A gradient by experiment",
    """∂f/∂x of a function f of an array, which returns a number, by central differences.

    Move one element of x by h and by −h, with h between 1e-8 and 1e-3, and see how f changes. The
    result has the shape of x. Afterwards x is as it was.""",
    arguments={"f": (), "x": ("out", "in")},
    results={"gradient": ("out", "in")},
    derived={"x": lambda v: v.x / 1000, "f": lambda v: _Bowl(v.x)},
    right=lambda v: v.f.gradient(v.x),
    mistakes=(
        Mistake(
            "2 times too large: f(x + h) − f(x − h) is divided by h, and the two lie 2h apart",
            lambda v: 2 * v.f.gradient(v.x),
        ),
        Mistake(
            "zero everywhere, so f(x + h) and f(x − h) were the same number: plus = x is no copy "
            "but a second name for the same array (or is h far too short?)",
            lambda v: torch.zeros_like(v.x),
        ),
        Mistake(
            "the sign is wrong: f(x + h) − f(x − h), in this order",
            lambda v: -v.f.gradient(v.x),
        ),
        Mistake(
            "half of it: f(x + h) − f(x) is divided by 2h",
            lambda v: v.f.gradient(v.x) / 2,
        ),
        Mistake(
            "all elements of x are moved at once: move one at a time",
            lambda v: _along(v, torch.ones_like(v.x)).expand_as(v.x),
        ),
        Mistake(
            "all elements of x are moved at once: move one at a time",
            lambda v: _along(v, torch.ones_like(v.x)),
        ),
        Mistake(
            "the elements of a row are moved at once: one index of a matrix is a row of it",
            lambda v: v.f.gradient(v.x).sum(1, keepdim=True).expand_as(v.x),
        ),
        *(
            Mistake(
                "the difference to one side, (f(x + h) − f(x)) / h, is off by h/2 times the "
                "curvature: take f(x − h) instead of f(x)",
                lambda v, h=sign * 10.0**-power: v.f.gradient(v.x) + h / 2 * v.f.curvature(),
            )
            for power in range(1, 9)
            for sign in (1, -1)
        ),
        *(
            Mistake(
                "the step h is too short: x + h and f are rounded, and of the difference of two "
                "nearly equal numbers few digits are right. Between 1e-8 and 1e-3 is good",
                lambda v, h=10.0**-power: _differences(v, h),
            )
            for power in range(11, 22)
        ),
    ),
    where="docs/experiments.md, which measures how good it is",
)

PER_SAMPLE_GRAD_W = Exercise(
    "per_sample_grad_w",
    "Every sample's own gradient",
    """∂C_x/∂w of each sample x, for which BP4 gives δ_x (a_x)ᵀ.

    delta holds each sample's own error ∂C_x/∂z, without any 1/N. In either form the first index of
    the result is the sample.""",
    arguments={"delta": ("N", "out"), "a_prev": ("N", "in")},
    results={"grads": ("N", "out", "in")},
    right=lambda v: v.delta[:, :, None] * v.a_prev[:, None],
    mistakes=(
        Mistake(
            "the sum over the samples is taken, which gives BP4 of the batch: leave it out",
            lambda v: v.delta.mT @ v.a_prev,
        ),
        Mistake(
            "the gradient of each sample is transposed: w has shape ({out}, {in})",
            lambda v: v.a_prev[:, :, None] * v.delta[:, None],
        ),
        Mistake(
            "the same for every sample: that is the mean over the batch, repeated",
            lambda v: (v.delta.mT @ v.a_prev / len(v.delta)).expand(len(v.delta), -1, -1),
        ),
        Mistake(
            "the same for every sample: that is the sum over the batch, repeated",
            lambda v: (v.delta.mT @ v.a_prev).expand(len(v.delta), -1, -1),
        ),
        Mistake(
            "divided by N = {N}: each sample's own gradient has no 1/N",
            lambda v: v.delta[:, :, None] * v.a_prev[:, None] / len(v.delta),
        ),
        Mistake(
            "the activations of the other samples enter as well: each δ_x meets only its own a_x",
            lambda v: v.delta[:, :, None] * v.a_prev.sum(0),
        ),
        Mistake(
            "the sample must be the first index of the result, and here it is the last",
            lambda v: (v.delta[:, :, None] * v.a_prev[:, None]).permute(1, 2, 0),
        ),
    ),
    where="manual_bp/trace/_per_sample.py",
)
