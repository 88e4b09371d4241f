"""Gradients by finite differences, to explain a wrong slope where there is no reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, outputs_of, positions
from manual_bp.verify._budget import largest
from manual_bp.verify._case import Call, Sample

MOST_ELEMENTS = 64
_STEP = 1e-6


def numeric_gradients(call: Call, sample: Sample, upstream: Sequence[Tensor]) -> Gradients:
    """The gradient of each argument in float64, from two calls for each of its elements.

    Raises:
        ValueError: The arguments have more than 64 elements together.
    """
    places = positions(sample)
    if sum(sample[i].numel() for i in places) > MOST_ELEMENTS:
        raise ValueError(f"sample must have at most {MOST_ELEMENTS} elements")
    found: Gradients = {}
    for i in places:
        gradient = torch.zeros_like(sample[i], memory_format=torch.contiguous_format)
        for k in range(gradient.numel()):
            for unit in (1, 1j) if gradient.is_complex() else (1,):
                gradient.view(-1)[k] += unit * _slope(call, sample, upstream, i, k, unit)
        found[i] = gradient
    return found


def _slope(
    call: Call, sample: Sample, upstream: Sequence[Tensor], i: int, k: int, unit: complex
) -> float:
    """The slope along element k of argument i."""
    step = _STEP * max(1.0, largest(sample[i]))
    values = []
    for shift in (step, -step):
        moved = sample[i].detach().clone(memory_format=torch.contiguous_format)
        moved.view(-1)[k] += unit * shift
        with torch.no_grad():
            results = outputs_of(call(*sample[:i], moved, *sample[i + 1 :]))
        values.append(
            sum(float((u.conj() * t).real.sum()) for u, t in zip(upstream, results, strict=True))
        )
    return (values[0] - values[1]) / (2 * step)
