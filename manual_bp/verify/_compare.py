"""Compares two tensors and, where they differ, guesses the mistake."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Mismatch(AssertionError):  # noqa: N818 (the code under test is wrong, not the check)
    """A check failed. The message says where, what was expected, what was found, and why."""

    def diagnosed(self, diagnosis: str) -> "Mismatch":
        """The same mismatch with another diagnosis."""
        return Mismatch(str(self).split("\ndiagnosis: ")[0] + _line(diagnosis))


class NotApplicable(Exception):  # noqa: N818 (it is not an error)
    """A check has nothing to compare. The message says why."""


def compare(
    what: str,
    got: Tensor | None,
    expected: Tensor | None,
    *,
    clues: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] = (),
    scale: Tensor | None = None,
) -> None:
    """Raise a Mismatch unless two tensors agree, element by element.

    Each element may differ by 1e-8 of its size, plus an allowance for rounding: 100 times the
    dtype's eps, relative to the largest element.

    Args:
        what: What is compared, for the message.
        got: What was found; None counts as zero.
        expected: What is right; None counts as zero.
        clues: The values that known mistakes would give. If `got` is one, its key is the diagnosis.
        sizes: Numbers that, as a constant ratio, point to a mean in place of a sum.
        scale: A tensor of the usual size of `expected`, where that may cancel to zero.
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
    if got.dtype != expected.dtype:
        dtypes = f"expected {expected.dtype}, got {got.dtype}"
        raise Mismatch(f"{what}: {dtypes}" + _line("dtype demoted"))
    wrong = _wrong(got, expected, 1e-8, scale)
    if wrong.any():
        index = tuple(_worst(got, expected, wrong))
        right, found = expected[index].item(), got[index].item()
        ratio = f", ratio {found / right:.6g}" if right else ""
        raise Mismatch(
            f"{what}, at index {index}: expected {right:.10g}, got {found:.10g}{ratio}; "
            f"{int(wrong.sum())} of {wrong.numel()} elements differ"
            + _line(diagnose(got, expected, wrong, clues or {}, sizes))
        )


def diagnose(
    got: Tensor,
    expected: Tensor,
    wrong: Tensor,
    clues: Mapping[str, Tensor],
    sizes: Sequence[int],
) -> str:
    """The known mistake that the difference looks like; empty if there is none."""
    for mistake, value in clues.items():
        if value.shape == got.shape and not _wrong(got, value, 1e-6).any():
            return mistake
    if expected.is_complex() and not _wrong(got, expected.conj().resolve_conj(), 1e-8).any():
        return "equal to the complex conjugate"
    ratio = _constant_ratio(got, expected)
    if ratio is not None and abs(ratio - 1) > 1e-5:
        return _ratio_diagnosis(ratio, sizes)
    if got.ndim == 2 and got.shape[0] == got.shape[1] and not _wrong(got, expected.mT, 1e-8).any():
        return "equal to the transpose"
    if not _wrong(got, expected, 1e-5).any():
        return "right to float32 precision only: dtype demoted on the way"
    if not got[wrong].count_nonzero():
        return "zero where it should not be"
    return ""


def _ratio_diagnosis(ratio: float, sizes: Sequence[int]) -> str:
    if abs(ratio + 1) < 1e-6:
        return "-1 times the right one: a sign error"
    for size in sorted(set(sizes)):
        if size > 1 and abs(ratio * size - 1) < 1e-6:
            return f"1/{size} of the right one: a mean over {size} where a sum belongs"
        if size > 1 and abs(ratio / size - 1) < 1e-6:
            return (
                f"{size} times the right one: a factor, or a sum over {size} where a mean belongs"
            )
    if ratio == 0:
        return "zero everywhere"
    return f"{ratio:.6g} times the right one, everywhere"


def _shape_diagnosis(got: Tensor, expected: Tensor) -> str:
    if got.ndim == expected.ndim == 2 and got.shape == expected.mT.shape:
        is_equal = not _wrong(got, expected.mT, 1e-6).any()
        return "equal to the transpose" if is_equal else "the shape of the transpose"
    extra = got.ndim - expected.ndim
    if extra > 0 and got.shape[extra:] == expected.shape:
        return "missing a sum over the batch"
    return ""


def _constant_ratio(got: Tensor, expected: Tensor) -> float | None:
    if got.is_complex() or not (got.isfinite().all() and expected.isfinite().all()):
        return None
    expected, got = expected.double().flatten(), got.double().flatten()
    if expected.numel() < 2 or not expected.count_nonzero():
        return None
    ratio = float((got @ expected) / (expected @ expected))
    return None if _wrong(got, ratio * expected, 1e-6).any() else ratio


def _wrong(got: Tensor, expected: Tensor, rtol: float, usual: Tensor | None = None) -> Tensor:
    """Which elements differ by more than is allowed. Those not finite must be the same."""
    finite = expected.isfinite() & got.isfinite()
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    if usual is not None and usual.numel():
        scale = max(scale, usual.abs().nan_to_num(0, 0, 0).max().item())
    eps = torch.finfo(expected.dtype).eps
    allowed = rtol * expected.abs() + 100 * eps * scale
    return torch.where(finite, (got - expected).abs() > allowed, ~same)


def _worst(got: Tensor, expected: Tensor, wrong: Tensor) -> list[int]:
    difference = torch.where(wrong, (got - expected).abs().nan_to_num(torch.inf), -1.0)
    position = int(difference.argmax()) if difference.ndim else 0
    return [int(i) for i in torch.unravel_index(torch.tensor(position), wrong.shape)]


def _line(diagnosis: str) -> str:
    return f"\ndiagnosis: {diagnosis}" if diagnosis else ""
