"""docs/kernels.md works as printed."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manual_bp.verify import Report
from manual_bp.verify._case import Case
from manual_bp.verify._run import run

# It repairs the interpreter, and skips without Triton.
from tests.verify.kernels.test_kernels import FLA, LIGER

pytestmark = pytest.mark.kernels

PAGE = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text("utf-8")
BOTH = (torch.float32, torch.bfloat16)
CHECKS = ["forward_matches_reference", "gradients_match_reference", "requires_grad_subsets"]


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


(KERNEL,) = blocks("python")
MEAN, SUM = blocks("diff")
SHOWN = [text for text in blocks("text") if text.startswith("gradients_match_reference")]


def case_of(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The case of a module with this source. Triton reads kernels from their file."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_kernel", raising=False)
    (folder / "my_kernel.py").write_text(source, encoding="utf-8")
    importlib.invalidate_caches()
    module: Any = importlib.import_module("my_kernel")
    case: Case = module.RMS_NORM
    return case


def with_mistake(diff: str) -> str:
    lines, source = diff.splitlines(), KERNEL
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line[1:] for line in lines if line.startswith("+")]
    for old, new in zip(removed, added, strict=True):
        assert old in source
        source = source.replace(old, new)
    return source


def message(report: Report) -> str:
    (outcome,) = report.failures
    return outcome.message


def test_the_kernel_is_right_in_each_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(KERNEL, tmp_path, monkeypatch)
    assert case.dtypes == (BOTH if torch.cuda.is_available() else (torch.float32,))
    run(replace(case, dtypes=BOTH), [*CHECKS, "unbiased"]).raise_if_failed()


def test_a_mean_over_the_block_gives_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(with_mistake(MEAN), tmp_path, monkeypatch)
    found = message(run(replace(case, dtypes=(torch.float32,)), ["gradients_match_reference"]))
    assert found.startswith(SHOWN[0].split("failed")[1].strip())


def test_a_sum_in_bfloat16_gives_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(with_mistake(SUM), tmp_path, monkeypatch)
    found = message(run(replace(case, dtypes=(torch.bfloat16,)), ["gradients_match_reference"]))
    assert found.startswith(SHOWN[1].split("failed")[1].strip())


def test_the_page_counts_the_kernels() -> None:
    words = " ".join(PAGE.split())
    assert f"judges {len(LIGER)} kernels of liger-kernel 0.8.5 and {len(FLA)} of fla-core" in words
