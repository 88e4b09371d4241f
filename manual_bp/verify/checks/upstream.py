"""What comes from above: the upstream gradient in all its forms."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify._bench import Bench, Gradients, gradients, gradients_of, leaves, outputs_of
from manual_bp.verify.checks._shared import LAYOUTS, is_plain


def upstream_layouts(bench: Bench) -> None:
    """The strides of the upstream gradient do not matter, nor that it is expanded or zero."""
    for sample in bench.samples:
        random = bench.upstream(bench.case.call, sample)
        _, usual = gradients(bench.case.call, leaves(sample), random)
        for name, layout in {**LAYOUTS, "constant (stride 0)": _constant}.items():
            upstream = [layout(u) for u in bench.upstream(bench.case.call, sample)]
            if all(map(is_plain, upstream)):
                continue
            plain = [u.clone(memory_format=torch.contiguous_format) for u in upstream]
            _, found = gradients(bench.case.call, leaves(sample), upstream)
            _, expected = gradients(bench.case.call, leaves(sample), plain)
            bench.same_gradients(
                sample,
                found,
                expected,
                f" for a {name} upstream gradient",
                story="right only for contiguous upstream gradients",
                scales=usual,
            )
        _, found = gradients(bench.case.call, leaves(sample), [torch.zeros_like(u) for u in random])
        nothing: Gradients = dict.fromkeys(found)
        where = " for an upstream gradient of zeros"
        bench.same_gradients(sample, _where_finite(found, usual), nothing, where)


def upstream_undefined(bench: Bench) -> None:
    """Where no gradient comes from above, none goes down, and nothing breaks."""
    for sample in bench.samples:
        arguments = leaves(sample)
        for output in outputs_of(bench.case.call(*arguments)):
            if not output.requires_grad:
                continue
            cut = _Cut.apply(output)
            found = gradients_of(cut, arguments, [torch.ones_like(cut)], retain_graph=True)
            nothing: Gradients = dict.fromkeys(found)
            bench.same_gradients(sample, found, nothing, " for an undefined upstream gradient")


def linear_in_upstream(bench: Bench) -> None:
    """Of sums, of -1 and of a million times an upstream gradient come the same of the results."""
    for sample in bench.samples:
        one = bench.upstream(bench.case.call, sample)
        other = bench.upstream(bench.case.call, sample)
        for factor, more in ((2.0, other), (-1.0, None), (1e6, None)):
            both = one if more is None else other
            mixed = [
                factor * u if more is None else factor * u + v
                for u, v in zip(one, both, strict=True)
            ]
            of_one, of_other, of_mixed = (
                gradients(bench.case.call, leaves(sample), u)[1] for u in (one, other, mixed)
            )
            expected: Gradients = {}
            for i, gradient in of_one.items():
                added = of_other[i]
                if gradient is not None and added is not None:
                    expected[i] = factor * gradient + (added if more is not None else 0)
            bench.same_gradients(
                sample,
                _where_finite(of_mixed, expected),
                _where_finite(expected, expected),
                f" for {factor:g} times an upstream gradient",
                story="not linear in the upstream gradient",
            )


def _where_finite(found: Gradients, guide: Gradients) -> Gradients:
    """Where a slope is infinite nothing can be asked of 0 times it, nor of a sum."""
    masked: Gradients = {}
    for i, gradient in found.items():
        like = guide.get(i)
        masked[i] = (
            gradient
            if gradient is None or like is None
            else torch.where(like.isfinite(), gradient, 0.0)
        )
    return masked


def _constant(value: Tensor) -> Tensor:
    return value.flatten()[0].expand(value.shape) if value.numel() else value


class _Cut(Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None
