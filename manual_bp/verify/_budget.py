"""How far a result may be from the right one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How far each element, and the whole tensor, may be from what is expected.

    An element may differ by rtol times its size, plus atol, plus a part that is the smaller one of
    extra and cap times its size (extra, if the expected element is zero).

    norm: How large the norm of the difference may be.
    dtype: The dtype whose rounding is allowed for; None if the dtypes must be equal.
    """

    rtol: float
    atol: float
    extra: float = 0.0
    cap: float = math.inf
    norm: float = math.inf
    dtype: torch.dtype | None = None

    def allowed(self, expected: Tensor) -> Tensor:
        """The allowed difference of each element."""
        size = expected.abs().nan_to_num(0, 0, 0)
        extra = torch.full_like(size, self.extra)
        if self.cap < math.inf:
            extra = torch.where(size > 0, torch.minimum(extra, self.cap * size), extra)
        return self.rtol * size + self.atol + extra

    def wrong(self, got: Tensor, expected: Tensor) -> Tensor:
        """Which elements differ by more than is allowed. Infinite ones must be the same.

        Nothing is asked where nan is expected.
        """
        finite = expected.isfinite() & got.isfinite()
        same = (got == expected) | expected.isnan()
        return torch.where(finite, (got - expected).abs() > self.allowed(expected), ~same)

    def widened_by(self, rtol: float, atol: float, expected: Tensor) -> "Budget":
        """With a tolerance in addition, given by the author of a case."""
        if not rtol and not atol:
            return self
        norm = self.norm + rtol * _norm(expected) + atol * math.sqrt(expected.numel())
        return replace(self, rtol=self.rtol + rtol, atol=self.atol + atol, norm=norm)

    def loosened(self) -> "Budget":
        """A budget to recognize a known mistake by: at least 1e-6 of each element."""
        return replace(self, rtol=max(self.rtol, 1e-6))


def exact_budget(expected: Tensor, usual: Tensor | None = None) -> Budget:
    """For results of the same operations in one dtype: 1e-8 of each element, and rounding.

    The allowance for rounding is 100 times the dtype's eps, relative to the largest element.

    Args:
        expected: What is right.
        usual: A tensor of the usual size of `expected`, where that may cancel to zero.
    """
    return Budget(1e-8, 100 * torch.finfo(expected.dtype).eps * largest(expected, usual))


def rounding_budget(dtype: torch.dtype, size: float, noise: float, least: float) -> Budget:
    """For two results of one candidate in a low precision.

    Args:
        dtype: The dtype of the results.
        size: The size of the largest element.
        noise: What rounding changes, relative to the largest element.
        least: What rounding changes at least.
    """
    eps = torch.finfo(dtype).eps
    return Budget(4 * eps, 2 * max(noise * size, least) + _smallest(dtype))


def reference_budget(
    dtype: torch.dtype,
    pairs: Sequence[tuple[Tensor, Tensor]],
    expected: Tensor,
    terms: int,
    slack: float = 1.0,
    least: float = 0.0,
) -> Budget:
    """For a result in a low precision, from what the reference itself loses there.

    Each element may be off by 2 eps of its size and five times the reference's largest error. If
    that is small relative to every element, it counts relative to the element. The norm of the
    difference may be twice that of the reference's error, plus eps of the whole. Both grow with the
    rounding of a sum in float32. If the reference does not run in the dtype, 8 eps of the largest
    element take the place of its error.

    Args:
        dtype: The dtype of the result.
        pairs: Results of the reference in the dtype, each with the exact one.
        expected: The exact result, in float64.
        terms: How many terms the longest sum has.
        slack: A factor of what is allowed for rounding, where other operations than the reference's
            may round differently: higher derivatives, large arguments, and dtypes that a case does
            not name.
        least: The reference's error is taken to be at least this.
    """
    eps = torch.finfo(dtype).eps
    size, norm = largest(expected), _norm(expected)
    sums = slack * math.sqrt(max(terms, 1)) * torch.finfo(torch.float32).eps
    smallest = max(terms, 1) * _smallest(dtype)
    if not pairs:
        share = 8 * slack * eps + sums
        return Budget(2 * eps, share * size + smallest, norm=share * norm, dtype=dtype)
    errors = [(_difference(peer, exact), exact.abs()) for peer, exact in pairs]
    absolute = max(least, *(largest(error) for error, _ in errors))
    relative = max(largest(torch.where(e > 0, d / e, 0.0)) for d, e in errors)
    is_exact = relative < 4 * eps and slack == 1
    return Budget(
        rtol=2 * slack * eps + sums,
        atol=sums * size + smallest,
        extra=slack * (5 * absolute + eps * size),
        cap=5 * relative if is_exact else math.inf,
        norm=2 * slack * max(_norm(error) for error, _ in errors)
        + (slack * eps + sums) * norm
        + (slack * least + smallest) * math.sqrt(max(expected.numel(), 1)),
        dtype=dtype,
    )


def noise_of(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> float:
    """The reference's largest error relative to its largest element, but at least 2 eps."""
    shares = [
        largest(_difference(peer, exact)) / size
        for peer, exact in pairs
        if (size := largest(exact))
    ]
    return max([2 * torch.finfo(dtype).eps, *shares])


def largest(*values: Tensor | None) -> float:
    """The size of the largest finite element; 0 if there is none."""
    sizes = [
        v.detach().abs().nan_to_num(0, 0, 0).max().item()
        for v in values
        if v is not None and v.numel()
    ]
    return float(max(sizes, default=0.0))


def ulps(difference: float, value: float, dtype: torch.dtype) -> float:
    """A difference in units of the last place of a value."""
    limits = torch.finfo(dtype)
    exponent = math.floor(math.log2(abs(value))) if value and math.isfinite(value) else -math.inf
    return difference / max(limits.eps * 2.0**exponent, limits.smallest_normal * limits.eps)


def _difference(peer: Tensor, exact: Tensor) -> Tensor:
    """The error of the reference; 0 where it or the exact value is not finite."""
    difference = (peer.to(exact.dtype) - exact).abs()
    return torch.where(peer.isfinite() & exact.isfinite(), difference, 0.0)


def _norm(value: Tensor) -> float:
    return float(value.abs().nan_to_num(0, 0, 0).double().norm())


def _smallest(dtype: torch.dtype) -> float:
    """What may be lost where numbers are so small that an accelerator flushes them to zero."""
    return torch.finfo(dtype).smallest_normal
