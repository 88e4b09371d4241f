"""What several processes are told to do, once for all tests, and what they leave."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from experiments import checkpoint
from experiments.train import main
from tests.experiments.run_ranks import Scenario, without_pictures

ROOT = Path(__file__).parents[2]

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch was built without torch.distributed or without gloo",
)

# Eight updates in an epoch. The last has one sample, so that the second process has none.
QUICK = [
    "--dataset", "iris", "--hidden", "8", "--activation", "tanh", "--cost", "softmax-cross-entropy",
    "--learning-rate", "0.5", "--epochs", "2", "--batch-size", "17", "--log-every", "7",
    "--checkpoint-every", "5", "--run-folder", "runs",
]  # fmt: skip
TOTAL = 16
RTOL, ATOL = 2e-5, 1e-6
PART = "shard-0000{}-model-00001-of-00001.safetensors"
SCENARIOS = [
    Scenario("observed"),
    Scenario("whole", (*QUICK, "--name", "whole"), draws=True),
    Scenario(
        "killed", (*QUICK, "--name", "killed"), restarts=1, event="SIGKILL", update=9, draws=True
    ),
    Scenario("stopped", (*QUICK, "--name", "stopped"), event="SIGTERM", update=9),
    Scenario("full", (*QUICK, "--name", "full"), event="full disk", update=9),
    Scenario("refused", (*QUICK, "--shard", "--method", "step")),
    Scenario(
        "more",
        ("--resume", "runs/more", "--shard"),
        processes=3,
        copy=("runs/stopped", "runs/more"),
    ),
    Scenario("from-one", ("--resume", "runs/from-one", "--epochs", "2")),
    Scenario("diverges", (*QUICK, "--learning-rate", "1e38", "--name", "diverges")),
    Scenario(
        "damaged",
        ("--resume", "runs/damaged"),
        copy=("runs/stopped", "runs/damaged"),
        damage=f"runs/damaged/weights-3/{PART.format(2)}",
    ),
]


def run_all(folder: Path) -> None:
    """Run the scenarios in a folder, and two runs of one process: runs/one and runs/from-one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*QUICK, "--name", "one"]) == 0
        without_pictures(patch)
        assert main([*QUICK, "--name", "from-one", "--epochs", "1"]) == 0
    ended = subprocess.run(
        [sys.executable, "-m", "tests.experiments.run_ranks"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        input=json.dumps([asdict(scenario) for scenario in SCENARIOS]),
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def said(scenario: Path, stream: str) -> dict[str, str]:
    """What the processes of a scenario said, by attempt and rank."""
    logs = scenario.glob(f"*/attempt_*/*/{stream}.log")
    return {f"{log.parts[-3][-1]}.{log.parts[-2]}": log.read_text("utf-8") for log in logs}


def code(scenario: Path) -> int:
    """The exit code of the first process of a scenario that failed, or 0."""
    return int((scenario / "code").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    """The weights in the last checkpoint."""
    found: dict[str, Tensor] = checkpoint.read(run / "last.pt")["training"]["net"]
    return found


def close(found: Any, expected: Any) -> None:
    """Check that numbers are equal up to the rounding of sums in another order."""
    assert_close(found, expected, rtol=RTOL, atol=ATOL)
