"""Gradients by experiment, and those of single samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Mistake, Values


class _Bowl:
    """f(x) = ½ Σ c_i x_i² + ½ (Σ x_i)²: at small x its slope is much smaller than its curvature."""

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


def _to_one_side(h: float) -> Callable[[Values], Tensor]:
    """(f(x + h) − f(x)) / h, which is exact but for the curvature, as f is quadratic."""
    return lambda v: v.f.gradient(v.x) + h / 2 * v.f.curvature()


def _rounded(h: float) -> Callable[[Values], Tensor]:
    """Central differences, rounding errors included."""

    def gives(v: Values) -> Tensor:
        steps = h * torch.eye(v.x.numel(), dtype=v.x.dtype).view(-1, *v.x.shape)
        found = [(v.f(v.x + step) - v.f(v.x - step)) / (2 * h) for step in steps]
        return torch.stack(found).view_as(v.x)

    return gives


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
            "but a second name for the same array (or / 2 * h is without parentheses, or h is far "
            "too short)",
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
            lambda v: v.f.gradient(v.x).sum().expand_as(v.x),
        ),
        Mistake(
            "all elements of x are moved at once: move one at a time",
            lambda v: v.f.gradient(v.x).sum(),
        ),
        Mistake(
            "the elements of a row are moved at once: one index of a matrix is a row of it",
            lambda v: v.f.gradient(v.x).sum(1, keepdim=True).expand_as(v.x),
        ),
        *(
            Mistake(
                "the difference to one side, (f(x + h) − f(x)) / h, is off by h/2 times the "
                "curvature: take f(x − h) instead of f(x)",
                _to_one_side(digit * 10.0**-power),
            )
            for power in range(1, 9)
            for digit in (1, 2, 3, 5, -1, -2, -3, -5)
        ),
        *(
            Mistake(
                "the step h is too short: x + h and f are rounded, and of the difference of two "
                "nearly equal numbers few digits are right. Between 1e-8 and 1e-3 is good",
                _rounded(10.0**-power),
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
