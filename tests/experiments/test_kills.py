"""A run that is killed, as by a power cut, loses nothing from before its last checkpoint."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.train import main
from tests.experiments.kill_runs import runs_in
from tests.experiments.runs import QUICK, left_by, only

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.kills)])
def test_a_killed_run_ends_with_the_same_bits(kills: int, tmp_path: Path) -> None:
    options = [*QUICK, "--epochs", str(5 * kills), "--log-every", "5"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown if the test fails
    program = [sys.executable, "-m", "tests.experiments.kill_runs", str(tmp_path / "killed")]
    often = ["--checkpoint-every", "3"]
    subprocess.run([*program, str(kills), str(seed), *options, *often], cwd=ROOT, check=True)
    assert main([*options, "--run-folder", str(tmp_path / "whole")]) == 0
    (run,) = runs_in(tmp_path / "killed")
    assert left_by(run) == left_by(only(tmp_path / "whole"))
