"""A program that starts a run, and kills it again and again, until it has killed it often enough.

    python -m tests.experiments.kill_runs FOLDER KILLS SEED OPTIONS...

The run is made in FOLDER. At each start it goes on where it was; the last start is not killed.
Processes are forks of this one, which has imported PyTorch once and computes nothing itself.
"""

import csv
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import checkpoint
from experiments.train import main

LONGEST = 0.6  # seconds from a start to a kill; a run needs about 0.1 until its first update


def start(command: Sequence[str]) -> int:
    """Start to train in another process; return its id."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 70
        try:
            code = main(command)
        finally:
            os._exit(code)
    return process


def runs_in(folder: Path) -> list[Path]:
    """The finished folders; what was killed before it was complete has a hidden name."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def check(run: Path, done: int) -> int:
    """Check that nothing from before the last checkpoint is lost; return its number of updates.

    Args:
        run: The run folder.
        done: How many updates an earlier checkpoint had.
    """
    json.loads((run / "config.json").read_text())
    state = checkpoint.read(run / "last.pt")
    if (run / "best.pt").exists():
        checkpoint.read(run / "best.pt")
    updates: int = state["training"]["updates"]
    assert updates >= done, f"{updates} updates, after {done}"
    rows = []
    if (run / "metrics.csv").exists():
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    expected = [str(step) for step in range(15, updates, 15)]
    assert [row["step"] for row in rows][: len(expected)] == expected
    for place, size in state["events"].items():
        assert sum(path.stat().st_size for path in (run / place).glob("events*")) >= size
    return updates


def kill_runs(folder: Path, kills: int, delays: random.Random, options: Sequence[str]) -> None:
    """Kill that many times, at random moments; then let the run end."""
    done = killed = 0
    while True:
        runs = runs_in(folder)
        command = ["--resume", str(runs[0])] if runs else [*options, "--run-folder", str(folder)]
        process = start(command)
        if killed < kills:
            time.sleep(delays.uniform(0, LONGEST))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        was_killed = os.WIFSIGNALED(status)
        if not was_killed:
            assert os.WEXITSTATUS(status) == 0, f"exit code {os.WEXITSTATUS(status)}"
        for run in runs_in(folder):
            done = check(run, done)
        if killed == kills:
            return
        killed += was_killed


if __name__ == "__main__":
    where, count, seed, *rest = sys.argv[1:]
    kill_runs(Path(where), int(count), random.Random(int(seed)), rest)
