"""All kernels, compiled on a GPU; elsewhere Triton's interpreter runs them.

Importing this module imports Triton.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module

import torch

from manual_bp.verify import Report
from manual_bp.verify._case import Case
from manual_bp.verify._run import run

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import_module("tests.verify.kernels.interpreter").repair()
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Triton is not supported on current platform")
    warnings.filterwarnings("ignore", "Flash Attention is not installed")
    FLA: list[Case] = import_module("tests.verify.kernels.fla").FLA
    LIGER: list[Case] = import_module("tests.verify.kernels.liger").LIGER

CASES = {case.name: case for case in [*LIGER, *FLA]}
ACCURATE = {
    name: case
    for name, case in CASES.items()
    if not {"gradients_match_reference", "unbiased"} & set(case.expected_failures)
}
# The interpreter needs 10 ms for a small kernel, so only what kernels break most is judged. Whether
# a promise is kept does not depend on the dtype.
ACCURACY = ("forward_matches_reference", "gradients_match_reference")
PROMISES = ("requires_grad_subsets", "writes_nothing", "repeatable_backward", "double_backward")


def judge(
    case: Case, accuracy: Sequence[str] = ACCURACY, promises: Sequence[str] = PROMISES
) -> Iterator[Report]:
    """Judge a kernel's numbers in each dtype, and its promises in float32."""
    yield run(case, accuracy)
    yield run(replace(case, dtypes=(torch.float32,)), promises)
