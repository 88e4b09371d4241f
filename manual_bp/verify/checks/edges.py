"""Values at the edge, and other devices."""

import torch
from torch import Tensor

from manual_bp.verify._bench import Bench, Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._case import is_differentiable
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify.checks._shared import compare_with_reference


def at_zero(bench: Bench) -> None:
    """At 0, where slopes may jump, the reference's gradient."""
    for sample in bench.samples:
        for share in (0.5, 1.0):
            arguments = tuple(
                torch.where(torch.rand_like(t.real) < share, 0.0, t) if is_differentiable(t) else t
                for t in sample
            )
            compare_with_reference(bench, arguments, " at zero, where slopes may jump")


def large_values(bench: Bench) -> None:
    """Far out, where functions saturate, the reference's gradient, relative to its own size."""
    for sample in bench.samples:
        for factor in (30.0, 1e4):
            for i in positions(sample):
                scaled = tuple(factor * t if j == i else t for j, t in enumerate(sample))
                compare_with_reference(
                    bench, scaled, f" at {factor:g} times the sample", far_out=True
                )


def infinite_values(bench: Bench) -> None:
    """For inf, -inf and nan the reference's value and gradient."""
    for sample in bench.samples:
        i = positions(sample)[0]
        for value in (torch.inf, -torch.inf, torch.nan):
            if not sample[i].numel() or sample[i].is_complex():
                continue
            planted = sample[i].clone()
            planted[(0,) * planted.ndim] = value
            arguments = tuple(planted if j == i else t for j, t in enumerate(sample))
            compare_with_reference(bench, arguments, f" with {value} in {bench.case.label(i)}")


def device_parity(bench: Bench) -> None:
    """On an accelerator the same numbers as on the CPU."""
    if bench.case.device.type == "cpu":
        raise NotApplicable("the case runs on the CPU")
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        result, found = gradients(bench.case.call, leaves(sample), upstream)
        there = tuple(t.cpu() if isinstance(t, Tensor) else t for t in sample)
        expected_result, expected = gradients(
            bench.case.call, leaves(there), [u.cpu() for u in upstream]
        )
        moved: Gradients = {i: None if g is None else g.cpu() for i, g in found.items()}
        for one, other in zip(outputs_of(result), outputs_of(expected_result), strict=True):
            bench.same("output", one.detach().cpu(), other.detach())
        bench.same_gradients(there, moved, expected, " on the accelerator")
