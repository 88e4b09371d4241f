"""One layer in a pass: its parameters, its buffers, and how they follow their gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Protocol

from torch import Tensor

from manual_bp import _net
from manual_bp.training_step._learn import Learned


class Allocate(Protocol):
    """Makes a buffer (rows, columns); without rows, one row for each sample.

    Buffers with the same name may share memory, which must then be enough for `widest` columns, or,
    with rows, for `widest` numbers.
    """

    def __call__(self, name: str, columns: int, widest: int, rows: int | None = None) -> Tensor: ...


def fresh_buffers(x: Tensor) -> Allocate:
    """Allocate a new buffer each time, with one row for each sample of x."""

    def allocate(name: str, columns: int, widest: int, rows: int | None = None) -> Tensor:
        del name, widest
        return x.new_empty(prod(x.shape[:-1]) if rows is None else rows, columns)

    return allocate


class PassLayer:
    """One layer's parameters and buffers in a pass.

    Attributes:
        w: Weights (out, in); w_t: the same, (in, out); b: biases (out,), or None.
        learned_w: How w follows its gradient; None if w is frozen; learned_b likewise.
        z: Where weighted inputs go, (N, out). The first activation turns them into a, in place.
        a: The output of the last activation: z itself, unless there are several.
        a_prev: The a of the layer below; None for the first layer.
        sigma_: Computes a from z, in the buffers.
        times_sigma_prime_: Turns ∂C/∂a into δ, in place.
        delta: Its error, (N, out); delta_t: the same, (out, N).
        grad_b: The buffer of ∂C/∂b, (out,).
        blocks: Some rows of delta_t, and the buffer of these rows of ∂C/∂w; for all rows.
        sum_delta: Computes grad_b, BP3.
        below: The layer that δ is propagated to, if any.
    """

    __slots__ = (
        "a", "a_prev", "b", "below", "blocks", "delta", "delta_t", "grad_b", "learned_b",
        "learned_w", "sigma_", "sum_delta", "times_sigma_prime_", "w", "w_t", "z",
    )  # fmt: skip

    def __init__(
        self,
        layer: _net.Layer,
        l: int,
        values: Mapping[str, Tensor],
        learned: Mapping[str, Learned],
        delta: Tensor,
        allocate: Allocate,
    ) -> None:
        w, b = f"{layer.name}.weight", f"{layer.name}.bias"
        self.w, self.b = values[w], values.get(b)
        self.w_t = self.w.mT
        self.learned_w, self.learned_b = learned.get(w), learned.get(b)
        out = len(self.w)
        self.z = self.a = allocate(f"z {l}", out, out)
        self.delta, self.delta_t = delta, delta.mT
        self.grad_b = self.w.new_empty(out)
        self.a_prev: Tensor | None = None
        self.below: PassLayer | None = None
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.sum_delta: Callable[[], object]
        sigmas: list[Callable[[], object]] = []
        primes: list[Callable[[Tensor], object]] = []
        for i, activation in enumerate(layer.activations):
            if i > 0:  # a buffer for each, because σ' of an inner activation needs its own a
                inner, self.a = self.a, allocate(f"z {l} {i}", out, out)
                sigmas.append(partial(self.a.copy_, inner))
            sigma_, times_sigma_prime_ = activation.bind(self.a)
            sigmas.append(sigma_)
            primes.append(times_sigma_prime_)
        self.sigma_ = _one_after_another(sigmas)
        self.times_sigma_prime_ = _one_after_another(primes[::-1])

    def keep_a(self, backup: Tensor) -> None:
        """Have σ' leave a as it is, by means of a copy in a buffer (N, out)."""
        save, restore = partial(backup.copy_, self.a), partial(self.a.copy_, backup)
        multiply = self.times_sigma_prime_

        def times_sigma_prime_(grad_a: Tensor) -> None:
            save()
            multiply(grad_a)
            restore()

        self.times_sigma_prime_ = times_sigma_prime_

    @property
    def largest_block(self) -> int:
        """How many numbers of ∂C/∂w are computed at a time."""
        assert self.learned_w is not None
        return self.w[self.learned_w.blocks[0][0]].numel()

    def make_blocks(self, allocate: Allocate, room: int) -> None:
        """Set `blocks`, in one buffer with room for those of all layers."""
        assert self.learned_w is not None
        for rows, w, _ in self.learned_w.blocks:
            grad_w = allocate("gradient", w.shape[1], room, len(w))
            self.blocks.append((self.delta_t[rows], grad_w))


def _one_after_another(calls: Sequence[Callable[..., object]]) -> Callable[..., object]:
    """One function that makes all the calls, with the same arguments."""
    if len(calls) == 1:
        return calls[0]

    def call(*args: Tensor) -> None:
        for each in calls:
            each(*args)

    return call
