"""A run that is killed, as by a power cut, loses nothing from before its last checkpoint."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.train import main
from tests.experiments.kill_runs import runs_in
from tests.experiments.runs import QUICK, left_by, only
from tests.experiments.scenarios import needs_gloo

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


def worker_of(name: str) -> int:
    """The id of the second process of a run, while it trains."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            command = path.with_name("cmdline").read_bytes().split(b"\0")
            if name.encode() in command and b"RANK=1" in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return max(found, default=0)


@needs_gloo
@pytest.mark.kills
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_torchrun_survives_the_death_of_workers(shard: list[str], tmp_path: Path) -> None:
    """Of three processes, five times; without it, sums of three would be rounded differently."""
    options = [
        "--hidden", "30", "--epochs", "30", "--batch-size", "30", "--checkpoint-every", "20",
        "--run-folder", str(tmp_path),
    ]  # fmt: skip
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    train = ["-m", "experiments.train", *options, *shard, "--name"]
    subprocess.run([*agent, *train, "whole"], cwd=ROOT, check=True, capture_output=True)
    with subprocess.Popen(
        [*agent, "--max-restarts", "5", *train, "killed"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        assert run.stdout is not None
        killed = 0
        for line in run.stdout:
            if line.startswith("epoch") and killed < 5 and line.split("/")[0].split()[1] > "3":
                time.sleep(random.SystemRandom().uniform(0, 0.5))
                os.kill(worker_of("killed"), signal.SIGKILL)
                killed += 1
                for rest in run.stdout:
                    if rest.startswith("going on"):
                        break
    assert (run.returncode, killed) == (0, 5)
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")
