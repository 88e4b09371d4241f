"""Kernels of Liger and of flash-linear-attention, in bfloat16 and in float32.

On a GPU they are compiled; elsewhere Triton's interpreter runs them.
"""

import warnings
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from manual_bp.verify._case import Case
from manual_bp.verify._run import run
from tests.verify.low_precision import every_gradient, with_one_percent_more

NEEDS = "needs the extra kernels: pip install -e '.[kernels]'"
triton: Any = pytest.importorskip("triton", reason=NEEDS)
for package in ("fla", "liger_kernel", "ml_dtypes"):
    pytest.importorskip(package, reason=NEEDS)
if not torch.cuda.is_available():
    import_module("tests.verify.kernels.interpreter").repair()
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Triton is not supported on current platform")
    warnings.filterwarnings("ignore", "Flash Attention is not installed")
    FLA: list[Case] = import_module("tests.verify.kernels.fla").FLA
LIGER: list[Case] = import_module("tests.verify.kernels.liger").LIGER

pytestmark = pytest.mark.kernels

CASES = {case.name: case for case in [*LIGER, *FLA]}
ACCURATE = {
    name: case
    for name, case in CASES.items()
    if not {"gradients_match_reference", "unbiased"} & set(case.expected_failures)
}
# The interpreter needs 10 ms for a small kernel, so only what kernels break most is judged. Whether
# a promise is kept does not depend on the dtype.
ACCURACY = ["forward_matches_reference", "gradients_match_reference", "unbiased"]
PROMISES = ["requires_grad_subsets", "writes_nothing", "repeatable_backward", "double_backward"]


@pytest.fixture
def _not_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine, too, `unbiased` draws as often as it must."""
    monkeypatch.setattr("manual_bp.verify.checks.bias._SECONDS", 60)


@pytest.mark.usefixtures("_not_hurried")
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_as_accurate_as_its_reference_in_each_dtype(name: str) -> None:
    run(CASES[name], ACCURACY).raise_if_failed()


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_breaks_only_the_promises_that_its_case_names(name: str) -> None:
    run(replace(CASES[name], dtypes=(torch.float32,)), PROMISES).raise_if_failed()


@pytest.mark.usefixtures("_not_hurried")
@pytest.mark.parametrize(("name", "i"), every_gradient(ACCURATE))
def test_one_percent_in_a_bfloat16_gradient_of_a_kernel_is_found(name: str, i: int) -> None:
    report = run(with_one_percent_more(ACCURATE[name], i), ["unbiased"])
    assert "bfloat16" in report.failures[0].message
