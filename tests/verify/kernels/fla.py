"""Cases of the kernels of flash-linear-attention, as they are.

Those that work in chunks do not run in the interpreter, and those that PyTorch compiles are no
kernels of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fla.modules.activations.ops import (
    logsigmoid,
    sigmoid,
    sigmoidglu,
    swiglu_linear,
    swish,
)
from fla.modules.activations.ops import swiglu as fla_swiglu
from fla.modules.fused_cross_entropy.ops import cross_entropy_loss
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.modules.norm import fused_norm_gate, l2norm, layernorm
from fla.ops.delta_rule import fused_recurrent_delta_rule
from fla.ops.gla import fused_recurrent_gla
from fla.ops.hgrn import fused_recurrent_hgrn
from torch import Tensor

from tests.verify.low_precision import (
    EPS,
    l2_norm,
    layer_norm,
    linear_cross_entropy,
    low,
    normal,
    recurrence,
    rms_norm,
    swiglu,
    with_labels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, ROW = (5, 40), (40,)
HEADS = ((1, 3, 1, 8), (1, 3, 1, 8), (1, 3, 1, 16))  # q, k and v: batch, time, head, feature


def _with_decays(*shapes: tuple[int, ...]) -> Any:
    """Normal random numbers, the last ones made logarithms of decays."""

    def draw(g: torch.Generator) -> list[tuple[Any, ...]]:
        (drawn,) = normal(*shapes)(g)
        return [(*drawn[:-1], F.logsigmoid(drawn[-1]))]

    return draw


def _delta_arguments(g: torch.Generator) -> list[tuple[Any, ...]]:
    ((q, k, v),) = normal(*HEADS)(g)
    return [(q, F.normalize(k, dim=-1), v, torch.rand(1, 3, 1, generator=g))]


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ; o_t = S_tᵀ q_t / √d."""
    state, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    scaled = q / q.shape[-1] ** 0.5
    for t in range(q.shape[1]):
        state = state * decay[:, t].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((scaled[:, t, :, :, None] * state).sum(-2))
    return torch.stack(out, 1)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ; o_t = S_tᵀ q_t / √d."""
    state, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    scaled = q / q.shape[-1] ** 0.5
    for t in range(q.shape[1]):
        key = k[:, t, :, :, None]
        error = v[:, t] - (key * state).sum(-2)
        state = state + key * (beta[:, t, :, None] * error)[:, :, None]
        out.append((scaled[:, t, :, :, None] * state).sum(-2))
    return torch.stack(out, 1)


def _case(name: str, fn: Any, samples: Any, reference: Any, **options: Any) -> Any:
    return low(f"fla_{name}", fn, samples, reference, device=DEVICE, **options)


FLA = [
    _case("swish", swish, normal(ROWS), F.silu),
    _case("sigmoid", sigmoid, normal(ROWS), torch.sigmoid),
    _case("logsigmoid", logsigmoid, normal(ROWS), F.logsigmoid),
    _case("swiglu", fla_swiglu, normal(ROWS, ROWS), swiglu),
    _case("sigmoidglu", sigmoidglu, normal(ROWS, ROWS), lambda x, y: x.sigmoid() * y),
    _case(
        "swiglu_linear",
        lambda x, y, w: swiglu_linear(x, y, w, None),
        normal(ROWS, ROWS, (13, 40)),
        lambda x, y, w: swiglu(x, y) @ w.mT,
        expected_failures={
            "double_backward": "create_graph=True gives gradients without the terms by x and y"
        },
    ),
    _case("l2_norm", lambda x: l2norm.l2norm(x, EPS), normal(ROWS), l2_norm),
    _case(
        "rms_norm",
        lambda x, w: layernorm.rms_norm(x, w, None, eps=EPS),
        normal(ROWS, ROW),
        rms_norm,
    ),
    _case(
        "add_rms_norm",
        lambda x, r, w: layernorm.rms_norm(x, w, None, residual=r, eps=EPS, prenorm=True),
        normal(ROWS, ROWS, ROW),
        lambda x, r, w: (rms_norm(x + r, w), x + r),
        expected_failures=dict.fromkeys(
            ("repeatable_backward", "gradient_in_place"), "x.grad and r.grad are one tensor"
        ),
    ),
    _case(
        "layer_norm",
        lambda x, w, b: layernorm.layer_norm(x, w, b, eps=EPS),
        normal(ROWS, ROW, ROW),
        layer_norm,
    ),
    _case(
        "group_norm",
        lambda x, w, b: layernorm.group_norm(x, w, b, eps=EPS, num_groups=4),
        normal(ROWS, ROW, ROW),
        lambda x, w, b: F.group_norm(x, 4, w, b, EPS),
    ),
    _case(
        "rms_norm_gated",
        lambda x, gate, w: fused_norm_gate.rms_norm_gated(x, gate, w, None, eps=EPS),
        normal(ROWS, ROWS, ROW),
        lambda x, gate, w: rms_norm(x, w) * F.silu(gate),
    ),
    _case(
        "cross_entropy",
        lambda x, target: cross_entropy_loss(x, target)[0],
        with_labels(40, ROWS),
        lambda x, target: F.cross_entropy(x, target, reduction="none"),
    ),
    _case(
        "linear_cross_entropy",
        lambda x, w, target: fused_linear_cross_entropy_loss(x, target, w, num_chunks=2),
        with_labels(13, (5, 24), (13, 24)),
        linear_cross_entropy,
        expected_failures={
            "repeatable_backward": "backward multiplies what forward saved in place"
        },
    ),
    _case(
        "hgrn",
        lambda x, g: fused_recurrent_hgrn(x, g)[0],
        _with_decays((1, 7, 16), (1, 7, 16)),
        lambda x, g: recurrence(x[0], g[0].exp())[None],
    ),
    _case(
        "gla",
        lambda q, k, v, g: fused_recurrent_gla(q, k, v, gk=g)[0],
        _with_decays(*HEADS, (1, 3, 1, 8)),
        lambda q, k, v, g: _linear_attention(q, k, v, g[..., None]),
    ),
    _case(
        "delta_rule",
        lambda q, k, v, beta: fused_recurrent_delta_rule(q, k, v, beta)[0],
        _delta_arguments,
        _delta_rule,
    ),
]
