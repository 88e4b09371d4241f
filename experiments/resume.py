"""What is checked and read before a run goes on."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments import checkpoint
from experiments.checkpoint import BEST, LAST
from experiments.command_line import parse, refuse
from experiments.run_folder import RunFolder
from experiments.training import COMMAND, Config, Training

# What may have another value when a run goes on; it then has that value from there on.
_FREE = {
    "epochs", "log_every", "checkpoint_every", "on_nan", "device", "data_dir", "resume", "name",
    "shard",
}  # fmt: skip


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run, with a checkpoint."""
    try:
        return (path / LAST).is_file()
    except OSError:  # such as a name that is too long
        return False


def reopened(path: Path, option: str) -> RunFolder:
    """The folder of a run, which an option has chosen; refuse any other."""
    if not is_run(path):
        refuse(COMMAND, f"{option} must be the folder of a run, with a file {LAST}; got {path}")
    try:
        return RunFolder.reopened(path)
    except (OSError, ValueError) as error:
        refuse(COMMAND, f"{option} must lead to a folder that a run can go on in: {error}")


def locked(folder: RunFolder, option: str) -> AbstractContextManager[object]:
    """A lock on the folder of a run; refuse if another process has it."""
    try:
        return folder.lock()
    except OSError as error:
        refuse(COMMAND, f"{option} must lead to a folder that a run can go on in: {error}")


def read(path: Path, whole: bool, option: str) -> dict[str, Any]:
    """The last checkpoint of a run; refuse a damaged one. See `checkpoint.read`."""
    try:
        return checkpoint.read(path / LAST, whole)
    except (OSError, ValueError) as error:
        refuse(COMMAND, f"{option}: {error}{_advice(path)}")


def load(training: Training, state: dict[str, Any], path: Path, option: str) -> None:
    """Let a training go on from a state; refuse other data, or weights that are damaged."""
    try:
        training.load_state_dict(state["training"])
    except OSError as error:  # in weights that several processes read
        refuse(COMMAND, f"{option}: {error}{_advice(path)}")
    except ValueError as error:
        refuse(COMMAND, f"{option}: {path}: {error}")


def _advice(path: Path) -> str:
    """How to go on without the last checkpoint, if the best one is there."""
    try:
        step = checkpoint.read(path / BEST)["training"]["updates"]
    except (OSError, ValueError):
        return ""
    copy = shlex.join(["cp", str(path / BEST), str(path / LAST)])
    return f"; {BEST} is whole: to go on after its update {step}, first {copy}"


def continued(
    given: Config, state: dict[str, Any], path: Path, arguments: Sequence[str] | None, option: str
) -> Config:
    """The options of the run, and those of the free ones that are given now; refuse others."""
    here: dict[str, Any] = {"run_folder": path.parent}  # it may have been moved
    if given.device != "auto":
        here["device"] = given.device  # the one that it was on may be missing here
    if state["config"]["data_dir"] is not None:
        here["data_dir"] = Path(state["config"]["data_dir"])
    try:
        before = Config(**state["config"] | here)
    except (TypeError, ValueError) as error:
        refuse(COMMAND, f"{option}: the options in {path / LAST} do not suit: {error}")
    # A flag that is set by default could not be given again.
    now = parse(Config, arguments, COMMAND, replace(before, deterministic=False))
    now = replace(now, deterministic=now.deterministic or before.deterministic)
    for name, value in asdict(now).items():
        if name not in _FREE and value != getattr(before, name):
            other = "--" + name.replace("_", "-")
            refuse(COMMAND, f"{other} is {getattr(before, name)} in {path}; got {value}")
    return replace(now, device=before.device)


def warn_of_changes(state: dict[str, Any], has_all: bool) -> None:
    """Say on stderr what may differ from a run that was not interrupted."""
    now, before = checkpoint.versions(), state["versions"]
    changes = [
        f"{name} {before[name]} before, {now[name]} now"
        for name in now
        if before[name] != now[name]
    ]
    if changes:
        print(f"warning: the last digits may change: {'; '.join(changes)}", file=sys.stderr)
    if not has_all:
        print("warning: files of TensorBoard are missing; its curves have a gap", file=sys.stderr)
