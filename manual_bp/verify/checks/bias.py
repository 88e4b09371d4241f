"""Errors of half precision that do not average out."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
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

# A number, and the size of what it was measured at: where a sum cancels, it says little.
Weighted = tuple[float, float]

_FEWEST_DRAWS = 8
_MOST_DRAWS = 160
_SECONDS = 4
# How much larger than rounding an error must be that all elements along a dimension share, and how
# many elements there must be.
_TIMES = 3
_LONG = 16
# How far off an element of a gradient is, in units of its roundoff, if the sample may be at a kink.
_FAR = 2


@check(builds_on=SLOPE)
def unbiased(ctx: CheckContext, sample: Sample) -> None:
    """Rounding to half precision hides a small factor or offset. Many draws together show it."""
    low = narrowest(sample)
    if low is None or torch.finfo(low).eps < torch.finfo(torch.float16).eps:
        raise NotApplicable("every comparison finds such an error in float32 and float64")
    draws = _Draws(ctx, sample, torch.finfo(low).eps)
    started = time.monotonic()
    for draw in range(_MOST_DRAWS):
        is_late = time.monotonic() - started > _SECONDS
        if draw >= _FEWEST_DRAWS and (is_late or draws.are_known()):
            break
        draws.draw(draw)
    draws.judge()


class _Errors:
    """What is known of the errors of outputs and gradients, by their names.

    ratios: How large they are, in units of the exact ones.
    offsets: The mean of all elements' errors, in units of the exact elements' root mean square.
    shared: By name and dimension, the mean square error of what all elements along the dimension
        are multiplied by, apart from what the whole tensor is, and what it would be if only the
        exact elements were rounded.
    """

    def __init__(self) -> None:
        self.ratios: dict[str, list[Weighted]] = defaultdict(list)
        self.offsets: dict[str, list[Weighted]] = defaultdict(list)
        self.shared: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)

    def add(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Measure one more output or gradient."""
        x, error = expected.detach(), widen(got).detach() - expected.detach()
        size = float(x.square().sum())
        if not (math.isfinite(size) and size and error.isfinite().all()):
            return
        factor = float((x * error).sum()) / size
        self.ratios[name].append((1 + factor, size))
        rms = math.sqrt(size / x.numel())
        self.offsets[name].append((float(error.mean()) / rms, rms))
        rounded = x.to(got.dtype).to(x.dtype) - x
        # A number that all elements share, such as 1/N in a mean, is often rounded once.
        error = error - factor * x
        for dim in range(x.ndim) if x.ndim > 1 else ():
            if x.shape[dim] >= _LONG:
                pair = (_shared_error(x, error, dim), _shared_error(x, rounded, dim))
                self.shared[name, dim].append(pair)


class _Draws:
    """The errors of a candidate and of its reference, over many draws of a sample."""

    def __init__(self, ctx: CheckContext, sample: Sample, eps: float) -> None:
        self.ctx, self.sample, self.eps = ctx, sample, eps
        self.ours, self.theirs = _Errors(), _Errors()

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
        if self._is_far(found, expected) and self.ctx.is_at_kink(arguments, upstream):
            return  # at a kink, rounding decides which gradient is found
        self._add(self.ours, result, found, right, expected)
        try:
            peers = leaves(arguments)
            peer = reference(*peers)
            peer_gradients = gradients_of(peer, peers, upstream)
        except Exception:
            return  # the reference does not run in this dtype
        self._add(self.theirs, peer, peer_gradients, right, expected)

    def _is_far(self, found: Gradients, expected: Gradients) -> bool:
        """Whether an element is off by more than rounding explains, unless a sum cancels in it."""
        for i, right in expected.items():
            one = found[i]
            if one is None or right is None or one.shape != right.shape or not right.numel():
                continue
            size = right.abs() + right.abs().max() / 16
            if ((widen(one) - right).abs() > _FAR * self.eps * size).any():
                return True
        return False

    def are_known(self) -> bool:
        """Whether each average ratio is known well enough to tell 1 % in bfloat16 from nothing."""
        ours, theirs = self.ours.ratios, self.theirs.ratios
        most = 0.8 * self.eps + self.ctx.case.rtol
        return all(self._allowed(ours[name], theirs.get(name), 1) < most for name in ours)

    def judge(self) -> None:
        """Raise a Mismatch for an error that does not average out."""
        for name in self.ours.ratios:
            self.ctx.comparisons += 1
            self._judge_ratio(name)
            self._judge_offset(name)
        for name, dim in self.ours.shared:
            self._judge_shared(name, dim)

    def _judge_ratio(self, name: str) -> None:
        ratios = self.ours.ratios[name]
        mean, allowed = _mean(ratios), self._allowed(ratios, self.theirs.ratios.get(name), 1)
        if abs(mean - 1) > allowed:
            raise Mismatch(
                f"{name}, on average over {len(ratios)} draws: expected 1 ± {allowed:.2g} "
                f"times the exact one, got {mean:.5g} times\n"
                f"diagnosis: {mean:.4g} times the right one, everywhere"
            )
        if allowed > 1.2 * self.eps:
            self.ctx.notes.append(f"the {name} is known to {100 * allowed:.2g} % only")

    def _judge_offset(self, name: str) -> None:
        offsets = self.ours.offsets[name]
        mean, allowed = _mean(offsets), self._allowed(offsets, self.theirs.offsets.get(name), 0)
        if abs(mean) > allowed:
            raise Mismatch(
                f"{name}, the mean of all elements over {len(offsets)} draws: expected the exact "
                f"one ± {allowed:.2g} of the elements' root mean square, got it {mean:+.2g}\n"
                f"diagnosis: the same amount is added to every element"
            )

    def _judge_shared(self, name: str, dim: int) -> None:
        """Several times as much as rounding the elements one by one would give is too much."""
        errors = self.ours.shared[name, dim]
        theirs = [error for error, _ in self.theirs.shared.get((name, dim), ())]
        ours, rounded = (
            math.sqrt(sum(column) / len(errors)) for column in zip(*errors, strict=True)
        )
        usual = max(rounded, math.sqrt(sum(theirs) / len(theirs)) if theirs else math.inf)
        allowed = _TIMES * usual + self.ctx.case.rtol
        if ours > allowed:
            raise Mismatch(
                f"{name}: expected its elements along dimension {dim} to be off by a common factor "
                f"of 1 ± {allowed:.2g} at most, got 1 ± {ours:.2g}\n"
                f"diagnosis: what they share, such as a mean or a norm, was rounded too early"
            )

    def _allowed(
        self, ours: Sequence[Weighted], theirs: Sequence[Weighted] | None, right: float
    ) -> float:
        allowed = self.eps / (2 if right else 4) + self.ctx.case.rtol + 5 * _standard_error(ours)
        if theirs:
            known = abs(_mean(theirs) - right) - 2 * _standard_error(theirs)
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

    def _add(self, to: _Errors, got: Any, slopes: Any, right: Any, expected: Any) -> None:
        outputs, exact_outputs = outputs_of(got), outputs_of(right)
        pairs = {
            "output" if len(outputs) == 1 else f"output {j}": pair
            for j, pair in enumerate(zip(outputs, exact_outputs, strict=False))
        }
        pairs |= {f"gradient of {self.ctx.label(i)}": (slopes[i], g) for i, g in expected.items()}
        for name, (one, other) in pairs.items():
            if one is None or other is None or one.shape != other.shape or other.is_complex():
                continue
            to.add(name, one, other)


def _shared_error(expected: Tensor, error: Tensor, dim: int) -> float:
    """The mean square of the factors, less 1, that fit best along a dimension."""
    sizes = expected.square().sum(dim)
    fits = torch.where(sizes > 0, (expected * error).sum(dim) / sizes, 0.0)
    return float((sizes * fits.square()).sum() / sizes.sum())


def _mean(values: Sequence[Weighted]) -> float:
    return sum(v * weight for v, weight in values) / sum(weight for _, weight in values)


def _standard_error(values: Sequence[Weighted]) -> float:
    mean = _mean(values)
    spread = math.sqrt(sum((weight * (v - mean)) ** 2 for v, weight in values))
    return spread / sum(weight for _, weight in values)
