"""The value, and the first derivative."""

from collections.abc import Sequence

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
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import Mismatch
from manual_bp.verify.checks._shared import LAYOUTS, is_plain

_NO_GRADIENT = (
    "\ndiagnosis: no gradient came at all; an argument that is to have none is best closed over, "
    "as in lambda x: Layer.apply(x, mask.to(x.dtype))"
)


def telling_samples(bench: Bench) -> None:
    """No gradient is zero, empty or of one element at all samples: a mistake would show."""
    bench.comparisons += len(bench.samples)
    if unseen := bench.unseen():
        raise Mismatch(f"{unseen}, so that a mistake would not show\ndiagnosis: unfit samples")


def forward_matches_reference(bench: Bench) -> None:
    """The value is the reference's."""
    for sample in bench.samples:
        right = bench.reference(*leaves(sample, ()))
        bench.same_outputs(bench.case.call(*leaves(sample, ())), right)


def argument_layouts(bench: Bench) -> None:
    """The strides of the arguments do not matter: value and gradients are those of a copy."""
    for sample in bench.samples:
        tensors = [i for i, t in enumerate(sample) if isinstance(t, Tensor)]
        for name, layout in LAYOUTS.items():
            for chosen in [tensors, *([i] for i in tensors if len(tensors) > 1)]:
                laid = tuple(layout(t) if i in chosen else t for i, t in enumerate(sample))
                if all(is_plain(laid[i]) for i in chosen):
                    continue
                where = f" for {name} {', '.join(bench.case.label(i) for i in chosen)}"
                try:
                    _compare_with_copy(bench, bench.case.call, laid, where)
                except Exception as problem:
                    if not _excused(bench, laid, problem):
                        raise


def finite_differences(bench: Bench) -> None:
    """The gradient is the slope: in random directions, and along every axis of small arguments."""
    judged: dict[str, int] = {}
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        result, found = gradients(bench.case.call, leaves(sample), upstream)
        upstream = [u * t.requires_grad for u, t in zip(upstream, outputs_of(result), strict=True)]
        for i in positions(sample):
            before = bench.comparisons
            gradient = found[i]
            for direction in _directions(bench, sample[i]):
                _compare_slope(bench, sample, i, direction, upstream, gradient)
            label = bench.case.label(i)
            judged[label] = judged.get(label, 0) + bench.comparisons - before
    left = [label for label, count in judged.items() if not count]
    if left and bench.case.reference is None:
        raise Mismatch(
            f"slopes by {', '.join(left)}: every direction starts at a kink, and there is no "
            f"reference to judge by\ndiagnosis: unfit samples, or a reference is missing"
        )


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


def _excused(bench: Bench, laid: Sample, problem: Exception) -> bool:
    """Whether the reference refuses such strides or values as well, or is wrong for them."""
    if bench.case.reference is None:
        return not isinstance(problem, Mismatch)
    try:
        _compare_with_copy(bench, bench.case.reference, laid, "")
    except Exception:
        return True
    return False


def _compare_with_copy(bench: Bench, call: Call, laid: Sample, where: str) -> None:
    copied = tuple(
        t.clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t for t in laid
    )
    upstream = bench.upstream(call, copied)
    right, expected = gradients(call, leaves(copied), upstream)
    # Not by leaves(), which would copy them.
    arguments = tuple(t.detach().requires_grad_() if is_differentiable(t) else t for t in laid)
    result, found = gradients(call, arguments, upstream)
    bench.same_outputs(result, right, where)
    story = "right only for contiguous arguments"
    bench.same_gradients(copied, found, expected, where, story=story)


def _directions(bench: Bench, value: Tensor) -> list[Tensor]:
    directions = [bench.random_like(value) for _ in range(3)]
    if value.numel() <= 24:
        axes = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        directions += [axis.view(value.shape) for axis in axes]
    return directions


def _compare_slope(
    bench: Bench,
    sample: Sample,
    i: int,
    direction: Tensor,
    upstream: Sequence[Tensor],
    gradient: Tensor | None,
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
    slope = (
        torch.zeros_like(direction.real) if gradient is None else (gradient.conj() * direction).real
    )
    size = slope.abs().sum() + numeric.abs()
    rounding = 1e-9 * here.abs() + 1e-9
    if (right - left).abs() > 1e-3 * size + 1e3 * rounding:
        bench.kinks += 1
        return
    bench.comparisons += 1
    if (slope.sum() - numeric).abs() > 1e-6 * size + rounding:
        ratio = (slope.sum() / numeric).item()
        story = "" if gradient is not None else _NO_GRADIENT
        raise Mismatch(
            f"slope along a direction of {bench.case.label(i)}: expected {numeric.item():.10g} by "
            f"finite differences, got {slope.sum().item():.10g}, ratio {ratio:.6g}{story}"
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
        return tensor.detach()  # an output that holds the graph that holds it is never freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*arguments)
    del result
    return sum(saved.values())
