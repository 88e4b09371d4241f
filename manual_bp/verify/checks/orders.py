"""Higher derivatives, and forward mode."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
    gradients,
    leaves,
    outputs_of,
    positions,
    tangents_of,
    with_tangents,
)
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import CheckContext, check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify.checks._shared import (
    Change,
    Derivatives,
    against_reference,
    changed,
    refuse_operators,
)


@check(capability=True)
def double_backward(ctx: CheckContext, sample: Sample) -> None:
    """Second derivatives, by the arguments and by the upstream gradient, match the reference."""
    _compare_order(ctx, sample, 2)


@check(capability=True)
def third_order(ctx: CheckContext, sample: Sample) -> None:
    """Third derivatives match the reference."""
    _compare_order(ctx, sample, 3)


@check(capability=True)
def forward_ad(ctx: CheckContext, sample: Sample) -> None:
    """Forward-mode derivatives, by all arguments and by each alone, match the reference."""
    refuse_operators(ctx, sample)
    places = positions(sample)
    for moved in [places, *([i] for i in places if len(places) > 1)]:
        tangents: Gradients = {i: ctx.random_like(sample[i]) for i in moved}

        def run(call: Call, change: Change, tangents: Gradients = tangents) -> Derivatives:
            return tangents_of(call, change(sample), changed(tangents, change))

        found, expected, budgets = against_reference(ctx, sample, run)
        names = ", ".join(map(ctx.label, moved))
        for one, other, budget in zip(found, expected, budgets, strict=True):
            ctx.compare(f"tangent of the output along {names}", one, other, budget=budget)


@check(capability=True)
def forward_over_reverse(ctx: CheckContext, sample: Sample) -> None:
    """The forward-mode derivative of the gradient matches the reference."""
    refuse_operators(ctx, sample)
    upstream = ctx.upstream(ctx.call, sample)
    places = positions(sample)
    tangents: Gradients = {i: ctx.random_like(sample[i]) for i in places}

    def run(call: Call, change: Change) -> Derivatives:
        along = changed(tangents, change)
        found = _tangents_of_gradients(call, change(sample), along, change(upstream))
        return [found.get(i) for i in places]

    found, expected, budgets = against_reference(ctx, sample, run)
    diagnosis = "second-order term missing"
    ctx.compare_gradients(
        sample,
        dict(zip(places, found, strict=True)),
        dict(zip(places, expected, strict=True)),
        ", its tangent",
        diagnosis=diagnosis,
        budgets={i: b for i, b in zip(places, budgets, strict=True) if b is not None},
    )


def _compare_order(ctx: CheckContext, sample: Sample, order: int) -> None:
    upstream = ctx.upstream(ctx.call, sample)
    weights = [
        [ctx.random_like(t) for t in (*outputs_of(sample), *upstream)] for _ in range(order - 1)
    ]

    def run(call: Call, change: Change) -> Derivatives:
        random = [change(weight) for weight in weights]
        return _higher(call, change(sample), change(upstream), random)

    found, expected, budgets = against_reference(ctx, sample, run)
    # Constant slopes need no graph: all further derivatives are 0.
    if not found and any(t is not None and t.any() for t in expected):
        raise RuntimeError("a derivative does not require a gradient: it has no graph")
    names = [ctx.label(i) for i in positions(sample)] + ["the upstream gradient"]
    for i, (one, other, budget) in enumerate(zip_longest(found, expected, budgets)):
        name = names[min(i, len(names) - 1)]
        try:
            ctx.compare(f"derivative of order {order} by {name}", one, other, budget=budget)
        except Mismatch as mismatch:
            if "diagnosis" in str(mismatch):
                raise
            raise mismatch.diagnosed(
                f"a term of order {order} is missing: detached tensors are constants here, and so "
                f"is what forward computes and saves, unless it is an output "
                f"(once_differentiable refuses second derivatives)"
            ) from None


def _higher(
    call: Call, sample: Sample, upstream: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]
) -> Derivatives:
    """Differentiate repeatedly, by arguments and upstream gradient, with random weights.

    Empty if some derivative on the way depends on nothing that it could be differentiated by.
    """
    arguments = leaves(sample)
    leaf_upstream = [u.detach().clone().requires_grad_() for u in upstream]
    by_arguments = [arguments[i] for i in positions(sample)]
    by = [*by_arguments, *leaf_upstream]
    values = [t for t in outputs_of(call(*arguments)) if t.requires_grad]
    given: list[Tensor] = leaf_upstream[: len(values)]
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
            return []
    return list(torch.autograd.grad(values, by, given, allow_unused=True))


def _tangents_of_gradients(
    call: Call, sample: Sample, tangents: Gradients, upstream: Sequence[Tensor]
) -> Gradients:
    with fwAD.dual_level():
        arguments = with_tangents(leaves(sample), tangents)
        _, found = gradients(call, arguments, upstream, create_graph=True)
        unpacked: Gradients = {}
        for i, gradient in found.items():
            tangent = None if gradient is None else fwAD.unpack_dual(gradient).tangent
            unpacked[i] = None if tangent is None else tangent.detach()
        return unpacked
