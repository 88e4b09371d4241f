"""How exact a gradient can be: whether rounding explains that two differ."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from manual_bp.verify._autograd import gradients, leaves, outputs_of
from manual_bp.verify._budget import exact_budget, largest
from manual_bp.verify._case import Call, Sample, is_differentiable

Upstream = Sequence[Tensor]


def is_rounding(
    reference: Call,
    sample: Sample,
    i: int,
    upstreams: Sequence[Upstream],
    got: Tensor | None,
    expected: Tensor | None,
) -> bool:
    """Whether two gradients of argument i differ by no more than the reference's is rounded.

    upstreams: Several of usual size. Those of the two gradients may be smaller.
    """
    some = got if got is not None else expected
    if some is None:
        return True
    got, expected = (torch.zeros_like(some) if t is None else t for t in (got, expected))

    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False

    def gradient(upstream: Upstream, arguments: Sample = sample) -> Tensor:
        found = gradients(reference, leaves(arguments), upstream)[1][i]
        return torch.zeros_like(some) if found is None else found

    eps = torch.finfo(some.dtype).eps
    usual, error = largest(gradient(upstreams[0])), _error(gradient, sample, upstreams)
    outputs = largest(*outputs_of(reference(*leaves(sample))))
    terms = largest(*upstreams[0]) * outputs / (largest(sample[i]) or 1.0)
    if usual <= 100 * max(error, eps * terms):  # nothing is left but rounding
        scale = max(error / eps, terms)
    else:
        scale = error / eps * min(1.0, largest(got, expected) / usual)
    is_wrong = exact_budget(expected, some.new_tensor([scale])).wrong(got, expected)
    return not is_wrong.any()


def _error(gradient: Callable[..., Tensor], sample: Sample, upstreams: Sequence[Upstream]) -> float:
    """An estimate of the error of a gradient; 0 if it is not the same twice.

    By how much it is not linear in the upstream gradient, as it would be without rounding, and by
    how much it changes if all arguments change by a few units in the last place. It may jump on one
    side of the sample, so the side counts on which it changes less.
    """
    each = [gradient(upstream) for upstream in upstreams]
    if largest(each[0] - gradient(upstreams[0])):
        return 0.0
    defects = []
    for i, j in combinations(range(len(each)), 2):
        for_both = gradient([u + v for u, v in zip(upstreams[i], upstreams[j], strict=True)])
        defects.append(largest(for_both - each[i] - each[j]))
    # By one factor: elements that are equal, or 0, stay so.
    moved = [gradient(upstreams[0], _scaled(sample, units)) for units in (4, -4)]
    return max(*defects, min(largest(g - each[0]) for g in moved))


def _scaled(sample: Sample, units: int) -> Sample:
    return tuple(
        t * (1 + units * torch.finfo(t.dtype).eps) if is_differentiable(t) else t for t in sample
    )
