"""Slopes by finite differences: of values, and of derivatives."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from manual_bp.verify._budget import largest
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._precision import widen

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Slope:
    """The slope along a direction, as a derivative has it and by finite differences.

    what: What moves, for messages.
    claimed: The slope according to the derivative.
    measured: The difference quotient.
    allowed: How far they may differ.
    jumps: Whether there is no slope, since those on the two sides differ, since the value jumps, or
        since it is lost in rounding.
    """

    what: str
    claimed: float
    measured: float
    allowed: float
    jumps: bool

    @property
    def agrees(self) -> bool:
        """Whether the derivative is the slope."""
        return self._is_near(self.claimed)

    def measures_the_same_as(self, other: "Slope") -> bool:
        """Whether two calls have the same slope by finite differences."""
        return self._is_near(other.measured)

    @property
    def has_quotient(self) -> bool:
        """Whether there is a difference quotient: no step leaves the domain."""
        return math.isfinite(self.measured)

    def require(self, derivative: str) -> None:
        """Raise a Mismatch unless the derivative is the slope."""
        if not self.agrees:
            ratio = f", ratio {self.claimed / self.measured:.6g}" if self.measured else ""
            raise Mismatch(
                f"{derivative} along a direction of {self.what}: expected {self.measured:.10g} by "
                f"finite differences, got {self.claimed:.10g}{ratio}"
            )

    def _is_near(self, slope: float) -> bool:
        return abs(slope - self.measured) <= self.allowed


def slope(
    what: str,
    terms: Callable[[float], Tensor],
    claimed: Sequence[Tensor],
    step: float,
    *,
    eps: float = _EPS,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> Slope:
    """Measure a slope.

    Args:
        what: What moves.
        terms: The terms whose sum is the value, after a shift of so many times the direction.
        claimed: Terms whose sum is the slope according to the derivative.
        step: The largest shift, of `step_for`.
        eps: The rounding error of the terms, relative to each.
        rtol: How far the derivative may be from the slope, relative to its terms, besides rounding.
        atol: The same, absolute.
    """
    here, parts = terms(0.0), torch.cat(list(claimed))
    is_low = eps > _EPS
    kink, base = (2 * eps ** (1 / 3), 3 * eps ** (2 / 3)) if is_low else (1e-3, 1e-6)
    rounding = max(1e-9 * here.abs().sum().item(), 4 * eps * here.norm().item() / step) + 1e-9

    def measure(step: float) -> Slope:
        # A sum of the differences loses fewer digits than the difference of the sums.
        right, left = (terms(step) - here).sum().item(), (here - terms(-step)).sum().item()
        measured, jump = (right + left) / (2 * step), abs(right - left) / step
        size = parts.abs().nan_to_num(0, 0).sum().item() + abs(measured)
        allowed = (base + rtol) * size + rounding + atol + (jump / 2 if is_low else 0.0)
        jumps = not jump <= kink * size + 1e3 * rounding
        return Slope(what, parts.sum().item(), measured, allowed, jumps)

    def quotients(step: float) -> Tensor:
        return (terms(step) - terms(-step)) / (2 * step)

    first = measure(step)
    if is_low and first.allowed > (parts.abs().sum() + quotients(step).abs().sum()).item() / 2 > 0:
        return replace(first, jumps=True)  # no derivative would be found to be wrong
    if first.agrees or first.jumps:
        return first
    half = measure(step / 2)
    apart = abs(first.measured - half.measured)
    # Where the value jumps, the quotient depends on the step. Near a pole it is not the slope yet,
    # and half the step tells how far it is from it.
    is_steady = apart <= 1e3 * max(first.allowed, half.allowed)
    if is_low:  # rounding may hide the slope, or the step be too long for it
        long, short = quotients(step), quotients(step / 2)
        spread, size = (long - short).abs().sum().item(), short.abs().sum().item()
        apart += (long - short).norm().item()
        is_steady = spread <= size / 4 + rounding
    return replace(half, allowed=2 * first.allowed + apart, jumps=not is_steady)


def step_for(moved: Iterable[Tensor], eps: float = _EPS) -> float:
    """A step that suits the size of what moves.

    In a low precision it balances rounding, eps / step, and curvature, step².
    """
    return (eps ** (1 / 3) if eps > _EPS else 1e-6) * max(1.0, largest(*moved))


def steps_for(moved: Tensor, eps: float = _EPS) -> list[float]:
    """Steps to try until one has a slope.

    The usual one is too long if what moves is small, or if the value changes over much less than
    its size.
    """
    usual, size = step_for([moved], eps), largest(moved)
    relative = [usual * size] if 0 < size < 1 else []
    return [usual, *relative, *(usual / 8**k for k in (1, 2, 3) if eps > _EPS)]


def inner(one: Tensor | None, other: Tensor) -> Tensor:
    """The terms of the real inner product <one, other> in float64; None counts as zero."""
    other = widen(other)
    terms = torch.zeros_like(other.real) if one is None else (widen(one).conj() * other).real
    return terms.flatten()


def supported(
    ours: Sequence[Slope] | None, theirs: Sequence[Slope]
) -> Literal["call", "reference", ""]:
    """Which of two different derivatives has the slopes right; empty if that does not decide.

    Args:
        ours: The slopes of the call; None if its precision is too low for finite differences.
        theirs: The slopes of the reference. They must be the same, as they are if the derivatives
            of one order less agree.
    """
    if ours is None:
        return "reference" if all(s.agrees or s.jumps for s in theirs) else "call"
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not (a.jumps or b.jumps)]
    if not all(a.measures_the_same_as(b) for a, b in pairs):
        return ""
    is_right = all(one.agrees for one, _ in pairs)
    if is_right == all(other.agrees for _, other in pairs):
        return ""
    return "call" if is_right else "reference"


def fault_of_reference(derivative: str, theirs: Sequence[Slope]) -> str:
    """What is wrong with the reference, if finite differences support the call."""
    wrong = next(s for s in theirs if not (s.agrees or s.jumps))
    return (
        f"the reference's {derivative} is wrong: along a direction of {wrong.what} it has "
        f"{wrong.claimed:.6g}, where finite differences have {wrong.measured:.6g}"
    )
