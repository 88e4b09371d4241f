"""The value, and the first derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from manual_bp.verify._bench import (
    Bench,
    Call,
    Gradients,
    Products,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
    subsets,
)
from manual_bp.verify._case import Sample
from manual_bp.verify._compare import Mismatch


def forward_matches_reference(bench: Bench) -> None:
    """The value is the reference's, for contiguous and for transposed arguments."""
    for sample in bench.samples:
        right = bench.reference(*leaves(sample, ()))
        bench.same_outputs(bench.case.call(*leaves(sample, ())), right)
        turned = tuple(_turned(t) for t in sample)
        try:
            right = bench.reference(*turned)
        except RuntimeError:
            continue  # the reference itself wants contiguous arguments
        bench.same_outputs(bench.case.call(*turned), right, " of transposed arguments")


def finite_differences(bench: Bench) -> None:
    """The gradient is the slope: in random directions, and along every axis of small arguments."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        result, found = gradients(bench.case.call, leaves(sample), upstream)
        upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
        for i in positions(sample):
            gradient = found[i]
            if gradient is None:
                gradient = torch.zeros_like(sample[i])
            for direction in _directions(bench, sample[i]):
                _compare_slope(bench, sample, i, direction, upstream, gradient)


def gradients_match_reference(bench: Bench) -> None:
    """The gradients are those that autograd finds through the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        _, found = gradients(bench.case.call, leaves(sample), upstream)
        _, expected = gradients(bench.reference, leaves(sample), upstream)
        clues = _clues(bench.reference, sample, upstream, expected)
        bench.same_gradients(sample, found, expected, clues=clues)


def requires_grad_subsets(bench: Bench) -> None:
    """Whichever arguments want gradients, each gets the same one."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        _, expected = gradients(bench.case.call, leaves(sample), upstream)
        for wanted in subsets(positions(sample)):
            names = ", ".join(bench.case.label(i) for i in wanted)
            _, found = gradients(bench.case.call, leaves(sample, wanted), upstream)
            right = {i: expected[i] for i in wanted}
            bench.same_gradients(sample, found, right, f" when only {names} want one")


def frugal(bench: Bench) -> None:
    """For no choice of arguments more matrix products or more memory than the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        places = positions(sample)
        for wanted in subsets(places):
            names = ", ".join(bench.case.label(i) for i in wanted)
            for what, measure in (
                ("matrix products in backward", _products),
                ("bytes kept for backward", _saved_bytes),
            ):
                ours = measure(bench.case.call, leaves(sample, wanted), upstream)
                theirs = measure(bench.reference, leaves(sample, wanted), upstream)
                bench.comparisons += 1
                if ours > theirs:
                    raise Mismatch(
                        f"{what} when only {names} want gradients: expected at most {theirs}, as "
                        f"the reference, got {ours}" + ("" if wanted == places else _NOT_ASKED)
                    )


_NOT_ASKED = "\ndiagnosis: ctx.needs_input_grad is not asked"


def _turned(value: Any) -> Any:
    return value.mT.contiguous().mT if isinstance(value, Tensor) and value.ndim > 1 else value


def _directions(bench: Bench, value: Tensor) -> list[Tensor]:
    directions = [bench.random_like(value) for _ in range(3)]
    if value.numel() <= 24:
        for i in range(value.numel()):
            axis = torch.zeros_like(value)
            axis.view(-1)[i] = 1
            directions.append(axis)
    return directions


def _compare_slope(
    bench: Bench,
    sample: Sample,
    i: int,
    direction: Tensor,
    upstream: Sequence[Tensor],
    gradient: Tensor,
) -> None:
    """Compare <gradient, direction> with the difference quotient, unless the slope jumps there."""
    largest = sample[i].abs().max().item() if sample[i].numel() else 0.0
    step = 1e-6 * max(1.0, largest)

    def value(shift: float) -> Tensor:
        arguments = tuple(t + shift * direction if j == i else t for j, t in enumerate(sample))
        with torch.no_grad():
            results = outputs_of(bench.case.call(*arguments))
        weighted = [(u.conj() * t).real.sum() for u, t in zip(upstream, results, strict=True)]
        return torch.stack(weighted).sum()

    here, ahead, behind = value(0.0), value(step), value(-step)
    right, left = (ahead - here) / step, (here - behind) / step
    numeric = (ahead - behind) / (2 * step)
    slope = (gradient.conj() * direction).real
    size = slope.abs().sum() + numeric.abs()
    rounding = 1e-9 * here.abs() + 1e-9
    if (right - left).abs() > 1e-3 * size + 1e3 * rounding:
        bench.kinks += 1
        return
    bench.comparisons += 1
    if (slope.sum() - numeric).abs() > 1e-6 * size + rounding:
        ratio = (slope.sum() / numeric).item()
        raise Mismatch(
            f"slope along a direction of {bench.case.label(i)}: expected {numeric.item():.10g} by "
            f"finite differences, got {slope.sum().item():.10g}, ratio {ratio:.6g}"
        )


def _clues(
    reference: Call, sample: Sample, upstream: Sequence[Tensor], expected: Gradients
) -> dict[str, Gradients]:
    """What known mistakes would give."""
    first = [u if not u.ndim else torch.cat([u[:1], torch.zeros_like(u[1:])]) for u in upstream]
    scale = upstream[0].flatten()[0] if upstream[0].numel() else 1.0
    clues: dict[str, Gradients] = {
        "everything is scaled by the first element of the upstream gradient": {
            i: None if g is None else g * scale for i, g in expected.items()
        }
    }
    if upstream[0].ndim and upstream[0].shape[0] > 1:
        _, only_first = gradients(reference, leaves(sample), first)
        clues["only the first row of the batch counts: missing a sum over the batch"] = only_first
    return clues


def _products(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    result = call(*arguments)
    products = Products()
    with products:
        gradients_of(result, arguments, upstream)
    return products.count


def _saved_bytes(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    del upstream
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*arguments)
    del result
    return sum(saved.values())
