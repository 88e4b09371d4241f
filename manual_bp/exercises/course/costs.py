"""The cross-entropies, whose δ is simple and whose logarithms overflow."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.costs.sigmoid_cross_entropy import sigmoid_cross_entropy_cost
from manual_bp.costs.softmax_cross_entropy import softmax_cross_entropy_cost
from manual_bp.exercises._exercise import Exercise, Mistake, Part, Values, combined
from manual_bp.exercises.course.equations import far_out, means, residuals
from manual_bp.layers.sigmoid import sigmoid_prime as slope

_LOGARITHMS: Part = {
    "": lambda _: 1.0,
    "the minus of the cost is missing: logarithms of numbers below 1 are negative": lambda _: -1.0,
    "the logarithm has the base 2, and it must be the natural one": lambda _: 1 / math.log(2),
    "the logarithm has the base 10, and it must be the natural one": lambda _: 1 / math.log(10),
}


def _averages(components: str, called: str) -> Part:
    """The factor 1, and what averages would make of it."""
    return {
        "": lambda _: 1.0,
        "the cost is summed over the N = {N} samples, and it is their mean": (
            lambda v: v.sizes["N"]
        ),
        f"the cost is averaged over the {{{components}}} {called} too: C_x is their sum": (
            lambda v: 1 / v.sizes[components]
        ),
    }


def _pairs(
    both: Sequence[Mistake], costs: Sequence[Mistake], deltas: Sequence[Mistake]
) -> tuple[Mistake, ...]:
    """Mistakes in both results, and those in one of them alone."""
    of_costs = [Mistake(m.says, _beside_right(m, is_cost=True)) for m in costs]
    of_deltas = [Mistake(m.says, _beside_right(m, is_cost=False)) for m in deltas]
    return (*both, *of_costs, *of_deltas)


def _beside_right(mistake: Mistake, *, is_cost: bool) -> Callable[[Values], tuple[Tensor, Tensor]]:
    """What one mistake gives, and the other result as it is right."""

    def gives(v: Values) -> tuple[Tensor, Tensor]:
        found = mistake.gives(v)
        return (found, v.right.delta) if is_cost else (v.right.cost, found)

    return gives


def _both(components: str, called: str) -> list[Mistake]:
    return [
        Mistake(
            "the 1/N of the mean is missing in both results: C is the mean over the N = {N} "
            "samples",
            lambda v: (v.right.cost * v.sizes["N"], v.right.delta * v.sizes["N"]),
        ),
        Mistake(
            f"averaged over the {{{components}}} {called} too: only samples are averaged",
            lambda v: (v.right.cost / v.sizes[components], v.right.delta / v.sizes[components]),
        ),
    ]


def _product(*factors: Any) -> Any:
    return math.prod(factors[1:], start=factors[0])


def _of_activations(v: Values) -> Any:
    a = v.z.sigmoid()
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
    mistakes=_pairs(
        _both("out", "components"),
        combined(
            _product,
            {
                "": lambda v: sigmoid_cross_entropy_cost(v.z, v.y),
                "the term with 1 − y is missing in the cost: an output that should be 0 costs, "
                "too": lambda v: -(v.y * v.z.sigmoid().log()).sum(1).mean(),
                "ln a where ln(1 − a) belongs, in the term with 1 − y": (
                    lambda v: -v.z.sigmoid().log().sum(1).mean()
                ),
                "that is the quadratic cost": (
                    lambda v: (v.z.sigmoid() - v.y).square().sum(1).mean() / 2
                ),
                "right for moderate z, but for large ones a is rounded to 0 or 1, and log(0) is "
                "infinite: write the cost in terms of z, with ln(1 + e^(−|z|))": _of_activations,
            },
            _LOGARITHMS,
            _averages("out", "components"),
        ),
        combined(
            _product,
            residuals(lambda v: v.z, "the cross-entropy by z")
            | {
                "δ has only the term with y: the one with 1 − y is missing": (
                    lambda v: -v.y * (1 - v.z.sigmoid())
                ),
                "a softmax where the sigmoid belongs": lambda v: v.z.softmax(1) - v.y,
            },
            {
                "": lambda _: 1.0,
                "σ'(z) is still in δ: for the cross-entropy it cancels": (
                    lambda v: slope(v.z.sigmoid())
                ),
                "that is ∂C/∂a: δ is ∂C/∂z, which has the factor σ'(z) as well": (
                    lambda v: 1 / slope(v.z.sigmoid())
                ),
            },
            means("out", "components"),
        ),
    ),
    far=far_out,
    far_says="right for moderate z, but not for z = 1000 or z = −1000: write the cost in terms of "
    "z, with ln(1 + e^(−|z|)), which does not overflow, and δ without a division",
    where="manual_bp/costs/sigmoid_cross_entropy.py",
)


def _one_hot(v: Values) -> Tensor:
    return torch.eye(v.z.shape[1], dtype=v.z.dtype)[v.labels]


def _of_labels(v: Values, values: Tensor) -> Any:
    return values.gather(1, v.labels[:, None]).mean()


def _from(activations: Callable[[Tensor], Tensor]) -> Callable[[Values], tuple[Tensor, Tensor]]:
    """Both results, from other activations."""

    def gives(v: Values) -> tuple[Tensor, Tensor]:
        a = activations(v.z)
        return -_of_labels(v, a.log()), (a - _one_hot(v)) / len(a)

    return gives


def _ones_in_columns(v: Values) -> Tensor:
    a: Tensor = v.z.softmax(1)
    a[:, v.labels] -= 1
    return a


def _exponentials(z: Tensor, largest: Tensor | float = 0.0) -> Tensor:
    e = (z - largest).exp()
    return e / e.sum(1, keepdim=True)


def _spread_over_rows(z: Tensor) -> Tensor:
    """What broadcasting makes of sums without keepdims, if there are as many samples as classes."""
    e = z.exp()
    spread: Tensor = e / e.sum(1)
    return spread


def _rows_far_out(values: Values) -> None:
    """The z of one sample all large, those of the next all small."""
    values.z[0::2] += 1000
    values.z[1::2] -= 1000


_OVER_SAMPLES = (
    "the softmax runs over the samples, axis {over_samples}: it belongs to the classes, axis "
    "{over_neurons}"
)
_WHOLE_BATCH = "the softmax is normalised over the whole batch: each sample has a sum of its own"
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
    mistakes=_pairs(
        [
            *_both("K", "classes"),
            Mistake(_OVER_SAMPLES, _from(lambda z: z.softmax(0))),
            Mistake(_WHOLE_BATCH, _from(lambda z: z.exp() / z.exp().sum())),
            Mistake(
                "the sums over the classes meet the wrong axis: keepdims=True is missing",
                _from(_spread_over_rows),
            ),
            Mistake("the exponentials are not divided by their sum", _from(torch.exp)),
            Mistake(
                "the exponentials are not divided by their sum",
                _from(lambda z: (z - z.amax(1, keepdim=True)).exp()),
            ),
            Mistake(_SIGMOIDS, _from(torch.sigmoid)),
            Mistake(
                "right for moderate z, but the largest z of the whole batch is subtracted: each "
                "sample needs its own, or all its exponentials vanish",
                _from(lambda z: _exponentials(z, z.max())),
            ),
            Mistake(
                "right for moderate z, but e^z overflows for large ones: subtract each sample's "
                "own largest z first, which does not change a",
                _from(_exponentials),
            ),
        ],
        combined(
            _product,
            {
                "": lambda v: softmax_cross_entropy_cost(v.z, v.labels),
                "the cost takes the largest a of each sample: it is about a at the label": (
                    lambda v: -v.z.log_softmax(1).amax(1).mean()
                ),
                "the cost takes the labelled columns in every row: each sample has a label of its "
                "own, so index rows and labels in pairs": (
                    lambda v: -v.z.log_softmax(1)[:, v.labels].mean()
                ),
                "the logarithm is missing in the cost": lambda v: -_of_labels(v, v.z.softmax(1)),
                "the cost takes the logarithms of all classes: only that of the label counts": (
                    lambda v: -v.z.log_softmax(1).sum(1).mean()
                ),
            },
            _LOGARITHMS,
            _averages("K", "classes"),
        ),
        combined(
            _product,
            {
                "": lambda v: v.z.softmax(1) - _one_hot(v),
                "y is not subtracted: δ is a, less 1 at the class of the sample": (
                    lambda v: v.z.softmax(1)
                ),
                "y − a where a − y belongs in δ": lambda v: _one_hot(v) - v.z.softmax(1),
                "the Jacobian of the softmax is taken as diagonal: every z_j moves every a_k, so "
                "the whole sum of BP1 is needed": lambda v: -_one_hot(v) * (1 - v.z.softmax(1)),
                "1 is subtracted from the labelled columns in every row: each sample has a label "
                "of its own, so index rows and labels in pairs": _ones_in_columns,
                "the entry of the right class is replaced by −1, where 1 is to be subtracted from "
                "it": lambda v: torch.where(_one_hot(v) > 0, -1.0, v.z.softmax(1)),
                "the number of the class is subtracted: it is an index, of the entry from which 1 "
                "is subtracted": lambda v: v.z.softmax(1) - v.labels[:, None],
                "1 is subtracted before the exponentials: δ is a − y, not the softmax of z − y": (
                    lambda v: (v.z - _one_hot(v)).softmax(1)
                ),
                "that is ∂C/∂a: δ is ∂C/∂z": lambda v: -_one_hot(v) / v.z.softmax(1),
                _OVER_SAMPLES: lambda v: v.z.softmax(0) - _one_hot(v),
                _WHOLE_BATCH: lambda v: v.z.exp() / v.z.exp().sum() - _one_hot(v),
                _SIGMOIDS: lambda v: v.z.sigmoid() - _one_hot(v),
            },
            {
                "": lambda _: 1.0,
                "a (1 − a) is still in δ: for the cross-entropy it cancels": (
                    lambda v: slope(v.z.softmax(1))
                ),
            },
            means("K", "classes"),
        ),
    ),
    far=_rows_far_out,
    far_says="right for moderate z, but not if all z of a sample are near 1000 or −1000: subtract "
    "each sample's own largest z first, which does not change a",
    where="manual_bp/costs/softmax_cross_entropy.py",
)
