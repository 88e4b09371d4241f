"""Right candidates of low precision, which the kit must pass: name and case.

Each is judged in bfloat16 and in float32 against a reference in float64.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify import function_case
from manual_bp.verify._autograd import positions
from manual_bp.verify._case import Case
from tests.verify import eager, fused

DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-5
Draw = Callable[[torch.Generator], list[tuple[Any, ...]]]


def normal(*shapes: tuple[int, ...]) -> Draw:
    """Draws one sample of normal random numbers in these shapes."""
    return lambda g: [tuple(torch.randn(shape, generator=g) for shape in shapes)]


def with_labels(classes: int, *shapes: tuple[int, ...]) -> Draw:
    """Draws as `normal` does, and a label for each row of the first shape."""
    draw = normal(*shapes)
    return lambda g: [(*draw(g)[0], torch.randint(classes, shapes[0][:1], generator=g))]


def low(name: str, fn: Any, samples: Draw, reference: Any, **options: Any) -> Case:
    """A case of a candidate that works in bfloat16 and in float32."""
    return function_case(fn, samples, reference, name=name, dtypes=DTYPES, **options)


def _probabilities(g: torch.Generator) -> list[tuple[Any, ...]]:
    ((p, q),) = normal((17, 40), (17, 40))(g)
    return [(p.log_softmax(-1), q.softmax(-1))]


def _decays(g: torch.Generator) -> list[tuple[Any, ...]]:
    ((x, a),) = normal((17, 40), (17, 40))(g)
    return [(x, a.sigmoid())]


def _indices(g: torch.Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(7, 40, generator=g), torch.randint(7, (129,), generator=g))]


def _logits_and_targets(g: torch.Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(17, 40, generator=g), torch.rand(17, 40, generator=g))]


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """w ⊙ x / √(mean(x²) + ε)."""
    return F.rms_norm(x, w.shape, w, EPS)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """PyTorch's, with the ε of the candidates."""
    return F.layer_norm(x, w.shape, w, b, EPS)


def layer_norm_by_steps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The same in single operations: the third derivatives of `F.layer_norm` are wrong."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * w + b


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return F.silu(gate) * up


def l2_norm(x: Tensor) -> Tensor:
    """x / √(Σ x² + ε)."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    return x.softmax(-1)


def softmax_by_steps(x: Tensor) -> Tensor:
    """The same in single operations, each of which rounds."""
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def sparsemax(x: Tensor) -> Tensor:
    """The projection onto the probabilities, whose slope jumps where an output becomes 0."""
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
    count = (ordered * rank > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, count - 1) / count).clamp(min=0)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v."""
    return softmax(q @ k.mT / math.sqrt(q.shape[-1])) @ v


def linear_cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of the logits x wᵀ."""
    return F.cross_entropy(x @ w.mT, target)


def dynamic_tanh(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """γ tanh(α x) + β."""
    return gamma * torch.tanh(alpha * x) + beta


def rotary(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the halves of q and k by angles that depend on the row and the column."""
    angle = position[:, None] / 10 ** torch.linspace(0, 3, q.shape[-1] // 2, device=q.device)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return rotated(q), rotated(k)


def recurrence(x: Tensor, a: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t."""
    h, states = torch.zeros_like(x[0]), []
    for now, decay in zip(x, a, strict=True):
        h = decay * h + now
        states.append(h)
    return torch.stack(states)


ROWS, ROW = (17, 40), (40,)
ATTENTION = normal((17, 8), (13, 8), (13, 24))
FUSED = [
    low("rms_norm", fused.RMSNorm, normal(ROWS, ROW), rms_norm, in_dims=(0, None)),
    low("rms_norm_many_rows", fused.RMSNorm, normal((1025, 9), (9,)), rms_norm, in_dims=(0, None)),
    low(
        "add_rms_norm",
        fused.AddRMSNorm,
        normal(ROWS, ROWS, ROW),
        lambda x, r, w: (x + r, rms_norm(x + r, w)),
        in_dims=(0, 0, None),
    ),
    low("layer_norm", fused.LayerNorm, normal(ROWS, ROW, ROW), layer_norm, in_dims=(0, None, None)),
    low("softmax", fused.Softmax, normal(ROWS), softmax, in_dims=(0,)),
    low("log_softmax", fused.LogSoftmax, normal(ROWS), lambda x: x.log_softmax(-1), in_dims=(0,)),
    low("sparsemax", fused.Sparsemax, normal(ROWS), sparsemax, in_dims=(0,)),
    low("swiglu", fused.SwiGLU, normal(ROWS, ROWS), swiglu, in_dims=(0, 0)),
    low("gelu", fused.GELU, normal(ROWS), F.gelu, in_dims=(0,)),
    low("l2_norm", fused.L2Norm, normal(ROWS), l2_norm, in_dims=(0,)),
    low(
        "dynamic_tanh",
        fused.DynamicTanh,
        normal(ROWS, (1,), ROW, ROW),
        dynamic_tanh,
        in_dims=(0, None, None, None),
    ),
    low("cross_entropy", fused.CrossEntropy, with_labels(40, ROWS), F.cross_entropy),
    low(
        "linear_cross_entropy",
        fused.LinearCrossEntropy,
        with_labels(13, (17, 24), (13, 24)),
        linear_cross_entropy,
    ),
    low("attention", fused.Attention, ATTENTION, attention, in_dims=(0, None, None)),
    low("recurrence", fused.Recurrence, _decays, recurrence),
    low("rotary", fused.Rotary, with_labels(1000, ROWS, ROWS), rotary, in_dims=(0, 0, 0)),
    low(
        "divergence",
        fused.Divergence,
        _probabilities,
        lambda p, q: (q * (q.log() - p)).sum(-1),
        in_dims=(0, 0),
    ),
    low("linear", fused.Linear, normal(ROWS, (13, 40), (13,)), F.linear, in_dims=(0, None, None)),
    low("embedding", fused.Embedding, _indices, lambda w, index: F.embedding(index, w)),
]
EAGER = [
    low(
        "eager_rms_norm",
        eager.RMSNorm,
        normal(ROWS, ROW),
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w,
        in_dims=(0, None),
    ),
    low(
        "eager_layer_norm",
        eager.LayerNorm,
        normal(ROWS, ROW, ROW),
        layer_norm_by_steps,
        in_dims=(0, None, None),
    ),
    low("eager_softmax", eager.Softmax, normal(ROWS), softmax_by_steps, in_dims=(0,)),
    low(
        "eager_swiglu",
        eager.SwiGLU,
        normal(ROWS, ROWS),
        lambda gate, up: gate * gate.sigmoid() * up,
        in_dims=(0, 0),
    ),
    low(
        "eager_gelu_tanh",
        eager.GELUTanh,
        normal(ROWS),
        lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh()),
        in_dims=(0,),
    ),
    low(
        "eager_hidden",
        eager.Hidden,
        normal(ROWS, (13, 40), (24, 13)),
        lambda x, u, v: (x @ u.mT).sigmoid() @ v.mT,
        in_dims=(0, None, None),
    ),
    low("eager_attention", eager.Attention, ATTENTION, attention, in_dims=(0, None, None)),
    low(
        "eager_logistic_loss",
        eager.LogisticLoss,
        _logits_and_targets,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y),
    ),
]
LOW_PRECISION = {case.name: case for case in [*FUSED, *EAGER]}


class OnePercentMore(Function):
    """x, with a gradient that is 1 % too large in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad if grad is None or grad.dtype is not torch.bfloat16 else 1.01 * grad


def with_one_percent_more(case: Case, i: int) -> Case:
    """The case with a gradient of argument i that is 1 % too large in bfloat16."""

    def call(*arguments: Any) -> Any:
        return case.call(*arguments[:i], OnePercentMore.apply(arguments[i]), *arguments[i + 1 :])

    return replace(case, call=call)


def every_gradient(cases: dict[str, Case]) -> list[tuple[str, int]]:
    """The name of each case with the position of each argument that has a gradient."""
    return [
        (name, i)
        for name, case in cases.items()
        for i in positions(case.draw(torch.Generator())[0])
    ]
