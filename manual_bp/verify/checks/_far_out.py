"""Samples that are so large that functions saturate."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch

from manual_bp.verify._autograd import leaves, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Sample
from manual_bp.verify._context import CheckContext

LARGE = (30.0, 1e4)  # times the sample


def scaled(sample: Sample, i: int, factor: float) -> Sample:
    """The sample with one argument multiplied by a factor."""
    return tuple(factor * t if j == i else t for j, t in enumerate(sample))


def far_out(
    ctx: CheckContext, sample: Sample, factors: Sequence[float] = LARGE
) -> Iterator[tuple[int, Sample, str]]:
    """Samples with one large argument where the call has finite values.

    Those are left out whose squares the dtype cannot hold: right formulas may overflow there.

    Returns:
        The position of the large argument, the sample, and what messages call it.
    """
    for factor, i in product(factors, positions(sample)):
        arguments = ctx.in_domain(scaled(sample, i, factor))
        if largest(arguments[i]) > math.sqrt(torch.finfo(sample[i].dtype).max):
            continue
        try:
            values = outputs_of(ctx.call(*leaves(arguments, ())))
        except Exception:
            continue  # refused
        if all(t.isfinite().all() for t in values):
            yield i, arguments, f" at {factor:g} times {ctx.label(i)}"
