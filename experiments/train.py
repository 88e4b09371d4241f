"""The main job: train a sigmoid network on handwritten digits, with every gradient by hand.

    python -m experiments.train

trains 64-30-10 on the digits of scikit-learn, and writes what happened to a folder in `runs/`.

    python -m experiments.train --resume runs/...

goes on with an interrupted run, and ends with the same bits as if it had not been interrupted.

    torchrun --nproc-per-node 2 -m experiments.train

trains in two processes, each with its share of every batch: see docs/scaling.md.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.train").main())

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments import checkpoint, resume
from experiments.board import Board, keep_events
from experiments.checkpoint import LAST
from experiments.command_line import finish_first, parse, refuse, stopped
from experiments.data import DEFAULTS, Data, load
from experiments.distributed import Processes
from experiments.report import write_report
from experiments.run_folder import RunFolder, run_path
from experiments.session import Session, state_of
from experiments.training import COMMAND, Config, Training
from experiments.verdicts import is_good, line, table, verdicts, warn

PROGRAM = COMMAND


def settings(config: Config, training: Training) -> dict[str, Any]:
    """The options of the run, and what follows from them."""
    options = asdict(config)
    del options["dry_run"], options["resume"]
    return options | {
        "net": training.net_name,
        "output": _output(config.cost),
        "device": str(training.device),
        "processes": training.processes,
    }


def _output(cost: str) -> str:
    return "sigmoid" if cost == "quadratic" else "z"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    with Processes() as processes:
        return _main(arguments, processes)


def _main(arguments: Sequence[str] | None, processes: Processes) -> int:
    config = processes.alike(lambda: _options(arguments, processes))
    name, run = config.name, config.resume
    if run is None and name is not None and resume.is_run(config.run_folder / name):
        run = config.run_folder / name
    if run is not None:
        return _resume(config, run, arguments, processes)
    training = _prepare(config, processes)
    if name is None:
        default = f"{config.dataset}__{training.net_name}__seed{config.seed}"
        path = processes.from_first(lambda: run_path(config.run_folder, default))
    else:
        path = config.run_folder / name
    if config.dry_run:
        return _dry_run(config, training, path)
    return _start(config, training, path, processes)


def _options(arguments: Sequence[str] | None, processes: Processes) -> Config:
    config = parse(Config, arguments, PROGRAM)
    if config.resume is None and config.dataset in DEFAULTS:
        others = DEFAULTS[config.dataset]._asdict()
        config = parse(Config, arguments, PROGRAM, Config(config.dataset, **others))
    if config.dry_run and (config.resume or config.name):
        given = "--resume" if config.resume else "--name"
        refuse(PROGRAM, f"--dry-run trains a new network; it does not go with {given}")
    if config.resume and config.name:
        refuse(PROGRAM, "--name is for a run that may be new; it does not go with --resume")
    if config.shard and not processes.are_several:
        refuse(PROGRAM, "--shard divides weights over the processes that torchrun starts; got one")
    if processes.are_several and config.device not in ("auto", "cpu", "cuda"):
        refuse(
            PROGRAM,
            f"--device must be auto, cpu or cuda for several processes; got {config.device}",
        )
    try:
        processes.require_restartable(config.resume is not None or config.name is not None)
    except ValueError as error:
        refuse(PROGRAM, error)
    return config


def _prepare(config: Config, processes: Processes) -> Training:
    """The network and its data; says what they are."""
    config = replace(config, device=processes.device(config.device))
    data = processes.in_turn(lambda: _data(config))
    training = processes.alike(lambda: _made(config, data, processes))
    shared = f", in {training.processes} processes" if processes.are_several else ""
    epochs = f"1 ({config.epochs} without --dry-run)" if config.dry_run else config.epochs
    print(
        f"{training.net_name} {config.activation}, output {_output(config.cost)}, "
        f"{config.cost} cost, on {config.dataset}: "
        f"{len(training.y_train)} training samples, {len(training.y_test)} test samples; "
        f"epochs: {epochs}, updates in each: {training.updates_per_epoch}; "
        f"on {training.device}{shared}",
        flush=True,
    )
    return training


def _data(config: Config) -> Data:
    if config.data_dir is not None and config.dataset != "mnist":
        refuse(PROGRAM, f"--data-dir goes only with --dataset mnist; got {config.dataset}")
    try:
        return load(config.dataset, config.data_dir)
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f"--dataset {config.dataset}: {error}{_other_source(config)}")


def _other_source(config: Config) -> str:
    is_download = config.dataset == "mnist" and config.data_dir is None
    return "; --data-dir FOLDER reads files that are there already" if is_download else ""


def _made(config: Config, data: Data, processes: Processes) -> Training:
    try:
        return make_training(config, data, processes)
    except (RuntimeError, TypeError) as error:  # what PyTorch raises if the sizes are too large
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")


def make_training(config: Config, data: Data, processes: Processes) -> Training:
    """One that the processes share, if there are several."""
    if not processes.are_several:
        return Training(config, data)
    from experiments.shared_training import SharedTraining  # takes a second to import

    return SharedTraining(config, data, processes)


def _dry_run(config: Config, training: Training, path: Path) -> int:
    for x, y in training.epoch():
        cost = training.update(x, y)
        if not is_good(cost):
            break
    metrics = training.metrics()
    print(table(training.whole_trace(), config.learning_rate))
    one = training.updates == training.updates_per_epoch
    print(f"after {'one epoch' if one else f'update {training.updates}'}: {line(metrics)}")
    print(f"a run would write to {path}; nothing was written")
    return warn(training, metrics, cost)


def _start(config: Config, training: Training, path: Path, processes: Processes) -> int:
    state = state_of(config, training)
    state["training"]["net"] = training.whole_weights()

    def make() -> RunFolder:
        if config.name is not None and os.path.lexists(path):
            refuse(PROGRAM, f"--name must be that of a run, or a new one; got {path}")
        try:
            files = {LAST: checkpoint.pack(state)}
            return RunFolder(path, settings(config, training), files)
        except OSError as error:
            refuse(PROGRAM, f"--run-folder must be a place to write to: {error}")

    made = processes.from_first(make)
    folder = processes.only_first(lambda: made, made.path)
    option = "--run-folder" if config.name is None else "--name"
    with processes.alike(lambda: resume.locked(folder, option)):
        return _run(config, training, folder, state, processes)


def _resume(
    given: Config, path: Path, arguments: Sequence[str] | None, processes: Processes
) -> int:
    option = "--resume" if given.name is None else "--name"
    there = processes.alike(lambda: resume.reopened(path, option))
    folder = processes.only_first(lambda: there, path)
    with processes.alike(lambda: resume.locked(folder, option)):
        state = processes.alike(lambda: resume.read(path, not processes.are_several, option))
        config = processes.alike(lambda: resume.continued(given, state, path, arguments, option))
        training = _prepare(config, processes)
        processes.alike(lambda: resume.load(training, state, path, option))
        done, total = training.updates, config.epochs * training.updates_per_epoch

        def go_on() -> bool:
            if done > total:
                least = -(-done // training.updates_per_epoch)
                refuse(PROGRAM, f"--epochs must be at least {least} in {path}; got {config.epochs}")
            try:
                folder.go_on(settings(config, training), done)
                return keep_events(path, state["events"])
            except (OSError, ValueError) as error:
                refuse(PROGRAM, f"{option} must lead to a folder that a run can go on in: {error}")

        has_all = processes.from_first(go_on)
        print(_where_it_is(done, total), flush=True)
        resume.warn_of_changes(state, has_all)
        return _run(config, training, folder, state, processes)


def _where_it_is(done: int, total: int) -> str:
    if done < total:
        return f"going on after update {done} of {total}"
    return f"complete already: all {total} updates were made before; a larger --epochs adds more"


def _run(
    config: Config,
    training: Training,
    folder: RunFolder,
    state: dict[str, Any],
    processes: Processes,
) -> int:
    """Train, from the state on that the training is in."""
    started = time.perf_counter()
    session = Session(config, training, folder, state)
    is_complete = training.updates == session.total
    again = [*processes.launcher, PROGRAM.split()[-1], "--resume", str(folder.path)]
    if config.shard:
        again.append("--shard")
    try:
        with (
            # A process may get a signal from the system, and the same one again from torchrun.
            finish_first(every_time=processes.are_several) as received,
            processes.only_first(
                lambda: Board(folder.path, training.updates, state["curves"]), folder.path
            ) as board,
        ):
            metrics, cost = session.train(board, received)
            seconds = time.perf_counter() - started
        found = verdicts(training.whole_trace(), config.learning_rate)
        lines = [line(metrics), *found]
        page = processes.from_first(lambda: write_report(folder.path, folder.config, lines))
    except KeyboardInterrupt as stop:
        processes.wait()  # until the checkpoint is written: torchrun stops all as soon as one ends
        return stopped(stop, _how_to_go_on(session, again))
    except BrokenPipeError:  # the reader of the output has left
        raise
    except OSError as error:
        is_there = folder.path.is_dir()
        kept = _how_to_go_on(session, again) if is_there else f"{folder.path} is no longer there"
        print(f"stopped: {error}; {kept}", file=sys.stderr)
        return 1
    spent = (
        f" after {seconds:.1f} s; {board.traces.seconds:.1f} s of that was spent on logging what "
        "the layers did"
    )
    print(f"test accuracy {metrics['test_accuracy']:.2%}{'' if is_complete else spent}")
    _print_results(found, folder.path, page)
    return warn(training, metrics, cost, session.began, session.is_stopped)


def _print_results(found: Sequence[str], folder: Path, page: Path) -> None:
    for each in found:
        print(f"verdict on {each}")
    print(f"run folder: {folder}")
    print(f"report:     {page}")
    print(f"to see it:  tensorboard --logdir {shlex.quote(str(folder))}")


def _how_to_go_on(session: Session, again: Sequence[str]) -> str:
    saved = f"update {session.saved} of {session.total} is saved"
    return f"{saved}; to go on: {shlex.join(again)}"
