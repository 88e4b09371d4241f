"""What several checks share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from manual_bp._torch import expected_gradient, is_of_operator
from manual_bp.verify._autograd import (
    Gradients,
    custom_nodes,
    gradients_of,
    leaves,
    node_name,
    outputs_of,
    positions,
    tensors_of,
)
from manual_bp.verify._budget import Budget, exact_budget, reference_budget
from manual_bp.verify._case import Call, Sample, is_differentiable
from manual_bp.verify._clues import Clue, known_mistakes
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._precision import Loss, exact, judged, narrowest, widened

UNWRITTEN = "memory of torch.empty is read before all of it is written"
TO_GRADIENT_OF = (
    "if that is on purpose, as in a straight-through estimator, give a function that has the "
    "intended gradient as gradient_of"
)

Derivatives = list[Tensor | None]
Change = Callable[[Sequence[Any]], tuple[Any, ...]]


def compare_with_reference(
    ctx: CheckContext,
    arguments: Sample,
    where: str = "",
    *,
    change: Callable[[Call], Call] = lambda call: call,
    wanted: Sequence[int] | None = None,
    is_cast: bool = False,
    factor: float = 1.0,
    usual: tuple[Any, Gradients] | None = None,
    judges_kinks: bool = False,
) -> None:
    """Compare outputs and gradients with the reference's, unless it refuses the arguments.

    The arguments are mapped into the domains of the case. Where the reference gives nan, though no
    argument is nan, nothing is asked, and no gradient if an output is nan.

    The reference runs in float64, from the arguments as they are. In a lower precision the budget
    is what the reference itself loses there. Where its output is not finite (a logarithm below
    0) or it refuses the gradient, the call may refuse the arguments too.

    Args:
        ctx: The context.
        arguments: A sample, or one like it.
        where: Added to the names in messages.
        change: What is done to the call and the reference alike.
        wanted: The positions of the arguments that require gradients; by default all.
        is_cast: Whether the check chose the dtype, not the case. Then outputs must have the dtype
            of the reference's, and four times the rounding is allowed for.
        factor: How many times the sample an argument is. Large ones may pass a threshold, and what
            cancels is as much larger.
        usual: Outputs and gradients of the usual size, where these may cancel to zero.
        judges_kinks: See `compare_slopes`.
    """
    call, reference = change(ctx.call), change(ctx.reference)
    arguments = ctx.in_domain(arguments)
    exact_variables = leaves(widened(arguments), wanted)
    try:
        right = reference(*exact_variables)
    except Exception:
        return
    variables = leaves(arguments, wanted)
    try:
        result = call(*variables)
        upstream = [ctx.random_like(t) for t in outputs_of(result)]
        found = gradients_of(result, variables, upstream)
    except Exception:
        is_finite = all(t.isfinite().all() for t in outputs_of(right))
        ones = [torch.ones_like(t) for t in outputs_of(right)]
        if is_finite and _gradients_unless_refused(right, exact_variables, ones) is not None:
            raise
        return
    # Before another call of the reference changes the parameters that a checkpoint still needs.
    expected = _gradients_unless_refused(right, exact_variables, widened(upstream))
    lost = ctx.loss(arguments, [upstream], reference, wanted)
    is_large = factor > 1
    lost.usual, lost.factor = ctx.usual_loss(), factor
    lost.slack = 4.0 if is_large or is_cast else 1.0
    sizes, scales = usual or ((), {})
    compare_values(ctx, result, right, lost, where, same_dtype=is_cast, sizes=sizes)
    is_undefined = _has_nan(tensors_of(right)) and not _has_nan(arguments)
    if expected is None or is_undefined:
        return
    clues = clues_from(ctx, reference, arguments, upstream, expected)
    options: dict[str, Any] = {"clues": clues, "is_large": is_large, "scales": scales}
    compare_slopes(
        ctx, arguments, found, expected, lost, where, judges_kinks=judges_kinks, **options
    )


def clues_from(
    ctx: CheckContext,
    reference: Call,
    arguments: Sample,
    upstream: Sequence[Tensor],
    expected: Gradients,
) -> Callable[[], Iterator[Clue]]:
    """The gradients that known mistakes would give, computed with the reference when asked for."""

    def right(changed: Sample, other: Sequence[Tensor]) -> Gradients:
        return exact(reference, changed, other)[1]

    wide = widened(arguments)
    return partial(known_mistakes, wide, widened(upstream), expected, right, ctx.label)


def _has_nan(values: Sequence[Any]) -> bool:
    return any(is_differentiable(t) and bool(t.isnan().any()) for t in values)


def _gradients_unless_refused(
    result: Any, variables: Sample, upstream: Sequence[Tensor]
) -> Gradients | None:
    """The gradients of a reference; None if it refuses, as for a matrix that became singular."""
    try:
        return gradients_of(result, variables, upstream)
    except Exception:
        return None


def compare_values(
    ctx: CheckContext,
    got: Any,
    right: Any,
    lost: Loss,
    where: str = "",
    *,
    same_dtype: bool = False,
    sizes: Any = (),
) -> None:
    """Compare the outputs of a call with the exact ones.

    sizes: Outputs of the usual size, where these may cancel to zero.
    """
    ours = list(tensors_of(got))
    for j, (one, (peer, expected)) in enumerate(zip(ours, lost.outputs, strict=False)):
        if is_differentiable(one) and one.shape == expected.shape:
            require_dtype(f"output{where}", one.dtype, peer.dtype, same_dtype=same_dtype)
            ours[j] = judged(one, peer, expected)
    pairs = enumerate(zip(tensors_of(right), tensors_of(sizes), strict=False))
    usual = {j: exact_budget(t, size) for j, (t, size) in pairs if is_differentiable(t)}
    budgets = lost.output_budgets(got, right) or usual
    ctx.compare_outputs(tuple(ours), right, where, budgets=budgets)


def compare_slopes(
    ctx: CheckContext,
    arguments: Sample,
    got: Gradients,
    expected: Gradients,
    lost: Loss,
    where: str = "",
    *,
    judges_kinks: bool = False,
    **options: Any,
) -> None:
    """Compare the gradients of a call with the exact ones.

    Where the exact ones jump, which numbers of low precision often hit, rounding decides which one
    is found. There nothing is asked, unless `judges_kinks` says that the caller judges that itself.
    """
    ours = dict(got)
    for i, pairs in lost.gradients.items():
        one, right = got.get(i), expected.get(i)
        if one is not None and right is not None:
            ours[i] = judged(one, pairs[0][0], right)
    budgets = lost.gradient_budgets(got, expected)
    try:
        ctx.compare_gradients(arguments, ours, expected, where, budgets=budgets, **options)
    except Mismatch:
        if judges_kinks or narrowest(arguments) is None or not ctx.is_at_kink(arguments):
            raise
        raise NotApplicable("a sample is at a kink, where rounding decides the gradient") from None


def against_reference(
    ctx: CheckContext, sample: Sample, run: Callable[[Call, Change], Derivatives]
) -> tuple[Derivatives, Derivatives, list[Budget | None]]:
    """What a computation gives for the call and, in float64, for the reference, with budgets.

    Args:
        ctx: The context.
        sample: The arguments.
        run: The computation, of a call and what widens its tensors (or leaves them as they are).
    """
    expected = run(ctx.reference, widened)
    found = run(ctx.call, tuple)
    # A call may round to a lower precision than that of its arguments, as a cast does.
    if narrowest((*sample, *found)) is None:
        return found, expected, [None] * len(expected)
    try:
        peers = run(ctx.reference, tuple)
    except Exception:
        peers = []
    terms = max(t.numel() for t in sample if isinstance(t, Tensor))
    usual = ctx.usual_loss()
    # A derivative of higher order sums gradients, whose errors may happen to cancel.
    least = max(usual.error(i) for i in (None, *usual.gradients)) * math.sqrt(terms)
    budgets: list[Budget | None] = []
    for k, (one, peer, right) in enumerate(zip_longest(found, peers, expected)):
        if one is None or right is None:
            budgets.append(None)
            continue
        pairs = [] if peer is None else [(peer, right)]
        found[k] = judged(one, one if peer is None else peer, right)
        budgets.append(reference_budget(one.dtype, pairs, right, terms, slack=4, least=least))
    return found, expected, budgets


def changed(values: Mapping[int, Tensor | None], change: Change) -> Gradients:
    """The values of a dictionary, changed."""
    return dict(zip(values, change(list(values.values())), strict=True))


def require_dtype(what: str, got: torch.dtype, peer: torch.dtype, *, same_dtype: bool) -> None:
    """Raise a Mismatch unless a result has the dtype of the reference's, or one up to float32."""
    more = got.itemsize - peer.itemsize
    if got != peer and (same_dtype or not 0 < more <= 4 - peer.itemsize):
        diagnosis = "dtype demoted" if more < 0 else "promoted by a wider dtype"
        raise Mismatch(
            f"{what}: expected {peer}, as the reference, got {got}\n"
            f"diagnosis: {diagnosis if more else 'wrong dtype'}"
        )


def refuse_operators(ctx: CheckContext, sample: Sample) -> None:
    """Refuse a call of operators of torch.library, for checks of forward mode."""
    if any(map(is_of_operator, custom_nodes(ctx.call(*leaves(sample))))):
        raise NotApplicable(
            "PyTorch drops the tangents of operators made with torch.library, without a warning: "
            "that is a fault of PyTorch, which offers no way to give an operator a forward mode"
        )


@contextmanager
def diagnosed(diagnosis: str) -> Iterator[None]:
    """Give a mismatch that is raised inside this diagnosis, unless it is empty."""
    try:
        yield
    except Mismatch as mismatch:
        raise (mismatch.diagnosed(diagnosis) if diagnosis else mismatch) from None


def require_custom_nodes(result: Any) -> list[Any]:
    """The nodes of hand-written Functions in the graph, for checks that need one."""
    nodes = custom_nodes(result)
    if not nodes:
        raise NotApplicable("no hand-written Function in the graph")
    return nodes


def compare_raw(ctx: CheckContext, arguments: Sample, result: Any) -> None:
    """Call every hand-written backward once more, by itself, with its own upstream gradients."""
    nodes = custom_nodes(result)
    received: dict[Any, Any] = {}
    for node in nodes:
        node.register_prehook(partial(received.__setitem__, node))
    upstream = [ctx.random_like(t) for t in outputs_of(result)]
    gradients_of(result, arguments, upstream, retain_graph=True)
    for node in nodes:
        if any(gradient is None for gradient in received.get(node, [None])):
            continue  # one of its outputs was not used
        with torch.no_grad():
            returned = node.apply(*received[node])
        returned = returned if isinstance(returned, tuple) else (returned,)
        edges = iter([edge for edge in node.next_functions if edge[0] is not None])
        # A backward may return fewer values than there are arguments, or more that are None.
        for i, (gradient, needed) in enumerate(zip(returned, node.needs_input_grad, strict=False)):
            if not needed:
                continue
            next_node, slot = next(edges)
            wanted = expected_gradient(next_node, slot)
            if gradient is not None and wanted is not None:
                ctx.comparisons += 1
                _compare_kind(node, i, gradient, wanted)


def _compare_kind(node: Any, i: int, gradient: Tensor, wanted: Any) -> None:
    for what, got, expected in (
        ("shape", tuple(gradient.shape), tuple(wanted.shape)),
        ("dtype", gradient.dtype, wanted.dtype),
        ("device", gradient.device, wanted.device),
    ):
        if got != expected:
            diagnosis = "missing a sum over the batch"
            if what == "dtype":
                is_wider = gradient.dtype.itemsize > wanted.dtype.itemsize
                diagnosis = "promoted by a tensor of a wider dtype" if is_wider else "dtype demoted"
            raise Mismatch(
                f"{what} of gradient {i} as {node_name(node)} returned it: expected {expected}, "
                f"got {got}\ndiagnosis: {diagnosis}; the autograd engine hides it by a cast"
            )


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """The real tensors of a sample in another dtype."""
    return tuple(
        t.detach().to(dtype) if is_differentiable(t) and not t.is_complex() else t for t in sample
    )


def require_real(sample: Sample) -> None:
    """Refuse a sample with complex tensors, for checks of lower precision."""
    if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
        raise NotApplicable("the sample is complex")


def pairs_of_one_shape(sample: Sample) -> list[tuple[int, int]]:
    """The pairs of arguments that one tensor could replace."""
    return [
        (i, j)
        for i in positions(sample)
        for j in positions(sample)
        if i < j and sample[i].shape == sample[j].shape and sample[i].dtype == sample[j].dtype
    ]


def tied(call: Call, i: int, j: int) -> Call:
    """The call with its argument i in the place of argument j as well."""

    def once(*arguments: Any) -> Any:
        return call(*arguments[:j], arguments[i], *arguments[j + 1 :])

    return once
