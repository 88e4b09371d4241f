"""Compares two tensors and says where they differ."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from manual_bp.verify._budget import Budget, exact_budget, ulps
from manual_bp.verify._diagnose import diagnose, diagnose_shape

Clues = Callable[[], Iterable[tuple[str, Tensor]]]


class Mismatch(AssertionError):  # noqa: N818 (the code under test is wrong, not the check)
    """A check failed. The message says where, what was expected, what was found, and why."""

    def diagnosed(self, diagnosis: str) -> "Mismatch":
        """The same mismatch with another diagnosis."""
        return Mismatch(str(self).split("\ndiagnosis: ")[0] + _line(diagnosis))

    def with_evidence(self, evidence: str) -> "Mismatch":
        """The same mismatch with something more that was found."""
        return Mismatch(f"{self.finding}; {evidence}" + _line(self.diagnosis))

    @property
    def finding(self) -> str:
        """What was found, without the diagnosis."""
        return str(self).partition("\ndiagnosis: ")[0]

    @property
    def diagnosis(self) -> str:
        """The mistake that it looks like; empty if nothing is known."""
        return str(self).partition("\ndiagnosis: ")[2]


class NotApplicable(Exception):  # noqa: N818 (it is not an error)
    """A check has nothing to compare. The message says why."""


def compare(
    what: str,
    got: Tensor | None,
    expected: Tensor | None,
    *,
    clues: Clues = tuple,
    sizes: Sequence[int] = (),
    budget: Budget | None = None,
) -> None:
    """Raise a Mismatch unless two tensors agree, element by element and as a whole.

    Args:
        what: What is compared, for the message.
        got: What was found; None counts as zero.
        expected: What is right; None counts as zero.
        clues: Gives diagnoses with the values that those mistakes would give. It is called only if
            the tensors differ.
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
        raise Mismatch(f"{what}: {shapes}" + _line(diagnose_shape(got, expected)))
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
            + _line(diagnose(got, expected, wrong, clues, sizes, budget))
        )
    error = float(torch.where(expected.isfinite(), got - expected, 0.0).abs().double().norm())
    if error > budget.norm:
        share = error / max(float(expected.abs().nan_to_num(0, 0, 0).double().norm()), 1e-300)
        raise Mismatch(
            f"{what}: expected a difference whose norm is at most {budget.norm:.3g}, which is what "
            f"the reference loses in {budget.dtype} and an allowance for rounding; got "
            f"{error:.3g}, {100 * share:.2g} % of the whole"
            + _line(diagnose(got, expected, wrong, clues, sizes, budget))
        )


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}"
    return line if len(line) <= 100 else f"{line[:97]}..."


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
