"""Guesses the mistake from what was found and what is right."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from manual_bp.verify._budget import Budget, exact_budget, largest

DEMOTED = "right to float32 precision only: dtype demoted on the way"

# A clue must explain at least three quarters of the difference.
_UNEXPLAINED = 0.25
# Fewer rows do not show where a block ends.
_FEWEST_ROWS = 8


def diagnose(
    got: Tensor,
    expected: Tensor,
    wrong: Tensor,
    clues: Callable[[], Iterable[tuple[str, Tensor]]],
    sizes: Sequence[int],
    budget: Budget,
) -> str:
    """The known mistake that a difference looks like; empty if there is none.

    Args:
        got: What was found.
        expected: What is right.
        wrong: Which elements differ by more than is allowed.
        clues: Gives diagnoses with the values that those mistakes would give.
        sizes: Numbers that, as a constant ratio, point to a mean in place of a sum.
        budget: How far the two may differ.
    """
    if not wrong.any():
        return "larger rounding errors than the reference's: a sum in a low precision?"
    found = _Difference(got, expected, wrong, budget)
    known = found.not_finite() or found.first_like(clues())
    if known or not expected.any():
        return known
    return (
        found.ratio(sizes)
        or found.first_like(_rearranged(expected))
        or found.zero()
        or (found.in_float64() if budget.dtype is None else found.rounding(budget.dtype))
    )


def diagnose_shape(got: Tensor, expected: Tensor) -> str:
    """The known mistake that a wrong shape looks like; empty if there is none."""
    if got.ndim == expected.ndim == 2 and got.shape == expected.mT.shape:
        loose = exact_budget(expected).loosened()
        is_equal = not loose.wrong(got.to(expected.dtype), expected.mT).any()
        return "equal to the transpose" if is_equal else "the shape of the transpose"
    extra = got.ndim - expected.ndim
    if extra > 0 and got.shape[extra:] == expected.shape:
        return "missing a sum over the batch"
    padded = (1,) * extra + tuple(expected.shape)
    if extra >= 0 and all(e in (1, g) for e, g in zip(padded, got.shape, strict=True)):
        dims = [d for d, (e, g) in enumerate(zip(padded, got.shape, strict=True)) if e != g]
        return f"missing a sum over {_dimensions(dims)}, along which the argument was broadcast"
    return ""


def threshold(value: Tensor, got: Tensor | None, expected: Tensor | None) -> str:
    """The diagnosis if a gradient is wrong exactly where the argument is large."""
    if got is None or expected is None or got.shape != value.shape != () or value.numel() < 2:
        return ""
    wrong = (got - expected).abs() > 1e-6 * expected.abs()
    right = ~wrong & (expected != 0)
    if right.sum() < 2 or wrong.sum() < 2:
        return ""
    limit = value.abs()[wrong].min()
    if limit > value.abs()[right].max():
        return f"right except where the argument is large: wrong from {limit.item():.3g} on"
    return ""


def is_like(got: Tensor, value: Tensor, expected: Tensor, budget: Budget) -> bool:
    """Whether a value is what was found, and much closer to it than the right one.

    Only the first is asked if they cannot be subtracted, because what was found has another shape
    than the right one or is not finite where that is.
    """
    if value.shape != got.shape:
        return False
    value = value.to(got.dtype)
    larger = max(1.0, largest(value) / (largest(expected) or 1.0))
    loose = replace(budget.loosened(), atol=budget.atol * larger, extra=budget.extra * larger)
    if loose.wrong(got, value).any():
        return False
    if got.shape != expected.shape or (expected.isfinite() & ~got.isfinite()).any():
        return True
    return _distance(got, value) <= _UNEXPLAINED * _distance(got, expected)


@dataclass(frozen=True)
class _Difference:
    """What was found and what is right, and where they differ by more than the budget."""

    got: Tensor
    expected: Tensor
    wrong: Tensor
    budget: Budget

    def is_like(self, value: Tensor) -> bool:
        """Whether a value is what was found, and much closer to it than the right one."""
        return is_like(self.got, value, self.expected, self.budget)

    def first_like(self, clues: Iterable[tuple[str, Tensor]]) -> str:
        """The first of some mistakes that gives what was found."""
        return next((mistake for mistake, value in clues if self.is_like(value)), "")

    def not_finite(self) -> str:
        """For nan or infinity where the right value is finite."""
        nan = self.got.isnan() & self.expected.isfinite()
        infinite = self.got.isinf() & self.expected.isfinite()
        if nan.any():
            return "nan where the right one is finite: 0/0, inf - inf or 0 * inf on the way"
        if infinite.any():
            return "infinite where the right one is finite: an overflow or a division by zero"
        return ""

    def ratio(self, sizes: Sequence[int]) -> str:
        """For a constant factor."""
        got, expected = self.got, self.expected
        if got.is_complex() or not (got.isfinite().all() and expected.isfinite().all()):
            return ""
        got, expected = got.double().flatten(), expected.double().flatten()
        if not expected.count_nonzero():
            return ""
        ratio = float((got @ expected) / (expected @ expected))
        if not self.is_like(ratio * self.expected):
            return ""
        rtol = self.budget.loosened().rtol
        is_one = expected.numel() == 1  # any two numbers have a ratio: only a known one says more
        if abs(ratio - 1) > 10 * rtol and (not is_one or self.budget.dtype is None):
            other = "" if is_one else f"{ratio:.6g} times the right one, everywhere"
            return _ratio_diagnosis(ratio, sizes, rtol) or other
        if is_one or self.budget.dtype is not None:
            return ""
        if not self.budget.wrong(got, ratio * expected).any():
            return f"1 {ratio - 1:+.3g} times the right one, everywhere: a digit of a constant"
        return ""

    def zero(self) -> str:
        """For zeros in the wrong places."""
        if not self.got[self.wrong].count_nonzero():
            return self._region("zero") or "zero where it should not be"
        if self.expected.any() and not self.expected[self.wrong].count_nonzero():
            return "not zero where it should be: a mask or a threshold is missed"
        return self._region("wrong")

    def in_float64(self) -> str:
        """What rounding would blur in a lower precision."""
        return (
            self.first_like(_corrected(self.got, self.expected, self.wrong))
            or self.rows()
            or self.precision()
        )

    def rounding(self, dtype: torch.dtype) -> str:
        """For an error as large as what one rounding of the largest element leaves."""
        error = largest(torch.where(self.wrong, self.got - self.expected, 0.0))
        for coarse in (dtype, torch.float16, torch.bfloat16):
            if error > torch.finfo(coarse).eps * largest(self.expected):
                continue
            return (
                f"no more than one rounding to {coarse}: an intermediate result is rounded, where "
                f"the reference keeps it exact. If that is on purpose, round at the same place in "
                f"the reference"
            )
        return ""

    def rows(self) -> str:
        """For a factor or an offset that is the same along a dimension."""
        for dim, size in enumerate(self.got.shape):
            others = [d for d in range(self.got.ndim) if d != dim]
            if size < 2 or self.got.numel() < 2 * size or self.got.is_complex():
                continue
            up = (self.got * self.expected).sum(others, keepdim=True)
            factor = up / self.expected.square().sum(others, keepdim=True)
            if self.is_like((factor * self.expected).nan_to_num()):
                low, high = factor.nan_to_num().aminmax()
                return (
                    f"a factor of its own for each {_unit(dim)}, from {low.item():.6g} to "
                    f"{high.item():.6g}: a factor that depends on the {_unit(dim)} is wrong"
                )
        for dim, size in enumerate(self.got.shape):
            offset = (self.got - self.expected).mean(dim, keepdim=True)
            if 1 < size < self.got.numel() and self.is_like(self.expected + offset):
                return (
                    f"off by the same amount along dimension {dim}: a term that is constant along "
                    f"it, such as a mean, is missing or too much"
                )
        return ""

    def precision(self) -> str:
        """For small errors."""
        got, expected = self.got, self.expected
        if got.is_complex() or not got.isfinite().all():
            return ""
        is_large = expected.abs() > 1e-3 * largest(expected)
        if not (self.wrong & is_large).any():
            return "wrong only where it is small: nearly equal numbers are subtracted on the way"
        share = _distance(got, expected) / max(_distance(expected, 0 * expected), 1e-300)
        is_float32 = bool((got.float().to(got.dtype) == got).all())
        if is_float32 and share < 1e-5:
            return DEMOTED
        if share < 1e-2:
            return (
                f"right to about {int(-math.log10(share))} digits: a wrong digit in a constant, an "
                f"eps in the wrong place, or an approximation"
            )
        return ""

    def _region(self, how: str) -> str:
        """For errors from some row on, or in one row, and nowhere else."""
        for dim, size in enumerate(self.wrong.shape):
            others = [d for d in range(self.wrong.ndim) if d != dim]
            share = self.wrong.double().mean(others) if others else self.wrong.double()
            bad = share.nonzero().flatten().tolist()
            first = bad[0]
            if len(bad) == size or size < _FEWEST_ROWS or share[bad].mean() < 0.5:
                continue
            if bad == list(range(first, size)):
                return (
                    f"right before {_unit(dim)} {first}, {how} from there on: the remainder of a "
                    f"block?"
                )
            if len(bad) == 1 and others:
                return f"{how} in {_unit(dim)} {first} only"
        return ""


def _rearranged(expected: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What mistakes with dimensions would make of the right value."""
    if expected.is_complex():
        yield "equal to the complex conjugate", expected.conj().resolve_conj()
    if 2 <= expected.ndim <= 4:
        usual = tuple(range(expected.ndim))
        for order in permutations(usual):
            if order != usual:
                is_matrix = expected.ndim == 2
                yield (
                    "equal to the transpose"
                    if is_matrix
                    else f"the right one with its dimensions in the order {order}",
                    expected.permute(order),
                )
        swapped = expected.mT
        text = "the transpose, reshaped: rows and columns are read in the wrong order"
        yield text, swapped.reshape(expected.shape)
        yield text, expected.reshape(swapped.shape).mT
    for dim, size in enumerate(expected.shape):
        if size < 2 or expected.numel() < 3:
            continue
        yield f"reversed along dimension {dim}", expected.flip(dim)
        for shift in (1, -1):
            yield f"shifted by one along dimension {dim}", expected.roll(shift, dim)
        alike = f"the same for every {_unit(dim)}:"
        first = expected.narrow(dim, 0, 1).expand_as(expected)
        yield f"{alike} that of the first one is used for all", first
        total = expected.sum(dim, keepdim=True).expand_as(expected)
        yield f"{alike} summed over dimension {dim}", total
        yield f"{alike} averaged over dimension {dim}", total / size


def _corrected(got: Tensor, expected: Tensor, wrong: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What was found, as it would be with one mistake only."""
    if int(wrong.sum()) > 1:
        count = f"{int(wrong.sum())} of {wrong.numel()}"
        signs = torch.where(wrong, -expected, expected)
        yield f"the sign of {count} elements is wrong", signs
    if got.numel() > 2:
        offset = (got - expected).mean()
        size = f"{offset.item():.6g}"
        yield f"{size} too much everywhere: a constant that is added", expected + offset


def _ratio_diagnosis(ratio: float, sizes: Sequence[int], rtol: float) -> str:
    """The mistake that a factor points to: of those within the tolerance the closest, or ""."""
    known = {-1.0: "-1 times the right one: a sign error"}
    for n in sorted({size for size in sizes if size > 1}):
        mean = f"1/{n} of the right one: a mean over {n} where a sum belongs"
        total = f"{n} times the right one: a factor, or a sum over {n} where a mean belongs"
        known.setdefault(1 / n, mean)
        known.setdefault(float(n), total)
    known.setdefault(2.0, "2 times the right one, everywhere: a factor 2 too much")
    known.setdefault(0.5, "0.5 times the right one, everywhere: a factor 2 is missing")
    for n in sorted({size for size in sizes if size > 2}):
        unbiased = f"a division by {n} where {n - 1} belongs, or the reverse"
        root = f"a factor sqrt({n}) missing or too much"
        for factor, why in (((n - 1) / n, unbiased), (math.sqrt(n), root)):
            known.setdefault(factor, f"{factor:.6g} times the right one, everywhere: {why}")
            known.setdefault(1 / factor, f"{1 / factor:.6g} times the right one, everywhere: {why}")
    if ratio == 0:
        return "zero everywhere"
    # Two that are hard to tell apart are no evidence for either.
    close = sorted((abs(ratio / factor - 1), factor) for factor in known)
    if close[0][0] < rtol and (len(close) < 2 or close[1][0] > 2 * rtol):
        return known[close[0][1]]
    return ""


def _distance(got: Tensor, other: Tensor) -> float:
    """The norm of the difference, where both are finite."""
    difference = torch.where(got.isfinite() & other.isfinite(), got - other, 0.0)
    return float(difference.abs().double().norm())


def _unit(dim: int) -> str:
    return "row" if dim == 0 else f"index of dimension {dim}"


def _dimensions(dims: Sequence[int]) -> str:
    numbers = ", ".join(map(str, dims))
    return f"dimension {numbers}" if len(dims) == 1 else f"dimensions {numbers}"
