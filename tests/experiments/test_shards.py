"""Weights in several files: refused if they are damaged, removed if they are not needed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpoint
from experiments.train import main
from tests.experiments.run_ranks import flip_a_bit
from tests.experiments.scenarios import PART, code, needs_gloo, said
from tests.helpers import refusal

pytestmark = needs_gloo


def test_damage_in_the_part_of_one_process_is_noticed_by_all(ran: Path) -> None:
    assert code(ran / "damaged") == 2
    err = said(ran / "damaged", "stderr")
    reason = f"--resume: runs/damaged/weights-3/{PART.format(2)} is damaged"
    assert err["0.0"].startswith(f"python -m experiments.train: {reason}; best.pt is whole: ")
    assert err["0.0"].count("\n") == 1
    assert err["0.1"] == ""


def spoiled(run: Path) -> None:
    flip_a_bit(run / "weights-3" / PART.format(1))


def missing(run: Path) -> None:
    (run / "weights-3" / PART.format(1)).unlink()


def one_too_many(run: Path) -> None:
    shutil.copy(run / "weights-3" / PART.format(1), run / "weights-3" / PART.format(3))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoiled, f"weights-3/{PART.format(1)} is damaged"),
        (missing, f"No such file or directory: '.*weights-3/{PART.format(1)}'"),
        (one_too_many, f"weights-3/{PART.format(3)} is not a part of this checkpoint"),
    ],
)
def test_spoiled_weights_are_refused_in_one_line_and_left_alone(
    spoil: Callable[[Path], None],
    reason: str,
    ran: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(ran / "runs/stopped", tmp_path / "run")
    spoil(run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refusal(main, ["--resume", str(run)], capsys)
    assert re.search(reason, said)
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_weights_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    for name in ("weights-1", "weights-2", "weights-10"):
        (tmp_path / name).mkdir()
    needs: dict[str, Any] = {"training": {"net": None}, "shards": ("weights-2", {})}
    checkpoint.write(tmp_path / "last.pt", checkpoint.pack(needs))
    (tmp_path / "best.pt").write_bytes(b"damaged")
    assert checkpoint.new_shards(tmp_path).name == "weights-11"
    checkpoint.remove_unused_shards(tmp_path)
    assert [path.name for path in tmp_path.glob("weights-*")] == ["weights-2"]
