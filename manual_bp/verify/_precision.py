"""The exact results in float64, and what the reference loses in a lower precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manual_bp.verify._autograd import Gradients, gradients, gradients_of, leaves, tensors_of
from manual_bp.verify._budget import Budget, largest, noise_of, reference_budget
from manual_bp.verify._case import Call, Sample, is_differentiable

WIDE = {torch.float64, torch.complex128}
Pairs = list[tuple[Tensor, Tensor]]


def widen(value: Any) -> Any:
    """A floating tensor in float64, a complex one in complex128, anything else as it is."""
    if not is_differentiable(value):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def widened(values: Sequence[Any]) -> tuple[Any, ...]:
    """All values, widened."""
    return tuple(map(widen, values))


def narrowest(values: Sequence[Any]) -> torch.dtype | None:
    """The dtype with the largest eps; None if all are float64 or complex128."""
    dtypes = {v.dtype for v in values if is_differentiable(v)} - WIDE
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def exact(
    call: Call,
    arguments: Sample,
    upstream: Sequence[Tensor],
    wanted: Sequence[int] | None = None,
) -> tuple[Any, Gradients]:
    """The result and the gradients in float64, from the arguments as they were rounded."""
    return gradients(call, leaves(widened(arguments), wanted), widened(upstream))


def distance(one: Tensor, other: Tensor | None) -> float:
    """The norm of the difference of two gradients; infinity if they do not compare."""
    return math.inf if other is None or one.shape != other.shape else float((one - other).norm())


@dataclass
class Loss:
    """What the reference loses at one sample in the dtype of the sample.

    outputs: For each output, the reference's and the exact one.
    gradients: For each argument, its gradient by the reference and the exact one, for each of
        several upstream gradients.
    terms: How many terms a sum over an argument has at most.
    is_low: Whether the sample has a lower precision than float64. If not, there are no budgets.
    slack: A factor of the budgets.
    factor: How many times the usual sample an argument is.
    usual: The loss at that sample. Relative to the largest element, the error is taken to be no
        smaller here, nor, with a factor, relative to as many times the usual element.
    """

    is_low: bool = False
    slack: float = 1.0
    factor: float = 1.0
    usual: "Loss | None" = None
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradients: dict[int, Pairs] = field(default_factory=dict)
    terms: int = 1

    def noise(self, i: int | None, dtype: torch.dtype) -> float:
        """The error of the gradient of argument i (None: of the outputs), as `noise_of` has it."""
        pairs = self.outputs if i is None else self.gradients.get(i, [])
        return noise_of(pairs, dtype) if pairs else 8 * torch.finfo(dtype).eps

    def error(self, i: int | None) -> float:
        """The same, as the largest absolute error; 0 if it is not known."""
        pairs = self.outputs if i is None else self.gradients.get(i, [])
        return max([largest(widen(peer) - exact) for peer, exact in pairs], default=0.0)

    def _least(self, i: int | None, dtype: torch.dtype, expected: Tensor) -> float:
        if self.usual is None or not self.usual.is_low:
            return 0.0
        least = self.usual.noise(i, dtype) * largest(expected)
        if self.factor > 1:
            pairs = self.usual.outputs if i is None else self.usual.gradients.get(i, [])
            size = max([largest(right) for _, right in pairs], default=0.0)
            least += torch.finfo(dtype).eps * self.factor * size
        return least

    def _budget(self, i: int | None, got: Tensor, expected: Tensor, pairs: Pairs) -> Budget:
        # A result in a wider dtype than the reference's need not be more exact.
        dtype = narrowest([got, *(peer for peer, _ in pairs)]) or got.dtype
        least = self._least(i, dtype, expected)
        return reference_budget(dtype, pairs, expected, self.terms, self.slack, least)

    def output_budgets(self, got: Any, expected: Any) -> dict[int, Budget]:
        """The budget of each output."""
        return {
            j: self._budget(None, one, other, self.outputs[j : j + 1])
            for j, (one, other) in enumerate(
                zip(tensors_of(got), tensors_of(expected), strict=False)
            )
            if self.is_low and is_differentiable(one) and is_differentiable(other)
        }

    def gradient_budgets(self, got: Gradients, expected: Gradients) -> dict[int, Budget]:
        """The budget of each gradient."""
        return {
            i: self._budget(i, one, other, self.gradients.get(i, []))
            for i, other in expected.items()
            if self.is_low and other is not None and (one := got.get(i)) is not None
        }


def loss(
    reference: Call,
    arguments: Sample,
    upstreams: Sequence[Sequence[Tensor]],
    wanted: Sequence[int] | None = None,
) -> Loss:
    """Measure what a reference loses; nothing is known if it does not run in this dtype."""
    terms = max([t.numel() for t in arguments if isinstance(t, Tensor)], default=1)
    found = Loss(is_low=True, terms=terms)
    try:
        result, peers = _repeated(reference, leaves(arguments, wanted), upstreams)
    except Exception:
        return found
    exact_upstreams = list(map(widened, upstreams))
    right, rights = _repeated(reference, leaves(widened(arguments), wanted), exact_upstreams)
    found.outputs = list(zip(tensors_of(result), tensors_of(right), strict=True))
    for of_peer, of_exact in zip(peers, rights, strict=True):
        for i, peer in of_peer.items():
            if peer is not None and (gradient := of_exact[i]) is not None:
                found.gradients.setdefault(i, []).append((peer, gradient))
    return found


def _repeated(
    call: Call, variables: Sample, upstreams: Sequence[Sequence[Tensor]]
) -> tuple[Any, list[Gradients]]:
    """The result of one call, and its gradients for each of several upstream gradients."""
    result = call(*variables)
    return result, [gradients_of(result, variables, u, retain_graph=True) for u in upstreams]


def judged(got: Tensor, peer: Tensor, expected: Tensor) -> Tensor:
    """A result in float64, with the expected value where nothing is asked of it.

    Nothing is asked where the dtype cannot hold the value, or the reference overflows on the way.
    """
    asked = peer.isfinite() & (expected.abs() <= torch.finfo(got.dtype).max)
    return torch.where(asked, got.detach().to(expected.dtype), expected)
