"""Where a check works: the samples, random numbers of its own, and a count of its comparisons."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_bp.verify._case import Case, Sample, is_differentiable
from manual_bp.verify._compare import Mismatch, NotApplicable, compare

Call = Callable[..., Any]
Gradients = dict[int, Tensor | None]

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}


class Bench:
    """One check's view of a case. The same seed gives the same numbers, whatever ran before."""

    def __init__(self, case: Case, check: str) -> None:
        self.case = case
        self.comparisons = 0
        self.kinks = 0  # directions in which no slope can be taken
        # CPU generators look at the lower 32 bits only.
        seed = zlib.crc32(f"{check} {case.seed}".encode())
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.samples = self.drawn()

    def drawn(self) -> list[Sample]:
        """Samples from the random numbers that come next."""
        drawn = self.case.draw(self.generator)
        return [tuple(self._placed(t) for t in sample) for sample in drawn]

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not is_differentiable(value):
            return value.to(self.case.device)
        dtype = torch.complex128 if value.is_complex() else torch.float64
        return value.detach().to(self.case.device, dtype, copy=True)

    def most_telling(self) -> Sample:
        """The sample that shows the most gradients; it alone counts as evidence from here on."""
        best = max(self.samples, key=lambda s: sum(map(_shows, self._right(s).values())))
        self.samples = [best]
        return best

    def unseen(self) -> str:
        """Why a mistake in some gradient would not show at any sample; empty if it would."""
        right = [self._right(sample) for sample in self.samples]
        every = [gradient for found in right for gradient in found.values()]
        if not every:
            return "no output depends on an argument that can have a gradient"
        told = []
        for i in sorted({i for found in right for i in found}):
            reasons = {_blank(found[i]): None for found in right if i in found}
            if "" not in reasons:
                told.append(f"the gradient of {self.case.label(i)} {' or '.join(reasons)}")
        if told:
            return f"{', '.join(told)} at every sample"
        if any(g.ndim for g in every) and all(g.numel() <= 1 for g in every):
            return "every gradient has one element only: a sum, a mean and a transpose look alike"
        return ""

    def _right(self, sample: Sample) -> dict[int, Tensor]:
        """The gradients that come of what is trusted, without those that are None."""
        upstream = self.upstream(self.trusted, sample)
        _, found = gradients(self.trusted, leaves(sample), upstream)
        return {i: gradient for i, gradient in found.items() if gradient is not None}

    @property
    def trusted(self) -> Call:
        """The reference, or the case's own call if there is none."""
        return self.case.reference or self.case.call

    @property
    def reference(self) -> Call:
        """The reference, for checks that need one."""
        if self.case.reference is None:
            raise NotApplicable("no reference was given")
        return self.case.reference

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        """Which argument counts the samples, for checks that need to know."""
        if self.case.in_dims is None:
            raise NotApplicable("in_dims was not given: which dimension counts the samples?")
        return self.case.in_dims

    def with_rows(self) -> list[Sample]:
        """The samples that have a row; they alone count as evidence from here on."""
        self.samples = [
            sample
            for sample in self.samples
            if all(d is None or t.shape[d] for t, d in zip(sample, self.in_dims, strict=True))
        ]
        if not self.samples:
            raise NotApplicable("no sample has a row")
        return self.samples

    def random_like(self, value: Tensor) -> Tensor:
        """Normal random numbers in the shape, dtype and place of a tensor."""
        dtype = torch.complex128 if value.is_complex() else torch.float64
        drawn = torch.randn(value.shape, generator=self.generator, dtype=dtype)
        return drawn.to(value.device, value.dtype)

    def upstream(self, call: Call, sample: Sample) -> list[Tensor]:
        """A random upstream gradient for every output of a call."""
        return [self.random_like(t) for t in outputs_of(call(*leaves(sample, ())))]

    def same(self, what: str, got: Tensor | None, expected: Tensor | None, **options: Any) -> None:
        """Count a comparison, and raise a Mismatch if it fails."""
        self.comparisons += 1
        compare(what, got, expected, **options)

    def same_outputs(self, got: Any, expected: Any, where: str = "", **options: Any) -> None:
        """Compare all outputs of two calls."""
        ours, theirs = tensors_of(got), tensors_of(expected)
        if len(ours) != len(theirs):
            raise Mismatch(f"number of outputs{where}: expected {len(theirs)}, got {len(ours)}")
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            name = "output" if len(ours) == 1 else f"output {i}"
            if is_differentiable(one) or is_differentiable(other):
                self.same(name + where, one.detach(), other.detach(), **options)
                continue
            self.comparisons += 1
            if not torch.equal(one, other):
                raise Mismatch(f"{name}{where}, of {one.dtype}: not the expected one")

    def same_gradients(
        self,
        sample: Sample,
        got: Gradients,
        expected: Gradients,
        where: str = "",
        clues: Mapping[str, Gradients] | None = None,
        story: str = "",
        scales: Gradients | None = None,
        far_out: bool = False,
    ) -> None:
        """Compare the gradients of all arguments.

        Args:
            sample: The arguments.
            got: Their gradients.
            expected: What is right.
            where: Added to the name of the gradient in messages.
            clues: What known mistakes would give.
            story: The diagnosis, if it is known beforehand.
            scales: Gradients of the usual size, where the expected ones may cancel to nothing.
            far_out: Whether the arguments are so large that a limit may have been passed.
        """
        for i in expected:
            known = {k: v for k, g in (clues or {}).items() if (v := g.get(i)) is not None}
            try:
                self.same(
                    f"gradient of {self.case.label(i)}{where}",
                    got.get(i),
                    expected[i],
                    clues=known,
                    sizes=_sizes(sample),
                    scale=(scales or {}).get(i),
                )
            except Mismatch as mismatch:
                more = story
                if far_out and not more:
                    more = _large_only(sample[i], got.get(i), expected[i])
                if not more:
                    raise
                raise mismatch.diagnosed(more) from None


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """All tensors that a call gave, however they are nested."""
    return tuple(t for t in tree_leaves(value) if isinstance(t, Tensor))


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    """The differentiable tensors that a call gave."""
    return tuple(t for t in tensors_of(value) if is_differentiable(t))


def positions(sample: Sample) -> list[int]:
    """Where a sample holds tensors that a gradient can be asked for."""
    return [i for i, t in enumerate(sample) if is_differentiable(t)]


def leaves(sample: Sample, wanted: Sequence[int] | None = None) -> tuple[Any, ...]:
    """The arguments as fresh leaves; those at `wanted` (all, if None) want gradients."""
    chosen = positions(sample) if wanted is None else wanted
    return tuple(
        t.detach().clone().requires_grad_(i in chosen) if is_differentiable(t) else t
        for i, t in enumerate(sample)
    )


def gradients(
    call: Call, arguments: Sample, upstream: Sequence[Tensor], **options: Any
) -> tuple[Any, Gradients]:
    """What a call gives, and the gradient of every argument that wants one."""
    result = call(*arguments)
    return result, gradients_of(result, arguments, upstream, **options)


def gradients_of(
    result: Any, arguments: Sample, upstream: Sequence[Tensor], **options: Any
) -> Gradients:
    """The gradient of every argument that wants one, None where there is none."""
    wanted = [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.requires_grad]
    pairs = [(t, u) for t, u in zip(outputs_of(result), upstream, strict=True) if t.requires_grad]
    if not pairs:
        return dict.fromkeys(wanted)
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, [arguments[i] for i in wanted], given, allow_unused=True, **options
    )
    return dict(zip(wanted, found, strict=True))


def custom_nodes(result: Any) -> list[Any]:
    """The nodes of hand-written Functions in the graph of a result."""
    seen: set[Any] = set()
    queue = [t.grad_fn for t in outputs_of(result) if t.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [below for below, _ in node.next_functions if below is not None]
    return [node for node in seen if isinstance(node, BackwardCFunction)]


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in _MATRIX_PRODUCTS
        return func(*args, **(kwargs or {}))


def subsets(places: Sequence[int]) -> Iterator[list[int]]:
    """Every choice of some of the places: all of them if there are few, else one or all but one."""
    if len(places) <= 4:
        for number in range(1, 2 ** len(places)):
            yield [place for bit, place in enumerate(places) if number >> bit & 1]
        return
    for place in places:
        yield [place]
        yield [other for other in places if other != place]
    yield list(places)


def _blank(gradient: Tensor) -> str:
    """Why a wrong gradient could look like this one; empty if it could not."""
    if not gradient.numel():
        return "has no elements"
    if not gradient.isfinite().any():
        return "is not finite"
    return "" if _shows(gradient) else "is zero"


def _shows(gradient: Tensor) -> bool:
    return bool((gradient.isfinite() & (gradient != 0)).any())


def _sizes(sample: Sample) -> list[int]:
    shapes = [t.shape for t in sample if isinstance(t, Tensor)]
    return [size for shape in shapes for size in (*shape, math.prod(shape))]


def _large_only(value: Tensor, got: Tensor | None, expected: Tensor | None) -> str:
    if got is None or expected is None or got.shape != value.shape != () or value.numel() < 2:
        return ""
    wrong = (got - expected).abs() > 1e-6 * expected.abs()
    right = ~wrong & (expected != 0)
    if right.sum() < 2 or wrong.sum() < 2:
        return ""
    limit = value.abs()[wrong].min()
    if limit > value.abs()[right].max():
        return f"right except where the argument is large: wrong from {limit.item():.3g} on"
    return ""
