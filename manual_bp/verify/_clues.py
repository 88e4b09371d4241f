"""The gradients that known mistakes would give."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, leaves, positions
from manual_bp.verify._case import Call, Sample

Clue = tuple[str, Gradients]
Slopes = Callable[[Sample, Sequence[Tensor]], Gradients]

_BLOCKS = [2**power for power in range(4, 11)]
# Powers of two scale without rounding, and nothing overflows or vanishes.
_SCALES = (-1.0, 16.0, 1 / 16)


def known_mistakes(
    sample: Sample,
    upstream: Sequence[Tensor],
    expected: Gradients,
    right: Slopes,
    label: Callable[[int], str],
) -> Iterator[Clue]:
    """Each mistake, with the gradients that it would give. The most specific come first.

    Args:
        sample: The arguments.
        upstream: The upstream gradients.
        expected: The right gradients.
        right: Computes the right gradients from other arguments and upstream gradients.
        label: Gives the name of the argument at a position.
    """
    yield from _swapped(sample, expected, label)
    for mistakes in (_of_upstream, _of_rows, _of_outputs):
        for mistake, other in mistakes(upstream):
            yield from _attempt(mistake, partial(right, sample, other))
    for mistake, changed in _of_arguments(sample, label):
        yield from _attempt(mistake, partial(right, changed, upstream))
    for element, value in (("first", 0), ("last", -1)):
        if upstream and upstream[0].numel():
            scale = upstream[0].flatten()[value].item()
            yield (
                f"everything is scaled by the {element} element of the upstream gradient",
                {i: None if g is None else g * scale for i, g in expected.items()},
            )


def is_linear(call: Call, sample: Sample, upstream: Sequence[Tensor], found: Gradients) -> bool:
    """Whether gradients grow as the upstream gradient does; True if the call cannot be asked."""
    for scale in _SCALES:
        try:
            _, scaled = gradients(call, leaves(sample), [scale * u for u in upstream])
        except Exception:
            return True
        for i, gradient in found.items():
            other = scaled.get(i)
            if gradient is None or other is None:
                continue
            difference = float((other / scale - gradient).abs().double().norm())
            if difference > 1e-2 * float(gradient.abs().double().norm()):
                return False
    return True


def clues_for(
    i: int, clues: Callable[[], Iterable[tuple[str, Gradients]]]
) -> Iterator[tuple[str, Tensor]]:
    """The clues to the gradient of argument i."""
    for mistake, found in clues():
        value = found.get(i)
        if value is not None:
            yield mistake, value


def _attempt(mistake: str, compute: Callable[[], Gradients]) -> Iterator[Clue]:
    """The clue, unless the computation refuses the change."""
    try:
        found = compute()
    except Exception:
        return
    yield mistake, found


def _swapped(sample: Sample, expected: Gradients, label: Callable[[int], str]) -> Iterator[Clue]:
    places = [i for i, gradient in expected.items() if gradient is not None]
    for i in places:
        for j in places:
            if i != j and sample[i].shape == sample[j].shape:
                what = f"equal to the gradient of {label(j)}: two gradients are swapped"
                yield what, {i: expected[j]}


def _of_upstream(upstream: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    yield (
        "the upstream gradient is ignored, as if it were 1",
        [torch.ones_like(u) for u in upstream],
    )
    yield "the upstream gradient is applied twice", [u * u for u in upstream]
    if upstream and upstream[0].numel() > 1:
        yield (
            "only the first element of the upstream gradient is used, for all",
            [u.flatten()[:1].expand(u.numel()).view(u.shape) for u in upstream],
        )


def _of_rows(upstream: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Upstream gradients that are zero for some rows."""
    rows = upstream[0].shape[0] if upstream and upstream[0].ndim else 0
    if rows < 2:
        return
    what = "row of the batch counts: missing a sum over the batch"
    yield f"only the first {what}", [_some_rows(u, 0, 1) for u in upstream]
    yield f"only the last {what}", [_some_rows(u, rows - 1, rows) for u in upstream]
    for block in _BLOCKS:
        whole = rows // block * block
        if 0 < whole < rows:
            mistake = f"the rows from {whole} on do not count: the remainder of a block of {block}"
            yield mistake, [_some_rows(u, 0, whole) for u in upstream]


def _of_outputs(upstream: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    if len(upstream) > 1:
        for j in range(len(upstream)):
            mistake = f"what output {j} contributes is missing"
            yield mistake, [u * (i != j) for i, u in enumerate(upstream)]


def _of_arguments(sample: Sample, label: Callable[[int], str]) -> Iterator[tuple[str, Sample]]:
    for i in positions(sample):
        value, name = sample[i], label(i)
        if value.ndim >= 2 and value.shape[-1] == value.shape[-2]:
            mistake = f"right if {name} were transposed: a transpose is missing or too much"
            yield mistake, (*sample[:i], value.mT, *sample[i + 1 :])
        if value.is_complex():
            mistake = f"right if {name} were conjugate: a conjugate is missing or too much"
            conjugate = value.conj().resolve_conj()
            yield mistake, (*sample[:i], conjugate, *sample[i + 1 :])


def _some_rows(upstream: Tensor, start: int, stop: int) -> Tensor:
    """An upstream gradient that is zero outside these rows; the same if it has too few."""
    if not upstream.ndim or upstream.shape[0] < stop:
        return upstream
    kept = torch.zeros_like(upstream)
    kept[start:stop] = upstream[start:stop]
    return kept
