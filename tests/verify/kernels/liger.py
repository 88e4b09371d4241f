"""Cases of Liger's kernels, as they are."""

from typing import Any

import torch
import torch.nn.functional as F
from liger_kernel.ops import dyt
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.dyt import LigerDyTFunction
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.group_norm import LigerGroupNormFunction
from liger_kernel.ops.jsd import LigerJSDFunction
from liger_kernel.ops.kl_div import LigerKLDivLossFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
from liger_kernel.ops.multi_token_attention import LigerMultiTokenAttentionFunction
from liger_kernel.ops.poly_norm import LigerPolyNormFunction
from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.softmax import LigerSoftmaxFunction
from liger_kernel.ops.sparsemax import LigerSparsemaxFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction, LigerSiLUMulFunction
from liger_kernel.ops.tvd import LigerTVDLossFunction
from torch import Tensor

from tests.verify.low_precision import (
    EPS,
    dynamic_tanh,
    layer_norm,
    linear_cross_entropy,
    low,
    normal,
    rms_norm,
    softmax,
    sparsemax,
    swiglu,
    with_labels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, ROW = (5, 40), (40,)
# The same number in every dtype, since bfloat16 has it.
TARGET = torch.randn(ROWS, generator=torch.Generator().manual_seed(99)).softmax(-1).bfloat16()
LOG_TARGET = TARGET.log()
ANGLE = torch.arange(7.0)[:, None] * torch.logspace(0, -2, 4).repeat(2)
COS, SIN = ANGLE.cos().bfloat16()[None], ANGLE.sin().bfloat16()[None]

if DEVICE == "cpu":
    # DyT asks how many processors the device has, but not if it is a CPU.
    dyt.infer_device, dyt.get_npu_core_count = lambda: "npu", lambda: 2


WRITES_INPUT = "backward writes over the arguments that it saved"
WRITES_LOGITS = "forward writes the gradient over the logits"
SCALES = "backward multiplies what forward saved in place, so a second one multiplies it again"
COPIED_LOGITS = "forward copies logits whose rows are strided, and puts no gradient into the copy"
NO_SECOND_ORDER = "create_graph=True gives a gradient that is a constant, and no error"

OVERWRITTEN_INPUT = dict.fromkeys(
    (
        "writes_nothing",
        "repeatable_backward",
        "interleaved_calls",
        "gradient_in_place",
        "stale_caches",
        "non_leaf_arguments",
        "tied_inputs",
        "double_backward",
        "autocast",
    ),
    WRITES_INPUT,
)
OVERWRITTEN_LOGITS = {
    "argument_layouts": COPIED_LOGITS,
    "writes_nothing": WRITES_LOGITS,
    "interleaved_calls": WRITES_LOGITS,
    "non_leaf_arguments": WRITES_LOGITS,
}
SCALED_TWICE = dict.fromkeys(("repeatable_backward", "gradient_in_place", "autocast"), SCALES)


def _llama(x: Tensor, w: Tensor) -> Tensor:
    """As in Llama, which rounds before it multiplies by w."""
    wide = x if x.dtype is torch.float64 else x.float()
    return w * F.rms_norm(wide, w.shape, eps=EPS).to(x.dtype)


def _probabilities(g: torch.Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(ROWS, generator=g).softmax(-1),)]


def _with_a_mean(g: torch.Generator) -> list[tuple[Any, ...]]:
    ((x, w, b),) = normal((2, 4, 10), (4,), (4,))(g)
    return [(x + 3, w, b)]


def _log_probabilities(g: torch.Generator) -> list[tuple[Any, ...]]:
    return [(torch.randn(ROWS, generator=g).log_softmax(-1),)]


def _cross_entropy(logits: Tensor, target: Tensor, *options: Any) -> Any:
    return LigerCrossEntropyFunction.apply(logits, target, None, *options)[0]


def _capped_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    capped = 5 * torch.tanh(logits / 5)
    loss = F.cross_entropy(capped, target, label_smoothing=0.1, reduction="sum")
    return loss + 0.01 * capped.logsumexp(-1).square().sum()


def _divergence(p: Tensor) -> Tensor:
    """Jensen and Shannon's, weighted: a tenth from the target to the mean, the rest from p."""
    q = LOG_TARGET.to(p)
    mean = (0.1 * q.exp() + 0.9 * p.exp()).log()
    return (0.1 * q.exp() * (q - mean) + 0.9 * p.exp() * (p - mean)).sum() / len(p)


def _rope(q: Tensor, k: Tensor) -> Any:
    return LigerRopeFunction.apply(q, k, COS.to(q), SIN.to(q))


def _rotated(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    cos, sin = COS.to(q)[:, None], SIN.to(q)[:, None]
    turned = [torch.cat([-x[..., 4:], x[..., :4]], -1) for x in (q, k)]
    return tuple(x * cos + t * sin for x, t in zip((q, k), turned, strict=True))


def _poly_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w[0] * _unit(x**3) + w[1] * _unit(x**2) + w[2] * _unit(x) + b


def _unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _multi_token_attention(scores: Tensor, w: Tensor) -> Tensor:
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return F.conv2d(weights, w, padding=1).masked_fill(~seen, 0)


def _case(name: str, fn: Any, samples: Any, reference: Any, **options: Any) -> Any:
    return low(f"liger_{name}", fn, samples, reference, device=DEVICE, **options)


LIGER = [
    _case(
        "rms_norm_llama",
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        normal(ROWS, ROW),
        _llama,
    ),
    _case(
        "rms_norm_gemma",
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 1.0, "gemma", False),
        normal(ROWS, ROW),
        lambda x, w: rms_norm(x, w + 1),
    ),
    _case(
        "rms_norm_in_place",
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", True),
        normal(ROWS, ROW),
        _llama,
        expected_failures=dict.fromkeys(
            (
                "writes_nothing",
                "repeatable_backward",
                "double_backward",
            ),
            "backward writes over the upstream gradient, as in_place=True says",
        ),
    ),
    _case(
        "add_rms_norm",
        lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
        normal(ROWS, ROWS, ROW),
        lambda x, r, w: (_llama(x + r, w), x + r),
    ),
    _case(
        "modulated_rms_norm",
        lambda x, w, s, t: LigerModulatedRMSNormFunction.apply(
            x, w, s, t, EPS, 0.0, "llama", False
        ),
        normal(ROWS, ROW, ROWS, ROWS),
        lambda x, w, s, t: (1 + s) * _llama(x, w) + t,
    ),
    _case(
        "layer_norm",
        lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS),
        normal(ROWS, ROW, ROW),
        layer_norm,
    ),
    _case(
        "group_norm",
        lambda x, w, b: LigerGroupNormFunction.apply(x, w, b, 4, 2, EPS),
        _with_a_mean,
        lambda x, w, b: F.group_norm(x, 2, w, b, EPS),
        expected_failures=dict.fromkeys(
            ("forward_matches_reference", "gradients_match_reference"),
            "in bfloat16 it computes the mean and the variance in bfloat16",
        ),
    ),
    _case(
        "poly_norm",
        lambda x, w, b: LigerPolyNormFunction.apply(x, w, b, EPS, False),
        normal(ROWS, (3,), ()),
        _poly_norm,
    ),
    _case("dynamic_tanh", LigerDyTFunction, normal((17, 40), (1,), ROW, ROW), dynamic_tanh),
    _case(
        "swiglu",
        LigerSiLUMulFunction,
        normal(ROWS, ROWS),
        swiglu,
        expected_failures=OVERWRITTEN_INPUT,
    ),
    _case(
        "swiglu_of_halves",
        LigerFusedGateUpSiLUMulFunction,
        normal((5, 80)),
        lambda y: swiglu(*y.chunk(2, -1)),
    ),
    _case(
        "geglu",
        LigerGELUMulFunction,
        normal(ROWS, ROWS),
        lambda a, b: F.gelu(a, approximate="tanh") * b,
        expected_failures=OVERWRITTEN_INPUT,
    ),
    _case("relu_squared", LigerReLUSquaredFunction, normal(ROWS), lambda x: F.relu(x).square()),
    _case("softmax", LigerSoftmaxFunction, normal(ROWS), softmax),
    _case("sparsemax", lambda x: LigerSparsemaxFunction.apply(x, -1), normal(ROWS), sparsemax),
    _case(
        "rope",
        _rope,
        normal((1, 2, 7, 8), (1, 1, 7, 8)),
        _rotated,
        expected_failures=dict.fromkeys(
            (
                "writes_nothing",
                "repeatable_backward",
                "interleaved_calls",
                "stale_caches",
                "non_leaf_arguments",
                "double_backward",
            ),
            "it rotates in place what is laid out as (batch, time, head, feature)",
        ),
    ),
    _case(
        "multi_token_attention",
        lambda s, w: LigerMultiTokenAttentionFunction.apply(s, w, None, 1, 1),
        normal((1, 2, 5, 5), (2, 2, 3, 3)),
        _multi_token_attention,
    ),
    _case(
        "cross_entropy",
        _cross_entropy,
        with_labels(40, ROWS),
        F.cross_entropy,
        expected_failures=OVERWRITTEN_LOGITS | SCALED_TWICE,
    ),
    _case(
        "cross_entropy_by_row",
        lambda x, target: _cross_entropy(x, target, -100, 0.0, 0.0, "none"),
        with_labels(40, ROWS),
        lambda x, target: F.cross_entropy(x, target, reduction="none"),
        expected_failures=OVERWRITTEN_LOGITS | {"double_backward": NO_SECOND_ORDER},
    ),
    _case(
        "cross_entropy_capped",
        lambda x, target: _cross_entropy(x, target, -100, 0.01, 0.1, "sum", 5.0),
        with_labels(40, ROWS),
        _capped_cross_entropy,
        expected_failures=OVERWRITTEN_LOGITS | SCALED_TWICE,
    ),
    _case(
        "linear_cross_entropy",
        lambda x, w, target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0],
        with_labels(13, (5, 24), (13, 24)),
        linear_cross_entropy,
        expected_failures={
            "requires_grad_subsets": "if x requires no gradient, w gets none",
            "interleaved_calls": SCALES,
            **SCALED_TWICE,
        },
    ),
    _case(
        "kl_div",
        lambda p: LigerKLDivLossFunction.apply(p, TARGET.to(p)),
        _log_probabilities,
        lambda p: F.kl_div(p, TARGET.to(p), reduction="batchmean"),
    ),
    _case(
        "jsd",
        lambda p: LigerJSDFunction.apply(p, LOG_TARGET.to(p), None, 0.1),
        _log_probabilities,
        _divergence,
        expected_failures={"double_backward": NO_SECOND_ORDER},
    ),
    _case(
        "tvd",
        lambda p: LigerTVDLossFunction.apply(p, TARGET.to(p)),
        _probabilities,
        lambda p: (p - TARGET.to(p)).abs().sum() / 2 / len(p),
    ),
]
