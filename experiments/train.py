"""The main job: train a sigmoid network on handwritten digits, with every gradient by hand.

    python -m experiments.train

trains 64-30-10 on the digits of scikit-learn, and writes what happened to a folder in `runs/`.

    python -m experiments.train --resume runs/...

goes on with an interrupted run, and ends with the same bits as if it had not been interrupted.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.train").main())

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments import checkpoint
from experiments.board import Board, keep_events
from experiments.checkpoint import BEST, LAST
from experiments.command_line import finish_first, parse, refuse, stopped
from experiments.data import DEFAULTS, load
from experiments.report import write_report
from experiments.run_folder import RunFolder, run_path
from experiments.session import Session, state_of
from experiments.training import Config, Training
from experiments.verdicts import is_good, line, verdicts, warn

PROGRAM = "python -m experiments.train"

# What may have another value when a run goes on; it then has that value from there on.
_FREE = {"epochs", "log_every", "checkpoint_every", "on_nan", "device", "data_dir", "resume"}


def settings(config: Config, training: Training) -> dict[str, Any]:
    """The options of the run, and what follows from them."""
    options = asdict(config)
    del options["dry_run"], options["resume"]
    return options | {
        "net": training.net_name,
        "output": _output(config.cost),
        "device": str(training.device),
    }


def _output(cost: str) -> str:
    return "sigmoid" if cost == "quadratic" else "z"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    if config.resume is not None:
        if config.dry_run:
            refuse(PROGRAM, "--dry-run trains a new network; it does not go with --resume")
        return _resume(config, config.resume, arguments)
    if config.dataset in DEFAULTS:
        others = DEFAULTS[config.dataset]._asdict()
        config = parse(Config, arguments, PROGRAM, Config(config.dataset, **others))
    training = _prepare(config)
    name = f"{config.dataset}__{training.net_name}__seed{config.seed}"
    path = run_path(config.run_folder, name)
    return _dry_run(config, training, path) if config.dry_run else _start(config, training, path)


def _prepare(config: Config) -> Training:
    """The network and its data; says what they are."""
    if config.data_dir is not None and config.dataset != "mnist":
        refuse(PROGRAM, f"--data-dir goes only with --dataset mnist; got {config.dataset}")
    try:
        data = load(config.dataset, config.data_dir)
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f"--dataset {config.dataset}: {error}{_other_source(config)}")
    try:
        training = Training(config, data)
    except (RuntimeError, TypeError) as error:  # what PyTorch raises if the sizes are too large
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")
    print(
        f"{training.net_name} {config.activation}, output {_output(config.cost)}, "
        f"{config.cost} cost, on {config.dataset}: "
        f"{len(training.y_train)} training samples, {len(training.y_test)} test samples; "
        f"epochs: {config.epochs}, updates in each: {training.updates_per_epoch}; "
        f"on {training.device}",
        flush=True,
    )
    return training


def _other_source(config: Config) -> str:
    is_download = config.dataset == "mnist" and config.data_dir is None
    return "; --data-dir FOLDER reads files that are there already" if is_download else ""


def _dry_run(config: Config, training: Training, path: Path) -> int:
    for x, y in training.epoch():
        cost = training.update(x, y)
        if not is_good(cost):
            break
    metrics = training.metrics()
    print(training.whole_trace().diagnostics(config.learning_rate))
    print(f"after one epoch: {line(metrics)}")
    print(f"a run would write to {path}; nothing was written")
    return warn(training, metrics, cost)


def _start(config: Config, training: Training, path: Path) -> int:
    state = state_of(config, training)
    try:
        folder = RunFolder(path, settings(config, training), {LAST: checkpoint.pack(state)})
        lock = folder.lock()
    except OSError as error:
        refuse(PROGRAM, f"--run-folder must be a place to write to: {error}")
    with lock:
        return _run(config, training, folder, state)


def _resume(given: Config, path: Path, arguments: Sequence[str] | None) -> int:
    if not _is_run(path):
        refuse(PROGRAM, f"--resume must be the folder of a run, with a file {LAST}; got {path}")
    try:
        folder = RunFolder.reopened(path)
        lock = folder.lock()
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f"--resume must be a folder that a run can go on in: {error}")
    with lock:
        state = _read(path)
        config = _continued(given, state, path, arguments)
        training = _prepare(config)
        try:
            training.load_state_dict(state["training"])
        except ValueError as error:
            refuse(PROGRAM, f"--resume {path}: {error}")
        done, total = training.updates, config.epochs * training.updates_per_epoch
        if done > total:
            least = -(-done // training.updates_per_epoch)
            refuse(PROGRAM, f"--epochs must be at least {least} in {path}; got {config.epochs}")
        try:
            folder.go_on(settings(config, training), done)
            has_all = keep_events(path, state["events"])
        except (OSError, ValueError) as error:
            refuse(PROGRAM, f"--resume must be a folder that a run can go on in: {error}")
        print(f"going on after update {done} of {total}", flush=True)
        _warn_of_changes(state, has_all)
        return _run(config, training, folder, state)


def _is_run(path: Path) -> bool:
    try:
        return (path / LAST).is_file()
    except OSError:  # such as a name that is too long
        return False


def _read(path: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    try:
        return checkpoint.read(path / LAST)
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f"--resume: {error}{_advice(path)}")


def _advice(path: Path) -> str:
    """How to go on without the last checkpoint, if the best one is there."""
    try:
        step = checkpoint.read(path / BEST)["training"]["updates"]
    except (OSError, ValueError):
        return ""
    copy = shlex.join(["cp", str(path / BEST), str(path / LAST)])
    return f"; {BEST} is whole: to go on after its update {step}, first {copy}"


def _continued(
    given: Config, state: dict[str, Any], path: Path, arguments: Sequence[str] | None
) -> Config:
    """The options of the run, and those of the free ones that are given now."""
    here: dict[str, Any] = {"run_folder": path.parent}  # it may have been moved
    if given.device != "auto":
        here["device"] = given.device  # the one that it was on may be missing here
    if state["config"]["data_dir"] is not None:
        here["data_dir"] = Path(state["config"]["data_dir"])
    try:
        before = Config(**state["config"] | here)
    except (TypeError, ValueError) as error:
        refuse(PROGRAM, f"--resume: the options in {path / LAST} do not suit: {error}")
    # A flag that is set by default could not be given again.
    now = parse(Config, arguments, PROGRAM, replace(before, deterministic=False))
    now = replace(now, deterministic=now.deterministic or before.deterministic)
    for name, value in asdict(now).items():
        if name not in _FREE and value != getattr(before, name):
            option = "--" + name.replace("_", "-")
            refuse(PROGRAM, f"{option} is {getattr(before, name)} in {path}; got {value}")
    return replace(now, device=before.device)


def _warn_of_changes(state: dict[str, Any], has_all: bool) -> None:
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


def _run(config: Config, training: Training, folder: RunFolder, state: dict[str, Any]) -> int:
    """Train, from the state on that the training is in."""
    started = time.perf_counter()
    session = Session(config, training, folder, state)
    try:
        with (
            finish_first() as received,
            Board(folder.path, training.updates, state["curves"]) as board,
        ):
            metrics, cost = session.train(board, received)
            seconds = time.perf_counter() - started
        found = verdicts(training.whole_trace(), config.learning_rate)
        page = write_report(folder.path, folder.config, [line(metrics), *found])
    except KeyboardInterrupt as stop:
        return stopped(stop, _how_to_go_on(session))
    except BrokenPipeError:  # the reader of the output has left
        raise
    except OSError as error:
        is_there = folder.path.is_dir()
        kept = _how_to_go_on(session) if is_there else f"{folder.path} is no longer there"
        print(f"stopped: {error}; {kept}", file=sys.stderr)
        return 1
    print(
        f"test accuracy {metrics['test_accuracy']:.2%} after {seconds:.1f} s; "
        f"{board.traces.seconds:.1f} s of that was spent on logging what the layers did"
    )
    for each in found:
        print(f"verdict on {each}")
    print(f"run folder: {folder.path}")
    print(f"report:     {page}")
    print(f"to see it:  tensorboard --logdir {shlex.quote(str(folder.path))}")
    return warn(training, metrics, cost, session.began, session.is_stopped)


def _how_to_go_on(session: Session) -> str:
    python = Path(sys.executable).name
    again = shlex.join([python, *PROGRAM.split()[1:], "--resume", str(session.folder.path)])
    return f"update {session.saved} of {session.total} is saved; to go on: {again}"
