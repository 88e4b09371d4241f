"""A layer in one step, and the derivative of its backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Mistake, Values
from manual_bp.layers.sigmoid import sigmoid_prime as slope


def _backward(v: Values, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return delta @ v.w, delta.mT @ v.a_prev, delta.sum(0)


def _fused(
    says: str,
    *,
    a_prev: Callable[[Values], Tensor] = lambda v: v.right.grad_a_prev,
    w: Callable[[Values], Tensor] = lambda v: v.right.grad_w,
    b: Callable[[Values], Tensor] = lambda v: v.right.grad_b,
) -> Mistake:
    """A mistake in some of the three results."""
    return Mistake(says, lambda v: (a_prev(v), w(v), b(v)))


_NO_SLOPE = "∂C/∂a where δ = ∂C/∂a ⊙ σ'(z) belongs, in {}"
_AVERAGED = (
    "averaged over the {{N}} samples in {}, which is a sum (the 1/N of the cost is in grad_a)"
)

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
    derived={"a": lambda v: torch.sigmoid(v.a_prev @ v.w.mT + v.b)},
    results={"grad_a_prev": ("N", "in"), "grad_w": ("out", "in"), "grad_b": ("out",)},
    right=lambda v: _backward(v, v.grad_a * slope(v.a)),
    mistakes=(
        Mistake(
            "the factor σ'(z) is missing: that is the backward of the linear layer alone",
            lambda v: _backward(v, v.grad_a),
        ),
        Mistake(
            "σ' of a, not of z: a has been through σ already",
            lambda v: _backward(v, v.grad_a * slope(v.a.sigmoid())),
        ),
        Mistake("σ(z) where σ'(z) belongs", lambda v: _backward(v, v.grad_a * v.a)),
        _fused(
            _NO_SLOPE.format("BP3 and BP4"),
            w=lambda v: v.grad_a.mT @ v.a_prev,
            b=lambda v: v.grad_a.sum(0),
        ),
        _fused(_NO_SLOPE.format("BP3"), b=lambda v: v.grad_a.sum(0)),
        _fused(_NO_SLOPE.format("BP4"), w=lambda v: v.grad_a.mT @ v.a_prev),
        _fused(_NO_SLOPE.format("BP2"), a_prev=lambda v: v.grad_a @ v.w),
        _fused(
            "grad_a_prev has the σ' of the layer below as well: that is left to its own backward",
            a_prev=lambda v: v.right.grad_a_prev * slope(v.a_prev),
        ),
        _fused(
            _AVERAGED.format("BP3, and in BP4"),
            w=lambda v: v.right.grad_w / len(v.a),
            b=lambda v: v.right.grad_b / len(v.a),
        ),
        _fused(_AVERAGED.format("BP3"), b=lambda v: v.right.grad_b / len(v.a)),
        _fused(_AVERAGED.format("BP4"), w=lambda v: v.right.grad_w / len(v.a)),
        _fused(
            "{wt} where {w} belongs in BP2",
            a_prev=lambda v: (v.grad_a * slope(v.a)) @ v.w.mT,
        ),
        _fused("grad_w is transposed: it has the shape of w", w=lambda v: v.right.grad_w.mT),
        _fused("the sum over the samples is missing in BP3", b=lambda v: v.grad_a * slope(v.a)),
        _fused(
            "summed over the wrong axis in BP3: axis {over_samples} belongs to the samples",
            b=lambda v: (v.grad_a * slope(v.a)).sum(1),
        ),
    ),
    where="manual_bp/layers/linear_sigmoid.py",
)


def _second(
    v: Values,
    *,
    factor: Any = lambda a: slope(a) * (1 - 2 * a),
    u: Any = lambda v: v.v @ v.w.mT,
    direct: bool = True,
    through_a: bool = True,
) -> Any:
    """The four results, with one step done in another way.

    Args:
        v: The arguments.
        factor: σ'' from a.
        u: What v becomes on its way to δ.
        direct: Whether ∂S/∂w has the term from the w that is written in δ w.
        through_a: Whether it has the term from the w in z.
    """
    delta, up = v.grad_a * slope(v.a), u(v)
    curved = v.grad_a * up * factor(v.a)
    grad_w = torch.zeros_like(v.w)
    if direct:
        grad_w = grad_w + delta.mT @ v.v
    if through_a:
        grad_w = grad_w + curved.mT @ v.a_prev
    return up * slope(v.a), curved @ v.w, grad_w, curved.sum(0)


LINEAR_SIGMOID_SECOND = Exercise(
    "linear_sigmoid_second",
    "The second derivative of the fused layer",
    """The derivatives of S = Σ v ⊙ grad_a_prev by grad_a, a_prev, w and b.

    grad_a_prev = δ w with δ = grad_a ⊙ σ'(z), one sample a row, is the first result of the last
    exercise; v is constant. Now a_prev, w and b count in two ways: where they are written, and
    through z, on which σ' depends. a = σ(z) is the output of the layer.""",
    arguments={
        "v": ("N", "in"),
        "grad_a": ("N", "out"),
        "a_prev": ("N", "in"),
        "w": ("out", "in"),
        "a": ("N", "out"),
    },
    hidden={"b": ("out",)},
    derived={"a": lambda v: torch.sigmoid(v.a_prev @ v.w.mT + v.b)},
    results={
        "by_grad_a": ("N", "out"),
        "by_a_prev": ("N", "in"),
        "by_w": ("out", "in"),
        "by_b": ("out",),
    },
    right=_second,
    mistakes=(
        Mistake(
            "a is taken as a constant: it depends on a_prev, w and b, and so does σ'(z)",
            lambda v: _second(v, factor=torch.zeros_like),
        ),
        Mistake(
            "the sign of σ'' is wrong: σ is steepest at z = 0, so σ'' is negative beyond",
            lambda v: _second(v, factor=lambda a: slope(a) * (2 * a - 1)),
        ),
        Mistake(
            "σ' where σ'' belongs: σ' is to be differentiated by z once more",
            lambda v: _second(v, factor=slope),
        ),
        Mistake(
            "1 − 2a is not all of σ'': that is the derivative of a (1 − a) by a, and the chain "
            "rule goes on to z",
            lambda v: _second(v, factor=lambda a: 1 - 2 * a),
        ),
        Mistake(
            "by_w lacks a term of the product rule, the direct one: w is also written in δ w",
            lambda v: _second(v, direct=False),
        ),
        Mistake(
            "by_w lacks a term of the product rule: w also acts through a, in σ'(z)",
            lambda v: _second(v, through_a=False),
        ),
        Mistake(
            "v meets {w} where {wt} belongs: v is like an error of a_prev, and goes up the layer",
            lambda v: _second(v, u=lambda v: v.v @ v.w),
        ),
        Mistake(
            "the sum over the samples is missing in by_b",
            lambda v: (*_second(v)[:3], v.grad_a * (v.v @ v.w.mT) * slope(v.a) * (1 - 2 * v.a)),
        ),
    ),
    where="manual_bp/layers/linear_sigmoid.py, which PyTorch differentiates twice",
)
