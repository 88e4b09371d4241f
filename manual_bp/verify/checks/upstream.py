"""What comes from above: the upstream gradient in all its forms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify._bench import Bench, Gradients, gradients, gradients_of, leaves, outputs_of


def upstream_layouts(bench: Bench) -> None:
    """The strides of the upstream gradient do not matter, nor that it is expanded or zero."""
    for sample in bench.samples:
        for name, layout in _LAYOUTS.items():
            upstream = [layout(u) for u in bench.upstream(bench.case.call, sample)]
            plain = [u.clone(memory_format=torch.contiguous_format) for u in upstream]
            _, found = gradients(bench.case.call, leaves(sample), upstream)
            _, expected = gradients(bench.case.call, leaves(sample), plain)
            bench.same_gradients(
                sample,
                found,
                expected,
                f" for a {name} upstream gradient",
                story="right only for contiguous upstream gradients",
            )
        zero = [torch.zeros_like(u) for u in bench.upstream(bench.case.call, sample)]
        _, found = gradients(bench.case.call, leaves(sample), zero)
        nothing: Gradients = dict.fromkeys(found)
        bench.same_gradients(sample, found, nothing, " for an upstream gradient of zeros")


def upstream_undefined(bench: Bench) -> None:
    """Where no gradient comes from above, none goes down, and nothing breaks."""
    for sample in bench.samples:
        arguments = leaves(sample)
        for output in outputs_of(bench.case.call(*arguments)):
            if not output.requires_grad:
                continue
            cut = _Cut.apply(output)
            found = gradients_of(cut, arguments, [torch.ones_like(cut)])
            nothing: Gradients = dict.fromkeys(found)
            bench.same_gradients(sample, found, nothing, " for an undefined upstream gradient")


def linear_in_upstream(bench: Bench) -> None:
    """Twice one upstream gradient plus another gives twice the one result plus the other."""
    for sample in bench.samples:
        one = bench.upstream(bench.case.call, sample)
        other = bench.upstream(bench.case.call, sample)
        both = [2 * u + v for u, v in zip(one, other, strict=True)]
        of_one, of_other, of_both = (
            gradients(bench.case.call, leaves(sample), u)[1] for u in (one, other, both)
        )
        expected: Gradients = {}
        for i, gradient in of_one.items():
            more = of_other[i]
            if gradient is not None and more is not None:
                expected[i] = 2 * gradient + more
        bench.same_gradients(sample, of_both, expected, story="not linear in the upstream gradient")


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "shifted": lambda t: torch.cat([t[:1], t])[1:] if t.ndim else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
    "constant (stride 0)": lambda t: t.flatten()[0].expand(t.shape) if t.numel() else t,
}


class _Cut(Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None
