"""If PyTorch drops a private name, the kit says so. No wrong backward passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from manual_bp import _torch
from manual_bp.verify import Report, check_function
from manual_bp.verify.mutants import MUTANTS

LINEAR = [(torch.randn(5, 3), torch.randn(4, 3), torch.randn(4))]


def checked(*only: str, **options: Any) -> Report:
    return check_function(F.linear, LINEAR, F.linear, only=only or None, slow=False, **options)


def test_without_tree_leaves_no_case_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_pytree", None)
    with pytest.raises(RuntimeError, match="torch must have the private name tree_leaves"):
        checked()


def test_without_dispatch_modes_only_matrix_products_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_torch, "_python_dispatch", None)
    assert checked().ok
    (outcome,) = checked("frugal", supports=["frugal"]).outcomes
    assert outcome.status == "failed"
    assert "raised RuntimeError: torch must have the private name TorchDispatchMode" in str(outcome)


def test_without_metadata_of_nodes_raw_backward_compares_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("manual_bp.verify.checks._shared.expected_gradient", lambda *_: None)
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "unsummed_bias"]
    report = check_function(mutant.case.call, mutant.case.draw, F.linear, only=["raw_backward"])
    assert not report.ok
    assert report.outcomes[0].message == "nothing to compare"
