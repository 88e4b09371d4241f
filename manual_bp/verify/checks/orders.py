"""Second and third derivatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import graph_of, leaves, outputs_of, positions, subsets
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import SLOPE, check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import narrowest, widened
from manual_bp.verify.checks._shared import Change, Derivatives, against_reference
from manual_bp.verify.checks._slopes import (
    Slope,
    fault_of_reference,
    inner,
    slope,
    step_for,
    supported,
)

Weights = Sequence[Sequence[Tensor]]


@check(capability=True, builds_on=SLOPE)
def double_backward(ctx: CheckContext, sample: Sample) -> None:
    """Second derivatives match the reference or the slopes, whichever arguments are frozen."""
    _judge_order(ctx, sample, 2)
    _compare_frozen(ctx, sample)


@check(capability=True, builds_on=(*SLOPE, "double_backward"))
def third_order(ctx: CheckContext, sample: Sample) -> None:
    """Third derivatives match the reference, or the slopes where that is missing or wrong."""
    _judge_order(ctx, sample, 3)


@dataclass(frozen=True)
class _Point:
    """Where derivatives of one order are judged.

    sample, upstream: The arguments and the upstream gradients.
    weights: Random weights with which each derivative of a lower order is summed.
    directions: A random direction for each argument and each upstream gradient.
    names: What they are called.
    """

    sample: Sample
    upstream: Sequence[Tensor]
    weights: Weights
    directions: Sequence[Tensor]
    names: Sequence[str]

    def derivatives(self, call: Call, change: Change) -> Derivatives:
        """The derivatives of a call there."""
        weights = [change(weight) for weight in self.weights]
        return _higher(call, change(self.sample), change(self.upstream), weights)

    def widened(self) -> "_Point":
        """The same in float64."""
        return _Point(
            widened(self.sample),
            widened(self.upstream),
            [widened(weight) for weight in self.weights],
            widened(self.directions),
            self.names,
        )

    def slopes(self, ctx: CheckContext, call: Call, claimed: Derivatives) -> list[Slope]:
        """The slopes of the derivative of one order less, as this one has them and measured."""
        places = positions(self.sample)
        moved = [*places, *range(len(self.sample), len(self.sample) + len(self.upstream))]
        tensors = (*self.sample, *self.upstream)
        directions = dict(zip(moved, self.directions, strict=True))
        directions = ctx.directions_in_domain(tensors, directions)
        return [
            slope(
                name,
                partial(self._terms, ctx, call, tensors, i, directions[i]),
                [inner(derivative, directions[i])],
                step_for([tensors[i]]),
                rtol=ctx.case.rtol,
                atol=ctx.case.atol,
            )
            for i, name, derivative in zip(moved, self.names, claimed, strict=True)
        ]

    def _terms(
        self,
        ctx: CheckContext,
        call: Call,
        tensors: Sample,
        i: int,
        direction: Tensor,
        shift: float,
    ) -> Tensor:
        shifted = (*tensors[:i], tensors[i] + shift * direction, *tensors[i + 1 :])
        shifted = ctx.in_domain(shifted)
        count = len(self.sample)
        lower = _higher(call, shifted[:count], shifted[count:], self.weights[:-1])
        pairs = zip(lower, self.weights[-1], strict=False)
        return torch.cat([torch.zeros(1), *(inner(one, other) for one, other in pairs)])


def _judge_order(ctx: CheckContext, sample: Sample, order: int) -> None:
    point = _point(ctx, sample, order)
    if ctx.case.reference is None:
        _compare_with_slopes(ctx, point, order)
        return
    found, expected, budgets = against_reference(ctx, sample, point.derivatives)
    _require_graph(found, any(t is not None and t.any() for t in expected))
    what = f"derivative of order {order}"
    try:
        for name, one, other, budget in zip_longest(point.names, found, expected, budgets):
            _compare(ctx, f"{what} by {name}", one, other, order, budget=budget)
    except Mismatch as mismatch:
        none: Derivatives = [None] * len(point.names)
        ours = None if narrowest(sample) else point.slopes(ctx, ctx.call, found or none)
        theirs = point.widened().slopes(ctx, ctx.reference, expected or none)
        match supported(ours, theirs):
            case "call":
                ctx.notes.append(fault_of_reference(what, theirs))
            case "reference":
                raise mismatch.with_evidence("finite differences support the reference") from None
            case _:
                raise


def _point(ctx: CheckContext, sample: Sample, order: int) -> _Point:
    upstream = ctx.upstream(ctx.call, sample)
    moved = [*outputs_of(sample), *upstream]
    weights = [[ctx.random_like(t) for t in moved] for _ in range(order - 1)]
    directions = [ctx.random_like(t) for t in moved]
    names = [*map(ctx.label, positions(sample)), *["the upstream gradient"] * len(upstream)]
    return _Point(sample, upstream, weights, directions, names)


def _compare_with_slopes(ctx: CheckContext, point: _Point, order: int) -> None:
    if narrowest(point.sample) is not None:
        raise NotApplicable("no reference, and finite differences of a gradient need float64")
    found = point.derivatives(ctx.call, tuple)
    slopes = point.slopes(ctx, ctx.call, found or [None] * len(point.names))
    slopes = [along for along in slopes if not along.jumps]
    _require_graph(found, not all(along.agrees for along in slopes))
    for along in slopes:
        ctx.comparisons += 1
        along.require(f"derivative of order {order}")


def _compare_frozen(ctx: CheckContext, sample: Sample) -> None:
    """Compare second derivatives when only some tensors require gradients with those of all."""
    upstream = [u.requires_grad_() for u in ctx.upstream(ctx.call, sample)]
    weight = {i: ctx.random_like(sample[i]) for i in positions(sample)}
    for wanted in subsets(positions(sample)):
        expected = _second(ctx.call, leaves(sample), wanted, upstream, weight)
        for given in (upstream, [u.detach() for u in upstream]):
            found = _second(ctx.call, leaves(sample, wanted), wanted, given, weight)
            names = [*map(ctx.label, wanted)]
            others = ["the upstream gradient"] * (len(found) - len(wanted))
            where = f"when only {' and '.join([*names, *others[:1]])} require gradients"
            # Where the upstream gradient is constant, there is no derivative by it.
            for name, one, other in zip([*names, *others], found, expected, strict=False):
                _compare(ctx, f"derivative of order 2 by {name} {where}", one, other, 2)


def _compare(
    ctx: CheckContext,
    what: str,
    one: Tensor | None,
    other: Tensor | None,
    order: int,
    **options: Any,
) -> None:
    try:
        ctx.compare(what, one, other, **options)
    except Mismatch as mismatch:
        if mismatch.diagnosis:
            raise
        raise mismatch.diagnosed(
            f"a term of order {order} is missing: detached tensors are constants here, and so "
            f"is what forward computes and saves, unless it is an output "
            f"(once_differentiable refuses second derivatives)"
        ) from None


def _require_graph(found: Derivatives, is_needed: bool) -> None:
    """Constant slopes need no graph: all further derivatives are 0."""
    if not found and is_needed:
        raise RuntimeError("a derivative does not require a gradient: it has no graph")


def _higher(
    call: Call, sample: Sample, upstream: Sequence[Tensor], weights: Weights
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
        # What once_differentiable leaves in the graph. torch.autograd.grad only raises if its
        # inputs are behind it, and they are not: it would leave the term out.
        if any(node.name().endswith("::Error") for node in graph_of(found)):
            raise RuntimeError("once_differentiable: a derivative must not be differentiated again")
        values, given = [], []
        for value, random in zip(found, weight, strict=False):
            if value is not None and value.requires_grad:
                values.append(value)
                given.append(random)
        if not values:
            return []
    return list(torch.autograd.grad(values, by, given, allow_unused=True))


def _second(
    call: Call,
    arguments: Sample,
    wanted: Sequence[int],
    upstream: Sequence[Tensor],
    weight: dict[int, Tensor],
) -> Derivatives:
    """Differentiate the gradients of some arguments by those, and by an upstream leaf."""
    by = [*(arguments[i] for i in wanted), *(u for u in upstream if u.requires_grad)]
    pairs = [(t, u) for t, u in zip(outputs_of(call(*arguments)), upstream, strict=True)]
    values, given = zip(*[(t, u) for t, u in pairs if t.requires_grad], strict=True)
    found = torch.autograd.grad(
        values, [arguments[i] for i in wanted], given, create_graph=True, allow_unused=True
    )
    again = [
        (g, weight[i])
        for i, g in zip(wanted, found, strict=True)
        if g is not None and g.requires_grad
    ]
    if not again:
        return [None] * len(by)
    values, given = zip(*again, strict=True)
    return list(torch.autograd.grad(values, by, given, allow_unused=True))
