"""docs/kernels.md works as printed: compiled on a GPU, elsewhere in the repaired interpreter."""

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

NEEDS = "needs the extra kernels: pip install -e '.[kernels]'"
ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason=NEEDS)
if not ON_GPU:
    # The interpreter of earlier versions differs in more ways than are repaired.
    pytest.importorskip("triton", minversion="3.7", reason=NEEDS)
    pytest.importorskip("ml_dtypes", reason=NEEDS)
    importlib.import_module("tests.verify.kernels.interpreter").repair()

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


def is_shown(report: Report, shown: str) -> bool:
    """Whether the page shows the only failure. On a GPU other elements may be the worst."""
    (outcome,) = report.failures
    expected = shown.split("failed")[1].strip()
    return outcome.message.startswith(expected.partition(", at")[0] if ON_GPU else expected)


def test_the_kernel_is_right_in_each_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(KERNEL, tmp_path, monkeypatch)
    assert case.dtypes == (BOTH if ON_GPU else (torch.float32,))
    run(replace(case, dtypes=BOTH), CHECKS).raise_if_failed()


def test_a_mean_over_the_block_gives_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(with_mistake(MEAN), tmp_path, monkeypatch)
    report = run(replace(case, dtypes=(torch.float32,)), ["gradients_match_reference"])
    assert is_shown(report, SHOWN[0])


def test_a_sum_in_bfloat16_gives_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(with_mistake(SUM), tmp_path, monkeypatch)
    report = run(replace(case, dtypes=(torch.bfloat16,)), ["gradients_match_reference"])
    assert is_shown(report, SHOWN[1])


def test_the_page_counts_the_kernels() -> None:
    for package in ("fla", "liger_kernel"):
        pytest.importorskip(package, reason=NEEDS)
    kernels: Any = importlib.import_module("tests.verify.kernels.cases")
    liger, fla = len(kernels.LIGER), len(kernels.FLA)
    assert f"{liger} kernels of liger-kernel 0.8.5 and {fla} of fla-core" in " ".join(PAGE.split())
