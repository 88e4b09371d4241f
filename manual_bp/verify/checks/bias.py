"""Errors of half precision that do not average out."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    gradients_of,
    leaves,
    outputs_of,
    positions,
    tangents_of,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import exact, narrowest, widen, widened

# A ratio, and the size of what it was measured at: where a sum cancels, it says little.
Weighted = tuple[float, float]

_FEWEST_DRAWS = 8
_MOST_DRAWS = 64
_SECONDS = 4


@check(builds_on=SLOPE)
def unbiased(ctx: CheckContext, sample: Sample) -> None:
    """In half precision, rounding hides an error of 1 %. On average over many draws it shows."""
    low = narrowest(sample)
    if low is None or torch.finfo(low).eps < torch.finfo(torch.float16).eps:
        raise NotApplicable("every comparison finds such an error in float32 and float64")
    ratios = _Ratios(ctx, sample, torch.finfo(low).eps)
    started = time.monotonic()
    for draw in range(_MOST_DRAWS):
        is_late = time.monotonic() - started > _SECONDS
        if draw >= _FEWEST_DRAWS and (is_late or ratios.are_known()):
            break
        ratios.draw(draw)
    ratios.judge()


class _Ratios:
    """How large outputs and gradients are, in units of the exact ones, over many draws."""

    def __init__(self, ctx: CheckContext, sample: Sample, eps: float) -> None:
        self.ctx, self.sample, self.eps = ctx, sample, eps
        self.ours: dict[str, list[Weighted]] = defaultdict(list)
        self.theirs: dict[str, list[Weighted]] = defaultdict(list)

    def draw(self, number: int) -> None:
        """Measure at a new sample. In turn, each argument has a large gradient."""
        reference = self.ctx.reference
        arguments = self._sample()
        places = positions(arguments)
        try:
            reference(*leaves(widened(arguments), ()))
        except Exception:
            return  # out of the domain
        variables = leaves(arguments)
        result = self.ctx.call(*variables)
        upstream = self._upstream(arguments, places[number % len(places)], outputs_of(result))
        found = gradients_of(result, variables, upstream)
        right, expected = exact(reference, arguments, upstream)
        self._add(self.ours, result, found, right, expected)
        try:
            peers = leaves(arguments)
            peer = reference(*peers)
            peer_gradients = gradients_of(peer, peers, upstream)
        except Exception:
            return  # the reference does not run in this dtype
        self._add(self.theirs, peer, peer_gradients, right, expected)

    def are_known(self) -> bool:
        """Whether each average is known to better than half an eps."""
        return all(self._allowed(name) - self.ctx.case.rtol < self.eps for name in self.ours)

    def judge(self) -> None:
        """Raise a Mismatch for an average that is not 1."""
        for name, ratios in self.ours.items():
            self.ctx.comparisons += 1
            mean, allowed = _mean(ratios), self._allowed(name)
            if abs(mean - 1) > allowed:
                raise Mismatch(
                    f"{name}, on average over {len(ratios)} draws: expected 1 ± {allowed:.2g} "
                    f"times the exact one, got {mean:.5g} times\n"
                    f"diagnosis: {mean:.4g} times the right one, everywhere"
                )
            if allowed > 1.2 * self.eps:
                self.ctx.notes.append(f"the {name} is known to {100 * allowed:.2g} % only")

    def _allowed(self, name: str) -> float:
        allowed = self.eps / 2 + self.ctx.case.rtol + 5 * _standard_error(self.ours[name])
        if theirs := self.theirs.get(name):
            known = abs(_mean(theirs) - 1) - 2 * _standard_error(theirs)
            allowed += 2 * max(known, 0.0)
        return allowed

    def _sample(self) -> Sample:
        """Another sample like this one. Values that were not drawn anew are moved a little."""
        ctx = self.ctx
        dtypes = ctx.dtypes_of(self.sample)
        drawn = ctx.draw(dtypes)
        place = next(i for i, other in enumerate(ctx.samples) if other is self.sample)
        new = drawn[place % len(drawn)]
        if any(
            not torch.equal(one, other)
            for one, other in zip(new, self.sample, strict=True)
            if is_differentiable(one) and one.shape == other.shape
        ):
            return new
        moved = tuple(
            (t * (1 + 0.05 * ctx.random_like(t).clamp(-2, 2))).to(t.dtype)
            if is_differentiable(t)
            else t
            for t in new
        )
        return ctx.in_domain(moved)

    def _upstream(self, arguments: Sample, place: int, outputs: Sequence[Tensor]) -> list[Tensor]:
        """An upstream gradient for which sums in the gradient of an argument do not cancel."""
        random = [self.ctx.random_like(t) for t in outputs]
        wide = widened(arguments)
        try:
            moved = {place: widen(self.ctx.random_like(arguments[place]))}
            along = tangents_of(self.ctx.reference, wide, moved)
        except Exception:
            return random
        return [
            u
            if t is None
            else (t / (float(t.norm()) or 1.0) * math.sqrt(t.numel()) + u / 2).to(u.dtype)
            for u, t in zip(random, along, strict=True)
        ]

    def _add(
        self, to: dict[str, list[Weighted]], got: Any, slopes: Any, right: Any, expected: Any
    ) -> None:
        outputs, exact_outputs = outputs_of(got), outputs_of(right)
        pairs = {
            "output" if len(outputs) == 1 else f"output {j}": pair
            for j, pair in enumerate(zip(outputs, exact_outputs, strict=False))
        }
        pairs |= {f"gradient of {self.ctx.label(i)}": (slopes[i], g) for i, g in expected.items()}
        for name, (one, other) in pairs.items():
            if one is None or other is None or one.shape != other.shape or other.is_complex():
                continue
            x, y = other.detach().flatten(), widen(one).flatten()
            size = float(x @ x)
            if math.isfinite(size) and size and y.isfinite().all():
                to[name].append((float(x @ y) / size, size))


def _mean(values: Sequence[Weighted]) -> float:
    return sum(v * weight for v, weight in values) / sum(weight for _, weight in values)


def _standard_error(values: Sequence[Weighted]) -> float:
    mean = _mean(values)
    spread = math.sqrt(sum((weight * (v - mean)) ** 2 for v, weight in values))
    return spread / sum(weight for _, weight in values)
