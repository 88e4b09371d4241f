"""The main job: train a sigmoid network on handwritten digits, with every gradient by hand.

    python -m experiments.train

trains 64-30-10 on the digits of scikit-learn, and writes what happened to a folder in `runs/`.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.train").main())

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.board import Board
from experiments.command_line import parse, refuse, stopped
from experiments.data import load
from experiments.run_folder import RunFolder, run_path
from experiments.training import Config, Training
from experiments.verdicts import line, print_verdicts, warn

PROGRAM = "python -m experiments.train"


def observe(board: Board, training: Training, step: int) -> dict[str, float]:
    """Log what is logged once per epoch; return the metrics."""
    metrics = training.metrics()
    board.log_metrics(metrics, step)
    trace = training.trace(training.data.x_test, training.y_test)
    board.traces.log_histograms(trace, step)
    if training.data.image_shape is not None:
        board.log_weight_images(trace.layers[0].w, training.data.image_shape, step)
    return metrics


def draw(board: Board, training: Training, step: int) -> None:
    """Log the pictures that are drawn only at the end; each takes as long as a small epoch."""
    board.traces.log_heat_map(step)
    data = training.data
    predictions = training.trace(data.x_test, training.y_test).output.argmax(-1)
    board.log_confusion(data.label_test, predictions, data.class_names, step)


def train(
    config: Config, training: Training, folder: RunFolder
) -> tuple[dict[str, float], float, float]:
    """Train for all epochs, or until the cost is not finite.

    Shows a progress bar on a terminal; if the output goes elsewhere, prints a line for each epoch.

    Returns:
        The last metrics, the cost of the last batch, and the seconds that it took to log what the
        layers did.
    """
    on_terminal = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
    total = config.epochs * training.updates_per_epoch
    step = 0
    with (
        Board(folder.path) as board,
        tqdm(total=total, unit=" updates", disable=not on_terminal) as bar,
    ):
        metrics = observe(board, training, step)
        for epoch in range(1, config.epochs + 1):
            for x, y in training.epoch():
                look = partial(board.traces.log, step=step, learning_rate=config.learning_rate)
                cost = training.update(x, y, look if step % config.log_every == 0 else None)
                step += 1
                bar.update()
                if not math.isfinite(cost):
                    break
            metrics = observe(board, training, step)
            folder.add_metrics({"epoch": epoch, "step": step} | metrics)
            bar.set_postfix_str(f"test accuracy {metrics['test_accuracy']:.2%}")
            if not on_terminal:
                print(f"epoch {epoch:{len(str(config.epochs))}}/{config.epochs}  {line(metrics)}")
            if not (math.isfinite(cost) and math.isfinite(metrics["train_cost"])):
                break
        draw(board, training, step)
        board.log_config(folder.config, metrics)
    return metrics, cost, board.traces.seconds


def settings(config: Config, training: Training) -> dict[str, Any]:
    """The options of the run, and what follows from them."""
    options = asdict(config)
    del options["dry_run"]
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
    try:
        training = Training(config, load(config.dataset))
    except (RuntimeError, TypeError) as error:  # what PyTorch raises if the sizes are too large
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")
    name = f"{config.dataset}__{training.net_name}__seed{config.seed}"
    path = run_path(config.run_folder, name)
    print(
        f"{training.net_name} {config.activation}, output {_output(config.cost)}, "
        f"{config.cost} cost, on {config.dataset}: "
        f"{len(training.y_train)} training samples, {len(training.y_test)} test samples; "
        f"epochs: {config.epochs}, updates in each: {training.updates_per_epoch}; "
        f"on {training.device}",
        flush=True,
    )
    return _dry_run(config, training, path) if config.dry_run else _run(config, training, path)


def _dry_run(config: Config, training: Training, path: Path) -> int:
    for x, y in training.epoch():
        cost = training.update(x, y)
        if not math.isfinite(cost):
            break
    metrics = training.metrics()
    print(training.diagnostics(config.learning_rate))
    print(f"after one epoch: {line(metrics)}")
    print(f"a run would write to {path}; nothing was written")
    return warn(training, metrics, cost)


def _run(config: Config, training: Training, path: Path) -> int:
    try:
        folder = RunFolder(path, settings(config, training))
    except OSError as error:
        refuse(PROGRAM, f"--run-folder must be a place to write to: {error}")
    kept = f"the results so far are in {folder.path}"
    started = time.perf_counter()
    try:
        metrics, cost, observing = train(config, training, folder)
    except KeyboardInterrupt as stop:
        return stopped(stop, kept)
    except BrokenPipeError:  # the reader of the output has left
        raise
    except OSError as error:
        where = kept if folder.path.is_dir() else f"{folder.path} is no longer there"
        print(f"stopped: {error}; {where}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(
        f"test accuracy {metrics['test_accuracy']:.2%} after {seconds:.1f} s; "
        f"{observing:.1f} s of that was spent on logging what the layers did"
    )
    print_verdicts(training.diagnostics(config.learning_rate))
    print(f"run folder: {folder.path}")
    print(f"to see it:  tensorboard --logdir {shlex.quote(str(folder.path))}")
    return warn(training, metrics, cost)
