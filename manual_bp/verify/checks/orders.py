"""Higher orders, and the other mode."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad as forward_ad_module

from manual_bp.verify._bench import Bench, Call, Gradients, gradients, leaves, outputs_of, positions
from manual_bp.verify._case import Sample
from manual_bp.verify._compare import Mismatch


def double_backward(bench: Bench) -> None:
    """Second derivatives, by the arguments and by the upstream gradient, as the reference."""
    _compare_order(bench, 2)


def third_order(bench: Bench) -> None:
    """Third derivatives as the reference."""
    _compare_order(bench, 3)


def forward_ad(bench: Bench) -> None:
    """Forward-mode derivatives, by all arguments and by each alone, as the reference."""
    for sample in bench.samples:
        places = positions(sample)
        for moved in [places, *([i] for i in places if len(places) > 1)]:
            tangents = {i: bench.random_like(sample[i]) for i in moved}
            found = _tangents(bench.case.call, sample, tangents)
            expected = _tangents(bench.reference, sample, tangents)
            names = ", ".join(bench.case.label(i) for i in moved)
            for one, other in zip(found, expected, strict=True):
                bench.same(f"tangent of the output along {names}", one, other)


def forward_over_reverse(bench: Bench) -> None:
    """The gradient's own forward-mode derivative, as the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        tangents = {i: bench.random_like(sample[i]) for i in positions(sample)}
        found = _tangents_of_gradients(bench.case.call, sample, tangents, upstream)
        expected = _tangents_of_gradients(bench.reference, sample, tangents, upstream)
        bench.same_gradients(
            sample, found, expected, ", its tangent", story="second-order term missing"
        )


def _compare_order(bench: Bench, order: int) -> None:
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        weights = [
            [bench.random_like(t) for t in (*outputs_of(sample), *upstream)]
            for _ in range(order - 1)
        ]
        found = _higher(bench.case.call, sample, upstream, weights)
        expected = _higher(bench.reference, sample, upstream, weights)
        # Constant slopes need no graph: all further derivatives are 0.
        if found is None and any(t is not None and t.any() for t in expected or ()):
            raise RuntimeError("a derivative does not require a gradient: it has no graph")
        found = found or [None] * len(expected or ())
        expected = expected or [None] * len(found)
        names = [bench.case.label(i) for i in positions(sample)] + ["the upstream gradient"]
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            name = names[min(i, len(names) - 1)]
            try:
                bench.same(f"derivative of order {order} by {name}", one, other)
            except Mismatch as mismatch:
                if "diagnosis" in str(mismatch):
                    raise
                raise mismatch.diagnosed(
                    f"a term of order {order} is missing: what is detached is a constant here, and "
                    f"so is what forward computes and saves, unless it is an output "
                    f"(once_differentiable refuses second derivatives)"
                ) from None


def _higher(
    call: Call, sample: Sample, upstream: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]
) -> list[Tensor | None] | None:
    """Differentiate again and again: by arguments and upstream gradient, weighted at random.

    None if a derivative on the way depends on nothing that could be differentiated by.
    """
    arguments = leaves(sample)
    above = [u.detach().clone().requires_grad_() for u in upstream]
    by_arguments = [arguments[i] for i in positions(sample)]
    by = [*by_arguments, *above]
    values = [t for t in outputs_of(call(*arguments)) if t.requires_grad]
    given: list[Tensor] = above[: len(values)]
    for order, weight in enumerate(weights):
        wanted = by if order else by_arguments
        found = torch.autograd.grad(values, wanted, given, create_graph=True, allow_unused=True)
        if any(g is not None and "Error" in str(g.grad_fn) for g in found):
            raise RuntimeError("a derivative is marked as not differentiable again")
        values, given = [], []
        for value, random in zip(found, weight, strict=False):
            if value is not None and value.requires_grad:
                values.append(value)
                given.append(random)
        if not values:
            return None
    return list(torch.autograd.grad(values, by, given, allow_unused=True))


def _tangents(call: Call, sample: Sample, tangents: dict[int, Tensor]) -> list[Tensor | None]:
    with forward_ad_module.dual_level():
        arguments = tuple(
            forward_ad_module.make_dual(t, tangents[i]) if i in tangents else t
            for i, t in enumerate(sample)
        )
        return [forward_ad_module.unpack_dual(t).tangent for t in outputs_of(call(*arguments))]


def _tangents_of_gradients(
    call: Call, sample: Sample, tangents: dict[int, Tensor], upstream: Sequence[Tensor]
) -> Gradients:
    with forward_ad_module.dual_level():
        arguments = tuple(
            forward_ad_module.make_dual(t, tangents[i]) if i in tangents else t
            for i, t in enumerate(leaves(sample))
        )
        _, found = gradients(call, arguments, upstream, create_graph=True)
        unpacked: Gradients = {}
        for i, gradient in found.items():
            tangent = None if gradient is None else forward_ad_module.unpack_dual(gradient).tangent
            unpacked[i] = None if tangent is None else tangent.detach()
        return unpacked
