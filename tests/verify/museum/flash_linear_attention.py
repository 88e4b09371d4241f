"""Of fla-org/flash-linear-attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd import Function

from tests.verify.museum._exhibit import exhibit
from tests.verify.museum._precision import in_float32


def _positive(g: Generator) -> list[tuple[Any, ...]]:
    q, k = (0.1 + torch.rand(5, 3, generator=g) for _ in range(2))
    return [(q, k, torch.randn(5, 4, generator=g))]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without softmax, divided by the sum of the weights."""
    weights = (q @ k.mT).tril()
    return weights @ v / (q * k.cumsum(0)).sum(-1, keepdim=True)


@exhibit("fla-org/flash-linear-attention#875", _positive, linear_attention, fixed=linear_attention)
def severed_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys are summed for the denominator by a kernel that autograd does not see."""
    weights = (q @ k.mT).tril()
    return weights @ v / (q * k.detach().cumsum(0)).sum(-1, keepdim=True)


def _gated(g: Generator) -> list[tuple[Any, ...]]:
    x, gate = (torch.randn(5, 3, generator=g) for _ in range(2))
    return [(x, gate, torch.randn(4, 3, generator=g))]


def _gated_linear(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return F.linear(x * F.silu(gate), w)


class GatedLinear(Function):
    """(x silu(gate)) @ w.mT; backward computes x silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, gate, w)
        return _gated_linear(x, gate, w)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, gate, w = ctx.saved_tensors
        s, delta = torch.sigmoid(gate), grad @ w
        slope = s * (1 + gate * (1 - s))
        return delta * gate * s, delta * x * slope, grad.mT @ (x * gate * s)


@exhibit(
    "fla-org/flash-linear-attention#1071",
    _gated,
    _gated_linear,
    fixed=GatedLinear,
    in_dims=(0, 0, None),
)
class UngatedInput(GatedLinear):
    """The gradient of the weight is taken with the input as it was before the gate."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _, _ = ctx.saved_tensors
        return *GatedLinear.backward(ctx, grad)[:2], grad.mT @ x


WIDTH = 4


def _sequence(g: Generator) -> list[tuple[Any, ...]]:
    shapes = ((6, 2), (WIDTH, 2), (WIDTH,))
    return [tuple(torch.randn(*shape, generator=g) for shape in shapes)]


def _convolve(x: Tensor, state: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.cat([state, x])
    windows = every[1:].unfold(0, WIDTH, 1)
    return windows @ w, every[len(x) :]


class CausalConvolution(Function):
    """A causal convolution that starts from a state, and returns the state in which it ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, state, w)
        ctx.set_materialize_grads(True)
        y, final = _convolve(x, state, w)
        return y, final.clone()

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any, grad_final: Any) -> Any:
        x, state, w = ctx.saved_tensors
        every = torch.cat([state, x])
        slope = torch.zeros_like(every)
        slope[len(x) :] = grad_final
        for t, row in enumerate(grad, start=1):
            slope[t : t + WIDTH] += w[:, None] * row
        windows = every[1:].unfold(0, WIDTH, 1)
        return slope[WIDTH:], slope[:WIDTH], torch.einsum("td,tdw->w", grad, windows)


@exhibit(
    "fla-org/flash-linear-attention#1140",
    _sequence,
    _convolve,
    fixed=CausalConvolution,
    in_dims=(0, None, None),
)
class ShortSequence(CausalConvolution):
    """The final state's gradient is shifted if the sequence is shorter than the convolution."""

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_final: Any) -> Any:
        right = CausalConvolution.backward(ctx, grad, grad_final)
        missing = WIDTH - 1 - len(grad)
        if missing <= 0:
            return right
        slope, of_state, of_w = CausalConvolution.backward(ctx, grad, torch.zeros_like(grad_final))
        return slope + grad_final[1 : 1 + len(grad)], of_state, of_w


def _heads(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 5, 3, generator=g), torch.randn(2, 3, generator=g))]


def _decay(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.sigmoid()[:, None]


class Decay(Function):
    """Each head decays by its own gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Any:
        ctx.save_for_backward(x, gate)
        return _decay(x, gate)

    @staticmethod
    @in_float32
    def backward(ctx: Any, grad: Any) -> Any:
        x, gate = ctx.saved_tensors
        s = gate.sigmoid()
        return grad * s[:, None], (grad * x).sum(1) * s * (1 - s)


@exhibit("fla-org/flash-linear-attention#1115", _heads, _decay, fixed=Decay)
class GatesOfTheFirstHead(Decay):
    """Backward forgets the offset of the head, and reads the first head's gates for all heads."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, gate = ctx.saved_tensors
        _, of_gate = Decay.backward(ctx, grad)
        return grad * gate[:1].sigmoid()[:, None], of_gate
