"""Two tensors held against each other; and, where they differ, a guess at the mistake."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Mismatch(AssertionError):  # noqa: N818 (it is the case that is wrong, not the check)
    """A check failed: the message says where, what was expected, what came, and a diagnosis."""

    def diagnosed(self, story: str) -> "Mismatch":
        """The same with another diagnosis, by one who knows better."""
        return Mismatch(str(self).split("\ndiagnosis: ")[0] + _diagnosis(story))


class NotApplicable(Exception):  # noqa: N818 (it is no error)
    """A check has nothing to compare; the message says why."""


def compare(
    what: str,
    got: Tensor | None,
    expected: Tensor | None,
    *,
    rtol: float = 1e-8,
    clues: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] = (),
    scale: Tensor | None = None,
) -> None:
    """Raise a Mismatch unless both agree, element by element.

    Args:
        what: What is compared, for the message.
        got: What came; None counts as zero.
        expected: What is right; None counts as zero.
        rtol: The relative difference allowed. Beside it stands only what rounding can do:
            100 times the dtype's eps, relative to the largest element.
        clues: What a known mistake would give: if `got` is that, its key is the diagnosis.
        sizes: Numbers that, as a constant ratio, mean a mean taken for a sum.
        scale: A tensor of the usual size of `expected`, where that may cancel to nothing.
    """
    if got is None and expected is None:
        return
    if expected is None:
        assert got is not None
        expected = torch.zeros_like(got)
    if got is None:
        if not expected.count_nonzero():
            return
        raise Mismatch(f"{what}: expected {_summary(expected)}, got None: no gradient came at all")
    if got.shape != expected.shape:
        raise Mismatch(
            f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            + _diagnosis(_shape_diagnosis(got, expected))
        )
    if got.dtype != expected.dtype:
        raise Mismatch(
            f"{what}: expected {expected.dtype}, got {got.dtype}" + _diagnosis("dtype demoted")
        )
    wrong = _wrong(got, expected, rtol, scale)
    if not wrong.any():
        return
    index = tuple(_worst(got, expected, wrong))
    one, other = expected[index].item(), got[index].item()
    ratio = f", ratio {other / one:.6g}" if one else ""
    raise Mismatch(
        f"{what}, at index {index}: expected {one:.10g}, got {other:.10g}{ratio}; "
        f"{int(wrong.sum())} of {wrong.numel()} elements differ"
        + _diagnosis(diagnose(got, expected, wrong, clues or {}, sizes))
    )


def diagnose(
    got: Tensor,
    expected: Tensor,
    wrong: Tensor,
    clues: Mapping[str, Tensor],
    sizes: Sequence[int],
) -> str:
    """The mistake that the difference looks like; empty if it looks like none that is known."""
    for story, value in clues.items():
        if value.shape == got.shape and not _wrong(got, value, 1e-6).any():
            return story
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
        return "equal to -1 times the right one: a sign"
    for size in sorted(set(sizes)):
        if size > 1 and abs(ratio * size - 1) < 1e-6:
            return f"1/{size} of the right one: a mean over {size} where a sum belongs"
        if size > 1 and abs(ratio / size - 1) < 1e-6:
            return (
                f"{size} times the right one: a sum over {size} where a mean belongs, or a factor"
            )
    if ratio == 0:
        return "zero everywhere"
    return f"{ratio:.6g} times the right one, everywhere"


def _shape_diagnosis(got: Tensor, expected: Tensor) -> str:
    if got.ndim == 2 and got.shape == expected.mT.shape:
        same = not _wrong(got, expected.mT, 1e-6).any()
        return "equal to the transpose" if same else "the shape of the transpose"
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
    """Which elements differ by more than is allowed; not finite is wrong unless it is the same."""
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


def _summary(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)}"


def _diagnosis(story: str) -> str:
    return f"\ndiagnosis: {story}" if story else ""
