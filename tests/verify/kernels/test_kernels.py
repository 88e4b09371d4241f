"""Kernels of Liger and of flash-linear-attention, in bfloat16 and in float32.

On a GPU all are judged. In the interpreter each kind is judged once, since it is slow. All kernels,
and with an error of 1 % in each of their gradients: python -m tests.verify.kernels
"""

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.verify.seeds import one_percent_is_found

NEEDS = "needs the extra kernels: pip install -e '.[kernels]'"
ON_GPU = torch.cuda.is_available()
for package in ("triton", "fla", "liger_kernel", *([] if ON_GPU else ["ml_dtypes"])):
    pytest.importorskip(package, reason=NEEDS)
kernels: Any = import_module("tests.verify.kernels.cases")

pytestmark = pytest.mark.kernels

ONE_OF_EACH_KIND = [
    "liger_rms_norm_llama",
    "liger_rms_norm_in_place",
    "liger_layer_norm",
    "liger_group_norm",
    "liger_dynamic_tanh",
    "liger_swiglu",
    "liger_geglu",
    "liger_softmax",
    "liger_cross_entropy",
    "liger_linear_cross_entropy",
    "liger_jsd",
    "fla_swish",
    "fla_swiglu",
    "fla_swiglu_linear",
    "fla_l2_norm",
    "fla_add_rms_norm",
    "fla_hgrn",
]
PLANTED = [
    ("liger_rms_norm_llama", 1),
    ("liger_swiglu", 0),
    ("fla_l2_norm", 0),
]


@pytest.mark.parametrize("name", kernels.CASES if ON_GPU else ONE_OF_EACH_KIND)
def test_a_kernel_is_accurate_and_breaks_only_the_promises_that_its_case_names(name: str) -> None:
    for report in kernels.judge(kernels.CASES[name]):
        report.raise_if_failed()


@pytest.mark.parametrize(("name", "i"), PLANTED)
def test_one_percent_in_a_bfloat16_gradient_of_a_kernel_is_found(
    name: str, i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a slow machine, too, `unbiased` draws as often as it must.
    monkeypatch.setattr("manual_bp.verify.checks.bias._SECONDS", 60)
    assert one_percent_is_found(kernels.CASES[name], i)
