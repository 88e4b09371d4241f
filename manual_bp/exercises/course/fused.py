"""A layer in one step, and the derivative of its backward."""

from typing import Any

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Part, Values, combined
from manual_bp.exercises.course.equations import slopes
from manual_bp.layers.sigmoid import sigmoid_prime as slope


def _z(v: Values) -> Tensor:
    return v.a_prev @ v.w.mT + v.b  # type: ignore[no-any-return]


def _averaged(name: str) -> str:
    return f"averaged over the {{N}} samples in {name}, which is a sum (the 1/N is in grad_a)"


def _no_slope(name: str) -> str:
    return f"∂C/∂a where δ = ∂C/∂a ⊙ σ'(z) belongs, in {name}"


# How each result comes from δ.
_GRAD_A_PREV: Part = {
    "": lambda v: lambda delta: delta @ v.w,
    _no_slope("BP2"): lambda v: lambda _: v.grad_a @ v.w,
    "{wt} where {w} belongs in BP2": lambda v: lambda delta: delta @ v.w.mT,
    "grad_a_prev has the σ' of the layer below as well: that is left to its own backward": (
        lambda v: lambda delta: (delta @ v.w) * slope(v.a_prev)
    ),
}
_GRAD_W: Part = {
    "": lambda v: lambda delta: delta.mT @ v.a_prev,
    _no_slope("BP4"): lambda v: lambda _: v.grad_a.mT @ v.a_prev,
    _averaged("BP4"): lambda v: lambda delta: delta.mT @ v.a_prev / len(delta),
    "a where a_prev belongs: BP4 takes the activations below the layer": (
        lambda v: lambda delta: delta.mT @ v.a
    ),
    "grad_w is transposed: it has the shape of w": lambda v: lambda delta: v.a_prev.mT @ delta,
}
_GRAD_B: Part = {
    "": lambda _: lambda delta: delta.sum(0),
    _no_slope("BP3"): lambda v: lambda _: v.grad_a.sum(0),
    _averaged("BP3"): lambda _: lambda delta: delta.mean(0),
    "the sum over the samples is missing in BP3": lambda _: lambda delta: delta,
    "summed over the wrong axis in BP3: axis {over_samples} belongs to the samples": (
        lambda _: lambda delta: delta.sum(1)
    ),
}

LINEAR_SIGMOID_BACKWARD = Exercise(
    "linear_sigmoid_backward",
    "A fused layer",
    """∂C/∂a_prev, ∂C/∂w and ∂C/∂b of a = σ(w a_prev + b), from grad_a = ∂C/∂a, in one function.

    a is the output of the layer; z was not kept. The 1/N of the cost is in grad_a.""",
    arguments={
        "grad_a": ("N", "out"),
        "a_prev": ("N", "in"),
        "w": ("out", "in"),
        "a": ("N", "out"),
    },
    hidden={"b": ("out",)},
    derived={"a": lambda v: _z(v).sigmoid()},
    results={"grad_a_prev": ("N", "in"), "grad_w": ("out", "in"), "grad_b": ("out",)},
    right=lambda v: tuple(
        part[""](v)(v.grad_a * slope(v.a)) for part in (_GRAD_A_PREV, _GRAD_W, _GRAD_B)
    ),
    mistakes=combined(
        lambda grad_a, slope, *results: tuple(result(grad_a * slope) for result in results),
        {"": lambda v: v.grad_a, "the sign is wrong": lambda v: -v.grad_a},
        slopes(_z),
        _GRAD_A_PREV,
        _GRAD_W,
        _GRAD_B,
    ),
    where="manual_bp/layers/linear_sigmoid.py",
)


def _second(
    v: Values, up: Tensor, first: Tensor, factors: Tensor, second: Tensor, direct: Any, through: Any
) -> tuple[Tensor, ...]:
    """The four results.

    Args:
        v: The arguments.
        up: What v becomes on its way to δ, in by_grad_a.
        first: σ', in by_grad_a.
        factors: Those of σ'' in ∂S/∂z.
        second: σ''.
        direct: From δ, the term of by_w from the w that is written in δ w.
        through: From ∂S/∂z, the term of by_w from the w in z.
    """
    bent = factors * second
    by_w = direct(v.grad_a * slope(v.a)) + through(bent)
    return up * first, bent @ v.w, by_w, bent.sum(0)


_NOT_UP = "v meets {w} where {wt} belongs: v is like a change of a_prev, and goes up the layer"

_SECOND: tuple[Part, ...] = (
    {"": lambda v: v},
    {
        "": lambda v: v.v @ v.w.mT,
        _NOT_UP: lambda v: v.v @ v.w,
    },
    {
        "": lambda v: slope(v.a),
        "by_grad_a lacks the factor σ'(z)": lambda v: torch.ones_like(v.a),
        "grad_a is still in by_grad_a: S is linear in it": lambda v: v.grad_a * slope(v.a),
    },
    {
        "": lambda v: v.grad_a * (v.v @ v.w.mT),
        "the factor grad_a is missing where σ' is differentiated": lambda v: v.v @ v.w.mT,
        "v is missing where σ' is differentiated": lambda v: v.grad_a,
        _NOT_UP: lambda v: v.grad_a * (v.v @ v.w),
    },
    {
        "": lambda v: slope(v.a) * (1 - 2 * v.a),
        "a is taken as a constant: it depends on a_prev, w and b, and so does σ'(z)": (
            lambda v: torch.zeros_like(v.a)
        ),
        "the sign of σ'' is wrong: σ' grows for z below 0, so σ'' is positive there": (
            lambda v: slope(v.a) * (2 * v.a - 1)
        ),
        "σ' where σ'' belongs: σ' is to be differentiated by z once more": lambda v: slope(v.a),
        "1 − 2a is not all of σ'': that is the derivative of a (1 − a) by a, and the chain rule "
        "goes on to z": lambda v: 1 - 2 * v.a,
        "σ'² where σ'' belongs": lambda v: slope(v.a).square(),
    },
    {
        "": lambda v: lambda delta: delta.mT @ v.v,
        "by_w lacks a term of the product rule, the direct one: w is also written in δ w": (
            lambda _: lambda _: torch.zeros(())
        ),
        "a_prev where v belongs, in the direct term of by_w": (
            lambda v: lambda delta: delta.mT @ v.a_prev
        ),
    },
    {
        "": lambda v: lambda bent: bent.mT @ v.a_prev,
        "by_w lacks a term of the product rule: w also acts through a, in σ'(z)": (
            lambda _: lambda _: torch.zeros(())
        ),
        "v where a_prev belongs, in the term of by_w that comes through z": (
            lambda v: lambda bent: bent.mT @ v.v
        ),
    },
)

LINEAR_SIGMOID_SECOND = Exercise(
    "linear_sigmoid_second",
    "The second derivative of the fused layer",
    """The derivatives of S = Σ v ⊙ grad_a_prev by grad_a, a_prev, w and b.

    grad_a_prev is the first result of the last exercise, for one sample wᵀ δ with
    δ = grad_a ⊙ σ'(z); v is constant. Now a_prev, w and b count in two ways: where they are
    written, and through z, on which σ' depends. a = σ(z) is the output of the layer.""",
    arguments={
        "v": ("N", "in"),
        "grad_a": ("N", "out"),
        "a_prev": ("N", "in"),
        "w": ("out", "in"),
        "a": ("N", "out"),
    },
    hidden={"b": ("out",)},
    derived={"a": lambda v: _z(v).sigmoid()},
    results={
        "by_grad_a": ("N", "out"),
        "by_a_prev": ("N", "in"),
        "by_w": ("out", "in"),
        "by_b": ("out",),
    },
    right=lambda v: _second(*(part[""](v) for part in _SECOND)),
    mistakes=combined(_second, *_SECOND),
    where="manual_bp/layers/linear_sigmoid.py, which PyTorch differentiates twice",
)
