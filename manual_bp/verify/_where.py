"""At which samples, in which dtypes and on which device a check fails."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manual_bp.verify._case import Case, Sample, is_differentiable
from manual_bp.verify._check import Check, CheckContext
from manual_bp.verify._compare import NotApplicable

Property = Callable[[Case, Sample], str]


def pattern(case: Case, failed: Sequence[Sample], passed: Sequence[Sample]) -> str:
    """What the samples at which a check fails have in common, and the others have not.

    Args:
        case: The case.
        failed: The samples at which it fails.
        passed: The samples at which it passes.
    """
    if not failed:
        return ""
    if not passed:
        return "at every sample" if len(failed) > 1 else ""
    for words, describe in _PROPERTIES.items():
        bad = dict.fromkeys(describe(case, sample) for sample in failed)
        if bad.keys().isdisjoint(describe(case, sample) for sample in passed):
            return words.format(_joined(list(bad)))
    return f"at {len(failed)} of {len(failed) + len(passed)} samples"


def narrower(case: Case, check: Check) -> str:
    """Whether a failed check passes for contiguous arguments, or on the CPU."""
    if any(not t.is_contiguous() for s in CheckContext(case, check.name).samples for t in _of(s)):
        draw = case.draw
        plain = replace(case, draw=lambda g: [_contiguous(sample) for sample in draw(g)])
        if passes(plain, check):
            return "only for strided arguments"
    if case.device.type != "cpu" and passes(replace(case, device=torch.device("cpu")), check):
        return f"only on {case.device.type}"
    return ""


def passes(case: Case, check: Check) -> bool:
    """Whether a check passes at all samples of a case, with the random numbers of its seed."""
    ctx = CheckContext(case, check.name)
    for sample in ctx.each(ctx.samples):
        try:
            check.run(ctx, sample)
        except NotApplicable:
            continue
        except Exception:
            return False
    return ctx.comparisons > 0


def _dtype(case: Case, sample: Sample) -> str:  # noqa: ARG001
    names = [str(t.dtype).removeprefix("torch.") for t in _of(sample) if is_differentiable(t)]
    return names[0] if len(set(names)) == 1 else f"({', '.join(names)})"


def _rows(case: Case, sample: Sample) -> str:
    dims = case.in_dims or (0,)
    for value, dim in zip(sample, dims, strict=False):
        if isinstance(value, Tensor) and dim is not None and value.ndim > dim:
            return str(value.shape[dim])
    return "no"


def _dimensions(case: Case, sample: Sample) -> str:  # noqa: ARG001
    return ", ".join(str(t.ndim) for t in _of(sample)[:1])


def _shapes(case: Case, sample: Sample) -> str:  # noqa: ARG001
    return ", ".join(str(tuple(t.shape)) for t in _of(sample))


_PROPERTIES: dict[str, Property] = {
    "only in {}": _dtype,
    "only with {} dimensions": _dimensions,
    "only with {} rows": _rows,
    "only for shapes {}": _shapes,
}


def _of(sample: Sample) -> list[Tensor]:
    return [t for t in sample if isinstance(t, Tensor)]


def _contiguous(sample: Sample) -> Sample:
    return tuple(t.contiguous() if isinstance(t, Tensor) else t for t in sample)


def _joined(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
