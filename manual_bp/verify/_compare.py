"""Compares two tensors and, where they differ, guesses the mistake."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manual_bp.verify._budget import Budget, exact_budget, ulps


class Mismatch(AssertionError):  # noqa: N818 (the code under test is wrong, not the check)
    """A check failed. The message says where, what was expected, what was found, and why."""

    @property
    def diagnosis(self) -> str:
        """What the mistake looks like; empty if it is not known."""
        return str(self).partition("\ndiagnosis: ")[2]

    def diagnosed(self, diagnosis: str) -> "Mismatch":
        """The same mismatch with another diagnosis."""
        return Mismatch(str(self).split("\ndiagnosis: ")[0] + _line(diagnosis))

    def with_evidence(self, evidence: str) -> "Mismatch":
        """The same mismatch with something more that was found."""
        first, *rest = str(self).split("\n")
        return Mismatch("\n".join([f"{first}; {evidence}", *rest]))


class NotApplicable(Exception):  # noqa: N818 (it is not an error)
    """A check has nothing to compare. The message says why."""


def compare(
    what: str,
    got: Tensor | None,
    expected: Tensor | None,
    *,
    clues: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] = (),
    budget: Budget | None = None,
) -> None:
    """Raise a Mismatch unless two tensors agree, element by element and as a whole.

    Args:
        what: What is compared, for the message.
        got: What was found; None counts as zero.
        expected: What is right; None counts as zero.
        clues: The values that known mistakes would give. If `got` is one, its key is the diagnosis.
        sizes: Numbers that, as a constant ratio, point to a mean in place of a sum.
        budget: How far they may differ; by default `exact_budget`.
    """
    if got is None:
        if expected is not None and expected.count_nonzero():
            shape = tuple(expected.shape)
            raise Mismatch(f"{what}: expected a tensor of shape {shape}, got None: no gradient")
        return
    expected = torch.zeros_like(got) if expected is None else expected
    if got.shape != expected.shape:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        raise Mismatch(f"{what}: {shapes}" + _line(_shape_diagnosis(got, expected)))
    budget = exact_budget(expected) if budget is None else budget
    if budget.dtype is None and got.dtype != expected.dtype:
        dtypes = f"expected {expected.dtype}, got {got.dtype}"
        raise Mismatch(f"{what}: {dtypes}" + _line("dtype demoted"))
    if budget.dtype is not None:
        got = got.to(expected.dtype)
    wrong = budget.wrong(got, expected)
    if wrong.any():
        raise Mismatch(
            f"{what}, {_worst(got, expected, wrong, budget)}; "
            f"{int(wrong.sum())} of {wrong.numel()} elements differ"
            + _line(diagnose(got, expected, wrong, clues or {}, sizes, budget))
        )
    error = float(torch.where(expected.isfinite(), got - expected, 0.0).abs().double().norm())
    if error > budget.norm:
        share = error / max(float(expected.abs().nan_to_num(0, 0, 0).double().norm()), 1e-300)
        raise Mismatch(
            f"{what}: expected a difference whose norm is at most {budget.norm:.3g}, which is what "
            f"the reference loses in {budget.dtype} and an allowance for rounding; got "
            f"{error:.3g}, {100 * share:.2g} % of the whole"
            + _line(diagnose(got, expected, wrong, clues or {}, sizes, budget))
        )


def diagnose(
    got: Tensor,
    expected: Tensor,
    wrong: Tensor,
    clues: Mapping[str, Tensor],
    sizes: Sequence[int],
    budget: Budget,
) -> str:
    """The known mistake that the difference looks like; empty if there is none."""
    loose = budget.loosened()

    def is_like(value: Tensor) -> bool:
        return value.shape == got.shape and not loose.wrong(got, value.to(got.dtype)).any()

    if not wrong.any():
        return "larger rounding errors than the reference's: a sum in a low precision?"
    for mistake, value in clues.items():
        if is_like(value):
            return mistake
    if expected.is_complex() and is_like(expected.conj().resolve_conj()):
        return "equal to the complex conjugate"
    ratio = _constant_ratio(got, expected, loose)
    if ratio is not None and abs(ratio - 1) > 10 * loose.rtol:
        return _ratio_diagnosis(ratio, sizes, loose.rtol)
    if got.ndim == 2 and got.shape[0] == got.shape[1] and is_like(expected.mT):
        return "equal to the transpose"
    if budget.dtype is None and not replace(budget, rtol=1e-5).wrong(got, expected).any():
        return "right to float32 precision only: dtype demoted on the way"
    if not got[wrong].count_nonzero():
        return "zero where it should not be"
    return ""


def _ratio_diagnosis(ratio: float, sizes: Sequence[int], rtol: float) -> str:
    if abs(ratio + 1) < rtol:
        return "-1 times the right one: a sign error"
    for size in sorted(set(sizes)):
        if size > 1 and abs(ratio * size - 1) < rtol:
            return f"1/{size} of the right one: a mean over {size} where a sum belongs"
        if size > 1 and abs(ratio / size - 1) < rtol:
            return (
                f"{size} times the right one: a factor, or a sum over {size} where a mean belongs"
            )
    if ratio == 0:
        return "zero everywhere"
    return f"{ratio:.6g} times the right one, everywhere"


def _shape_diagnosis(got: Tensor, expected: Tensor) -> str:
    if got.ndim == expected.ndim == 2 and got.shape == expected.mT.shape:
        loose = exact_budget(expected).loosened()
        is_equal = not loose.wrong(got.to(expected.dtype), expected.mT).any()
        return "equal to the transpose" if is_equal else "the shape of the transpose"
    extra = got.ndim - expected.ndim
    if extra > 0 and got.shape[extra:] == expected.shape:
        return "missing a sum over the batch"
    return ""


def _constant_ratio(got: Tensor, expected: Tensor, budget: Budget) -> float | None:
    if got.is_complex() or not (got.isfinite().all() and expected.isfinite().all()):
        return None
    expected, got = expected.double().flatten(), got.double().flatten()
    if expected.numel() < 2 or not expected.count_nonzero():
        return None
    ratio = float((got @ expected) / (expected @ expected))
    return None if budget.wrong(got, ratio * expected).any() else ratio


def _worst(got: Tensor, expected: Tensor, wrong: Tensor, budget: Budget) -> str:
    """The place of the largest difference, with both values."""
    difference = torch.where(wrong, (got - expected).abs().nan_to_num(torch.inf), -1.0)
    position = int(difference.argmax()) if difference.ndim else 0
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), wrong.shape))
    right, found = expected[index].item(), got[index].item()
    ratio = f", ratio {found / right:.6g}" if right else ""
    if budget.dtype is None:
        return f"at index {index}: expected {right:.10g}, got {found:.10g}{ratio}"
    off, limit = float(difference[index]), float(budget.allowed(expected)[index])
    if abs(right) < torch.finfo(budget.dtype).smallest_normal:
        return f"at index {index}: expected {right:.6g} ± {limit:.2g}, got {found:.6g}"
    units, limit = (ulps(d, abs(right), budget.dtype) for d in (off, limit))
    return (
        f"at index {index}: expected {right:.6g}, got {found:.6g}{ratio}, "
        f"{units:.3g} ulps of {budget.dtype} where {limit:.2g} are allowed"
    )


def _line(diagnosis: str) -> str:
    return f"\ndiagnosis: {diagnosis}" if diagnosis else ""


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
