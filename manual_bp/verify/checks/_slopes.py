"""Slopes by finite differences: of values, and of derivatives."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from manual_bp.verify._compare import Mismatch
from manual_bp.verify._precision import widen


@dataclass(frozen=True)
class Slope:
    """The slope along a direction, as a derivative has it and by finite differences.

    what: What moves, for messages.
    claimed: The slope according to the derivative.
    measured: The difference quotient.
    allowed: How far they may differ.
    jumps: Whether there is no slope, since those on the two sides differ, or since the value jumps.
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

    def require(self, derivative: str) -> None:
        """Raise a Mismatch unless the derivative is the slope."""
        if not self.agrees:
            raise Mismatch(
                f"{derivative} along a direction of {self.what}: expected {self.measured:.10g} by "
                f"finite differences, got {self.claimed:.10g}"
            )

    def _is_near(self, slope: float) -> bool:
        return abs(slope - self.measured) <= self.allowed


def slope(
    what: str, terms: Callable[[float], Tensor], claimed: Sequence[Tensor], step: float
) -> Slope:
    """Measure a slope.

    Args:
        what: What moves.
        terms: The terms whose sum is the value, after a shift of so many times the direction.
        claimed: Terms whose sum is the slope according to the derivative.
        step: The largest shift.
    """
    here = terms(0.0)
    parts = torch.cat(list(claimed))

    def measure(step: float) -> Slope:
        # A sum of the differences loses fewer digits than the difference of the sums.
        right, left = (terms(step) - here).sum().item(), (here - terms(-step)).sum().item()
        measured, jump = (right + left) / (2 * step), (right - left) / step
        size = parts.abs().sum().item() + abs(measured)
        rounding = 1e-9 * here.abs().sum().item() + 1e-9
        jumps = not abs(jump) <= 1e-3 * size + 1e3 * rounding
        return Slope(what, parts.sum().item(), measured, 1e-6 * size + rounding, jumps)

    first = measure(step)
    if first.agrees or first.jumps:
        return first
    # Where the value jumps, the quotient depends on the step.
    second = measure(8 * step)
    is_steady = abs(first.measured - second.measured) <= 1e3 * max(first.allowed, second.allowed)
    return first if is_steady else replace(first, jumps=True)


def step_for(moved: Iterable[Tensor]) -> float:
    """A step that suits the size of what moves."""
    return 1e-6 * max([1.0, *(t.abs().max().item() for t in moved if t.numel())])


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
