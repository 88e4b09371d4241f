"""A case as a check sees it."""

import math
import operator
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import (
    Gradients,
    copied,
    leaves,
    outputs_of,
    tensors_of,
)
from manual_bp.verify._budget import Budget, exact_budget, largest, rounding_budget
from manual_bp.verify._case import Call, Case, Dtypes, Sample, as_dtype, is_differentiable
from manual_bp.verify._clues import clues_for
from manual_bp.verify._compare import Mismatch, NotApplicable, compare
from manual_bp.verify._diagnose import threshold
from manual_bp.verify._domain import projected, projected_directions
from manual_bp.verify._global_state import seed_pytorch
from manual_bp.verify._precision import (
    WIDE,
    Loss,
    distance,
    exact,
    loss,
    narrowest,
    widened,
)
from manual_bp.verify._rounding import is_rounding

# How long a failed check looks at the other samples, and elsewhere.
_SECONDS = 2
# How near to a sample, relative to it, its gradient is looked at, and how much it then jumps.
_NEAR = 1e-6
_JUMP = 1e-3


class CheckContext:
    """A case as one check sees it.

    The random numbers depend on the check and the seed alone, not on what ran before.

    Attributes:
        samples: All samples of the case, in each of the dtypes of the case.
        current: The sample that the check is looking at, which messages name.
        judged: The samples to which the check applied, and at which it passed. Only they are
            evidence.
        failed: The samples at which it failed, each with what it raised.
        comparisons: How many comparisons were made.
        slopes: For each argument, along how many directions a slope was compared.
        kinks: Along how many directions none was, since the slope jumps there.
        notes: What the report says of a check that passed.
        calls_differ: Whether two calls with the same arguments gave different results.
        is_cause: Whether a failure would be new, and not follow from one that is known.
    """

    def __init__(self, case: Case, check: str) -> None:
        self.case, self.call, self.label = case, case.call, case.label
        # CPU generators use the lower 32 bits only.
        seed = zlib.crc32(f"{check} {case.seed}".encode())
        self.generator = torch.Generator().manual_seed(seed)
        seed_pytorch(seed)
        self.samples = [s for dtypes in case.dtypes for s in self.draw(dtypes)]
        self._losses: dict[int, Loss] = {}
        self.current: Sample | None = None
        self.judged: list[Sample] = []
        self.failed: list[tuple[Sample, Exception]] = []
        self.comparisons = 0
        self.slopes: Counter[str] = Counter()
        self.kinks = 0
        self.notes: list[str] = []
        self.calls_differ = False
        self.is_cause = True
        self._started = time.monotonic()

    def may_go_on(self) -> bool:
        """Whether a failed check may go on, to find out where it fails."""
        return self.is_cause and time.monotonic() - self._started < _SECONDS

    @property
    def reference(self) -> Call:
        """The reference, for checks that need one."""
        if self.case.reference is None:
            raise NotApplicable("no reference was given")
        return self.case.reference

    @property
    def trusted(self) -> Call:
        """The reference, or the call itself if no reference was given."""
        return self.case.reference or self.call

    def in_dims(self, sample: Sample) -> tuple[int | None, ...]:
        """The sample dimension of each argument, for checks that need a sample with rows."""
        in_dims = self.case.in_dims
        if in_dims is None:
            raise NotApplicable("in_dims was not given: which dimension counts the samples?")
        pairs = [(t, d) for t, d in zip(sample, in_dims, strict=True) if d is not None]
        if not all(-t.ndim <= d < t.ndim and t.shape[d] for t, d in pairs):
            raise NotApplicable("the sample has no rows")
        return in_dims

    def draw(self, dtypes: Dtypes | None = None) -> list[Sample]:
        """Samples from the next random numbers; by default in the first dtype of the case."""
        dtypes = dtypes or self.case.dtypes[0]
        drawn = self.case.draw(self.generator)
        return [self.in_domain(self._converted(sample, dtypes)) for sample in drawn]

    def in_domain(self, arguments: Sample) -> Sample:
        """Arguments that a check has changed, mapped into the domains that the case declares.

        One that is in its domain, or has none, is returned as it is.
        """
        return projected(self.case.project, arguments)

    def is_in_domain(self, arguments: Sample) -> bool:
        """Whether each argument is in the domain that the case declares for it."""
        return all(map(operator.is_, self.in_domain(arguments), arguments))

    def directions_in_domain(
        self, arguments: Sample, directions: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """Directions, by position, changed so that arguments that move along stay in the domain."""
        return projected_directions(self.case.project, arguments, directions)

    def dtypes_of(self, sample: Sample) -> Dtypes:
        """The dtypes, of those of the case, in which a sample is."""
        place = next(i for i, other in enumerate(self.samples) if other is sample)
        return self.case.dtypes[place * len(self.case.dtypes) // len(self.samples)]

    def _converted(self, sample: Sample, dtypes: Dtypes) -> Sample:
        """A sample on the device of the case, with its floating tensors in these dtypes."""
        each = dtypes if isinstance(dtypes, tuple) else (dtypes,) * len(sample)
        return tuple(
            t if not isinstance(t, Tensor) else copied(t, self.case.device, as_dtype(t, dtype))
            for t, dtype in zip(sample, each, strict=True)
        )

    def random_like(self, value: Tensor) -> Tensor:
        """Normal random numbers with the shape, dtype and device of a tensor."""
        dtype = torch.complex128 if value.is_complex() else torch.float64
        drawn = torch.randn(value.shape, generator=self.generator, dtype=dtype)
        return drawn.to(value.device, value.dtype)

    def upstream(self, call: Call, sample: Sample) -> list[Tensor]:
        """A random upstream gradient for every output of a call."""
        return [self.random_like(t) for t in outputs_of(call(*leaves(sample, ())))]

    def is_at_kink(self, sample: Sample, upstream: Sequence[Tensor] = ()) -> bool:
        """Whether the exact gradient differs on two sides of a sample, very near to it.

        Args:
            sample: The arguments.
            upstream: The upstream gradients; by default random ones.
        """
        wide, call = widened(sample), self.trusted
        steps = [_NEAR * t.abs() * self.random_like(t) if is_differentiable(t) else 0 for t in wide]
        sides: list[Gradients] = []
        try:
            upstream = upstream or self.upstream(call, wide)
            for sign in (1, -1):
                pairs = zip(wide, steps, strict=True)
                moved = tuple(t + sign * s if is_differentiable(t) else t for t, s in pairs)
                sides.append(exact(call, self.in_domain(moved), upstream)[1])
        except Exception:
            return False  # out of the domain
        return any(
            distance(one, sides[1][i]) > _JUMP * float(one.norm())
            for i, one in sides[0].items()
            if one is not None
        )

    def each(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """One sample after the other; each is the current one in its turn."""
        for sample in samples:
            self.current = sample
            yield sample
        self.current = None

    def located(self, message: str) -> str:
        """A message that names the current sample, if there are several."""
        if self.current is None or len(self.samples) == 1:
            return message
        number = 1 + next(i for i, sample in enumerate(self.samples) if sample is self.current)
        low = narrowest(self.current)
        shapes = [str(tuple(t.shape)) for t in tensors_of(self.current)]
        noun = "shape" if len(shapes) == 1 else "shapes"
        where = f"{noun} {', '.join(shapes)}" + (f", {low}" if low else "")
        return f"sample {number} of {len(self.samples)}, {where}: {message}"

    def loss(
        self,
        sample: Sample,
        upstreams: Sequence[Sequence[Tensor]] = (),
        reference: Call | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Loss:
        """What the reference, or a change of it, loses in the dtype of a sample."""
        if self.case.reference is None or narrowest(sample) is None:
            return Loss(is_low=narrowest(sample) is not None)
        reference = reference or self.case.reference
        given = list(upstreams) or [self._upstream_of_reference(sample)]
        more = [[self.random_like(u) for u in given[0]] for _ in range(3)]
        return loss(reference, sample, [*given, *more], wanted)

    def _upstream_of_reference(self, sample: Sample) -> list[Tensor]:
        # A call would change the parameters of a module, which a checkpoint may still need.
        results = outputs_of(self.trusted(*leaves(widened(sample), ())))
        return [self.random_like(t).to(as_dtype(t, narrowest(sample))) for t in results]

    def usual_loss(self) -> Loss:
        """What the reference loses at the current sample."""
        if self.current is None:
            return Loss()
        if id(self.current) not in self._losses:
            self._losses[id(self.current)] = self.loss(self.current)
        return self._losses[id(self.current)]

    def _budget(self, expected: Tensor, i: int | None, usual: Tensor | None = None) -> Budget:
        """The budget for two results of the call: outputs, or gradients of argument i."""
        if expected.dtype in WIDE:
            return exact_budget(expected, usual)
        lost = self.usual_loss()
        noise = lost.noise(i, expected.dtype)
        return rounding_budget(expected.dtype, largest(expected, usual), noise, lost.error(i))

    def compare(
        self, what: str, got: Tensor | None, expected: Tensor | None, **options: Any
    ) -> None:
        """Count a comparison, and raise a Mismatch if it fails."""
        self.comparisons += 1
        like = got if expected is None else expected
        if like is not None and is_differentiable(like):
            budget = options.get("budget") or self._budget(like, None)
            options["budget"] = budget.widened_by(self.case.rtol, self.case.atol, like)
        compare(what, got, expected, **options)

    def compare_outputs(
        self,
        got: Any,
        expected: Any,
        where: str = "",
        *,
        budgets: Mapping[int, Budget] | None = None,
    ) -> None:
        """Compare all outputs of two calls; without budgets, as of one candidate."""
        ours, theirs = tensors_of(got), tensors_of(expected)
        if len(ours) != len(theirs):
            raise Mismatch(f"number of outputs{where}: expected {len(theirs)}, got {len(ours)}")
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            name = "output" if len(ours) == 1 else f"output {i}"
            if is_differentiable(one) or is_differentiable(other):
                self.compare(
                    name + where,
                    one.detach(),
                    other.detach(),
                    sizes=_sizes(self.current or ()),
                    budget=(budgets or {}).get(i),
                )
                continue
            self.comparisons += 1
            if not torch.equal(one, other):
                raise Mismatch(f"{name}{where}, of {one.dtype}: not the expected one")

    def compare_gradients(
        self,
        sample: Sample,
        got: Gradients,
        expected: Gradients,
        where: str = "",
        *,
        clues: Callable[[], Iterable[tuple[str, Gradients]]] = tuple,
        diagnosis: str = "",
        scales: Gradients | None = None,
        budgets: Mapping[int, Budget] | None = None,
        is_large: bool = False,
    ) -> None:
        """Compare the gradients of all arguments.

        Args:
            sample: The arguments.
            got: Their gradients.
            expected: The right gradients.
            where: Added to the name of the gradient in messages.
            clues: Gives diagnoses with the gradients that those mistakes would give. It is called
                only if a gradient is wrong.
            diagnosis: The diagnosis, if it is already known.
            scales: Gradients of the usual size, where the expected ones may cancel to zero.
            budgets: How far they may differ; by default as two results of one candidate.
            is_large: Whether the arguments are so large that a threshold may have been passed.
        """
        for i, right in expected.items():
            like = got.get(i) if right is None else right
            budget = (budgets or {}).get(i)
            if budget is None and like is not None:
                budget = self._budget(like, i, (scales or {}).get(i))
            try:
                self.compare(
                    f"gradient of {self.label(i)}{where}",
                    got.get(i),
                    right,
                    clues=partial(clues_for, i, clues),
                    sizes=_sizes(sample),
                    budget=budget,
                )
            except Mismatch as mismatch:
                if self._is_rounding(sample, i, got.get(i), expected[i]):
                    continue
                known = diagnosis or (is_large and threshold(sample[i], got.get(i), expected[i]))
                if not known:
                    raise
                raise mismatch.diagnosed(known) from None

    def _is_rounding(
        self, sample: Sample, i: int, got: Tensor | None, expected: Tensor | None
    ) -> bool:
        """Whether the reference's gradient is not exact enough to tell two gradients apart."""
        reference = self.case.reference
        with suppress(Exception):  # the reference refuses the sample
            if reference is None or narrowest(sample) is not None:
                return False
            upstreams = [self.upstream(reference, sample) for _ in range(5)]
            return is_rounding(reference, sample, i, upstreams, got, expected)
        return False


def _sizes(sample: Sample) -> list[int]:
    shapes = [t.shape for t in sample if isinstance(t, Tensor)]
    return [size for shape in shapes for size in (*shape, math.prod(shape))]
