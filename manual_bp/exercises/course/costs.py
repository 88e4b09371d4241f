"""The cross-entropies, whose δ is simple and whose logarithms overflow."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp.costs.sigmoid_cross_entropy import sigmoid_cross_entropy_cost
from manual_bp.costs.softmax_cross_entropy import softmax_cross_entropy_cost
from manual_bp.exercises._exercise import Exercise, Mistake, Values
from manual_bp.exercises.course.equations import far_out
from manual_bp.layers.sigmoid import sigmoid_prime as slope

Pair = tuple[Tensor, Tensor]


def _cost(says: str, cost: Callable[[Values], Tensor]) -> Mistake:
    """A mistake in the cost alone."""
    return Mistake(says, lambda v: (cost(v), v.right.delta))


def _delta(says: str, delta: Callable[[Values], Tensor]) -> Mistake:
    """A mistake in δ alone."""
    return Mistake(says, lambda v: (v.right.cost, delta(v)))


_OF_BOTH = (
    _delta(
        "the 1/N of the mean is missing in δ: C is the mean over the N = {N} samples",
        lambda v: v.right.delta * len(v.z),
    ),
    _cost(
        "the cost is summed over the {N} samples, and it is their mean",
        lambda v: v.right.cost * len(v.z),
    ),
    Mistake(
        "the 1/N of the mean is missing in both results: C is the mean over the N = {N} samples",
        lambda v: (v.right.cost * len(v.z), v.right.delta * len(v.z)),
    ),
    _delta(
        "δ is divided by N = {N} twice",
        lambda v: v.right.delta / len(v.z),
    ),
    _delta("y − a where a − y belongs in δ", lambda v: -v.right.delta),
    _cost(
        "the minus of the cost is missing: logarithms of numbers below 1 are negative",
        lambda v: -v.right.cost,
    ),
    *(
        _cost(
            f"the logarithm has the base {base}, and it must be the natural one",
            lambda v, base=base: v.right.cost / math.log(base),
        )
        for base in (2, 10)
    ),
)


def _logs(v: Values, a: Tensor) -> Tensor:
    return -(v.y * a.log() + (1 - v.y) * (1 - a).log()).sum(1).mean()


CROSS_ENTROPY = Exercise(
    "cross_entropy",
    "The cross-entropy of sigmoid outputs",
    """C and δ = ∂C/∂z, for a = σ(z).

    C is the mean over the N samples of C_x = −Σ_j (y_j ln a_j + (1 − y_j) ln(1 − a_j)). Both must
    be right for z = 1000 and z = −1000, too, where a is rounded to 1 or 0.""",
    arguments={"z": ("N", "out"), "y": ("N", "out")},
    results={"cost": (), "delta": ("N", "out")},
    derived={"y": lambda v: v.y.sigmoid().mul(10).round() / 10},
    right=lambda v: (sigmoid_cross_entropy_cost(v.z, v.y), (v.z.sigmoid() - v.y) / len(v.z)),
    mistakes=(
        *_OF_BOTH,
        _delta(
            "σ'(z) is still in δ: for the cross-entropy it cancels",
            lambda v: v.right.delta * slope(v.z.sigmoid()),
        ),
        Mistake(
            "averaged over the {out} components too: C_x is their sum, and only samples are "
            "averaged",
            lambda v: (v.right.cost / v.z.shape[1], v.right.delta / v.z.shape[1]),
        ),
        _cost(
            "the cost is averaged over the {out} components too: C_x is their sum",
            lambda v: v.right.cost / v.z.shape[1],
        ),
        _cost(
            "the term with 1 − y is missing in the cost: an output that should be 0 costs, too",
            lambda v: -(v.y * v.z.sigmoid().log()).sum(1).mean(),
        ),
        _delta(
            "that is ∂C/∂a: δ is ∂C/∂z, which has the factor σ'(z) as well",
            lambda v: v.right.delta / slope(v.z.sigmoid()),
        ),
        _delta(
            "δ has only the term with y: the one with 1 − y is missing",
            lambda v: -v.y * (1 - v.z.sigmoid()) / len(v.z),
        ),
        _delta(
            "a softmax where the sigmoid belongs",
            lambda v: (v.z.softmax(1) - v.y) / len(v.z),
        ),
        _cost(
            "right for moderate z, but for large ones a is rounded to 0 or 1, and log(0) is "
            "infinite: write the cost in terms of z, with ln(1 + e^(−|z|))",
            lambda v: _logs(v, v.z.sigmoid()),
        ),
    ),
    far=far_out,
    far_says="right for moderate z, but not for z = 1000 or z = −1000: write the cost in terms of "
    "z, with ln(1 + e^(−|z|)), which does not overflow",
    where="manual_bp/costs/sigmoid_cross_entropy.py",
)


def _one_hot(v: Values) -> Tensor:
    return torch.eye(v.z.shape[1], dtype=v.z.dtype)[v.labels]


def _from(activations: Callable[[Tensor], Tensor]) -> Callable[[Values], Pair]:
    """Both results, from other activations."""

    def gives(v: Values) -> Pair:
        a = activations(v.z)
        of_labels = a.gather(1, v.labels[:, None])
        return -of_labels.log().mean(), (a - _one_hot(v)) / len(a)

    return gives


def _ones_in_columns(v: Values) -> Tensor:
    a = v.z.softmax(1)
    a[:, v.labels] -= 1
    return a / len(a)


def _replaced(v: Values) -> Tensor:
    return torch.where(_one_hot(v) > 0, -1.0, v.z.softmax(1)) / len(v.z)


def _exponentials(z: Tensor, largest: Tensor | float = 0.0) -> Tensor:
    e = (z - largest).exp()
    return e / e.sum(1, keepdim=True)


def _rows_far_out(values: Values) -> None:
    """The z of one sample all large, those of the next all small."""
    values.z[0::2] += 1000
    values.z[1::2] -= 1000


_OVER_SAMPLES = (
    "the softmax runs over the samples, axis {over_samples}: it belongs to the classes, axis "
    "{over_neurons}"
)
_SIGMOIDS = "sigmoids where the softmax belongs"

SOFTMAX_CROSS_ENTROPY = Exercise(
    "softmax_cross_entropy",
    "Softmax with cross-entropy",
    """C and δ = ∂C/∂z, for the softmax a_k = e^(z_k) / Σ_m e^(z_m) over the K classes of a sample.

    C is the mean over the N samples of −ln a_c, where c is the sample's class: labels holds one
    index for each sample. Both must be right if all z of a sample are near 1000 or −1000, too.""",
    arguments={"z": ("N", "K"), "labels": ("N",)},
    results={"cost": (), "delta": ("N", "K")},
    derived={"labels": lambda v: (v.labels.abs() * 10).long() % v.z.shape[1]},
    right=lambda v: (
        softmax_cross_entropy_cost(v.z, v.labels),
        (v.z.softmax(1) - _one_hot(v)) / len(v.z),
    ),
    mistakes=(
        *_OF_BOTH,
        _delta(
            "y is not subtracted: δ is a, less 1 at the class of the sample",
            lambda v: v.z.softmax(1) / len(v.z),
        ),
        _delta(
            "a (1 − a) is still in δ: for the cross-entropy it cancels",
            lambda v: v.right.delta * slope(v.z.softmax(1)),
        ),
        _delta(
            "the Jacobian of the softmax is taken as diagonal: every z_j moves every a_k, so the "
            "whole sum of BP1 is needed",
            lambda v: -_one_hot(v) * (1 - v.z.softmax(1)) / len(v.z),
        ),
        _delta(
            "1 is subtracted from the labelled columns in every row: each sample has a label of "
            "its own, so index rows and labels in pairs",
            _ones_in_columns,
        ),
        _delta(
            "the entry of the right class is replaced by −1, where 1 is to be subtracted from it",
            _replaced,
        ),
        _delta(
            "1 is subtracted before the exponentials: δ is a − y, not the softmax of z − y",
            lambda v: (v.z - _one_hot(v)).softmax(1) / len(v.z),
        ),
        _delta("that is ∂C/∂a: δ is ∂C/∂z", lambda v: -_one_hot(v) / v.z.softmax(1) / len(v.z)),
        Mistake(_OVER_SAMPLES, _from(lambda z: z.softmax(0))),
        _delta(_OVER_SAMPLES, lambda v: (v.z.softmax(0) - _one_hot(v)) / len(v.z)),
        Mistake(
            "the softmax is normalised over the whole batch: each sample has a sum of its own",
            _from(lambda z: z.exp() / z.exp().sum()),
        ),
        Mistake(_SIGMOIDS, _from(torch.sigmoid)),
        _delta(_SIGMOIDS, lambda v: (v.z.sigmoid() - _one_hot(v)) / len(v.z)),
        _delta(
            "δ is averaged over the {K} classes too: only samples are averaged",
            lambda v: v.right.delta / v.z.shape[1],
        ),
        Mistake(
            "right for moderate z, but the largest z of the whole batch is subtracted: each "
            "sample needs its own, or all its exponentials vanish",
            _from(lambda z: _exponentials(z, z.max())),
        ),
        Mistake(
            "right for moderate z, but e^z overflows for large ones: subtract each sample's own "
            "largest z first, which does not change a",
            _from(_exponentials),
        ),
    ),
    far=_rows_far_out,
    far_says="right for moderate z, but not if all z of a sample are near 1000 or −1000: subtract "
    "each sample's own largest z first, which does not change a",
    where="manual_bp/costs/softmax_cross_entropy.py",
)
