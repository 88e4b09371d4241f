"""One layer in a pass: its parameters, its buffers, and how they follow their gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from manual_bp import _net
from manual_bp.training_step._learn import Learned


class Allocate(Protocol):
    """Makes a buffer (rows, columns); without rows, one row for each sample.

    In an ensemble of K networks, a buffer with a row for each sample is (K, N, columns).

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

    In an ensemble, every shape below has K in front, and products are batched. But if all networks
    read the same x, the first layers of all of them are one wide layer for its products, whose
    outputs are in columns side by side: there w_t is (in, K out), z is (N, K out), and so on.

    Attributes:
        mm, addmm: PyTorch's products for them.
        w: Weights (out, in); w_t: the same, (in, out); b: biases (out,), or None.
        learned_w: How w follows its gradient; None if w is frozen; learned_b likewise.
        z: Where weighted inputs go, (N, out). The first activation turns them into a, in place.
        a: The output of the last activation: z itself, unless there are several.
        a_prev: The a of the layer below; None for the first layer.
        sigma_: Computes a from z, in the buffers.
        grad_a: Where ∂C/∂a goes, (N, out).
        times_sigma_prime_: Turns ∂C/∂a into δ, in place.
        delta: Its error, (N, out), mostly in the memory of grad_a; delta_t: the same, (out, N).
        add_grad_w_: Adds the product of BP4 to the target of learned_w.
        grad_b: The buffer of ∂C/∂b, (out,).
        blocks: Some rows of delta_t, and the buffer of these rows of ∂C/∂w; for all rows. (See
            `make_blocks`.)
        sum_delta: Computes grad_b, BP3.
        below: The layer that δ is propagated to, if any.
    """

    __slots__ = (
        "a", "a_prev", "add_grad_w_", "addmm", "b", "below", "blocks", "delta", "delta_t", "grad_a",
        "grad_b", "learned_b", "learned_w", "mm", "sigma_", "sum_delta", "times_sigma_prime_", "w",
        "w_t", "z",
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
        is_batched = self.w.ndim > 2
        self.mm: Any = torch.bmm if is_batched else torch.mm
        self.addmm: Any = torch.baddbmm if is_batched else torch.addmm
        out = self.w.shape[-2]
        self.z = self.a = allocate(f"z {l}", out, out)
        self.delta = self.grad_a = delta
        self.delta_t = delta.mT
        self.grad_b = self.w.new_empty(self.w.shape[:-1])
        if is_batched and self.b is not None:
            self.b = self.b.unsqueeze(1)
        if self.learned_w is not None:
            target = self.learned_w.target
            self.add_grad_w_: Any = target.baddbmm_ if is_batched else target.addmm_
        self.a_prev: Tensor | None = None
        self.below: PassLayer | None = None
        self.blocks: list[tuple[slice, Tensor, Tensor, Tensor]] = []
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

    def widen(self, memory: Tensor) -> None:
        """Make one wide layer of the layers of all networks, which read the same x.

        Args:
            memory: Where δ goes, (K, N, out): that of a, or of its own if a is still needed after
                σ'. It is laid out as (N, K, out), so that δ has a column for each w_t.
        """
        networks, samples, out = self.z.shape
        wide = networks * out

        def side_by_side(columns: Tensor) -> Tensor:
            return columns.view(samples, networks, out).transpose(0, 1)

        # ∂C/∂a is not there yet when z is, and z is copied at once.
        z, self.z = self.z, self.grad_a.view(samples, wide)
        self.sigma_ = _one_after_another([partial(z.copy_, side_by_side(self.z)), self.sigma_])
        columns = memory.view(samples, wide)
        self.delta, self.delta_t = side_by_side(columns), columns.mT
        turn = partial(self.delta.copy_, self.grad_a)
        multiply = self.times_sigma_prime_

        def times_sigma_prime_(grad_a: Tensor) -> None:
            multiply(grad_a)
            turn()

        self.times_sigma_prime_ = times_sigma_prime_
        self.mm, self.addmm = torch.mm, torch.addmm
        self.w_t = self.w.flatten(0, 1).mT
        self.b = None if self.b is None else self.b.view(wide)
        if self.learned_w is not None:
            self.add_grad_w_ = self.learned_w.target.flatten(0, 1).addmm_

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
        """Set `blocks`, in one buffer with room for those of all layers.

        Each is a slice of rows of w, or of networks; delta_t of these; the buffer that receives the
        product; and the same memory shaped as these rows of w.
        """
        assert self.learned_w is not None
        for rows, w, _ in self.learned_w.blocks:
            wide = w.flatten(0, -2)
            product = allocate("gradient", wide.shape[1], room, len(wide))
            grad_w = product.view(w.shape)
            if self.delta_t.ndim == w.ndim:
                self.blocks.append((rows, self.delta_t[rows], grad_w, grad_w))
            else:
                samples = self.delta_t.shape[-1]
                delta_t = self.delta_t.view(*self.w.shape[:2], samples)[rows].flatten(0, 1)
                self.blocks.append((rows, delta_t, product, grad_w))


def _one_after_another(calls: Sequence[Callable[..., object]]) -> Callable[..., object]:
    """One function that makes all the calls, with the same arguments."""
    if len(calls) == 1:
        return calls[0]

    def call(*args: Tensor) -> None:
        for each in calls:
            each(*args)

    return call
