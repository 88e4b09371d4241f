"""The main job: train a sigmoid network on handwritten digits, every gradient by hand.

    python -m experiments.train

trains 64-30-10 on scikit-learn's digits and writes what happened to a folder below `runs/`.
"""

if __name__ == "__main__":  # first, so that it may be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.train").main())

import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiments.board import Board
from experiments.command_line import (
    parse,
    refuse,
    require_counts,
    require_rate,
    require_seed,
    require_sizes,
    stopped,
)
from experiments.data import Data, Dataset, load
from experiments.run_folder import RunFolder, can_be_made, run_path
from manual_bp import (
    Cost,
    Diagnostics,
    LeakyReLU,
    Linear,
    QuadraticCost,
    ReLU,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    Trace,
    TrainingStep,
    backprop,
    record,
)

PROGRAM = "python -m experiments.train"

ACTIVATIONS = {
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "relu": ReLU,
    "leaky-relu": LeakyReLU,
    "softplus": Softplus,
}


@dataclass(frozen=True)
class Config:
    """Train a network by gradient descent, every gradient written by hand."""

    dataset: Dataset = "digits"
    """What to learn: a dataset that scikit-learn carries with it."""
    hidden: tuple[int, ...] = (30,)
    """Sizes of the hidden layers, from the input on; none at all is possible."""
    activation: Literal["sigmoid", "tanh", "relu", "leaky-relu", "softplus"] = "sigmoid"
    """The activation of the hidden layers. With relu and the like, a learning rate of 1 is safer
    than 3."""
    cost: Literal["quadratic", "sigmoid-cross-entropy", "softmax-cross-entropy"] = "quadratic"
    """The cost, from which the output follows: a sigmoid under the quadratic cost; under the
    cross-entropies, which work on z, no activation."""
    learning_rate: float = 3.0
    """The step of gradient descent, on the mean cost of a batch. 3 suits the digits with the
    quadratic cost; the cross-entropies and the smaller datasets want less."""
    batch_size: int = 10
    """Samples in a batch; the last one of an epoch may be smaller."""
    epochs: int = 30
    """How many times every training sample is seen."""
    seed: int = 0
    """Fixes the first weights and the order of the samples. The test set is always the same."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one, else cpu."""
    method: Literal["autograd", "explicit", "step"] = "autograd"
    """autograd: our Functions, called by PyTorch. explicit: manual_bp.backprop, without autograd.
    step: manual_bp.TrainingStep, which is fastest. All follow the same trajectory, the last one up
    to rounding."""
    log_every: int = 100
    """Updates between two points of the curves of what the equations talk about."""
    run_folder: Path = Path("runs")
    """Where the run's own folder is made."""
    dry_run: bool = False
    """Build everything, train for one epoch, show how well each layer learns then, and write
    nothing."""

    def __post_init__(self) -> None:
        require_sizes(self.hidden)
        require_rate(self.learning_rate)
        require_counts(self, "batch_size", "epochs", "log_every")
        require_seed(self.seed)
        if not can_be_made(self.run_folder):
            raise ValueError(
                f"--run-folder must be a place to make folders in; got {str(self.run_folder)!r}"
            )
        _device(self.device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of devices that are no longer used
            device = torch.device(name)
            torch.zeros(1, device=device).item()
        is_usable = str(device) == name  # PyTorch reads cpu:300 as cpu:44
    except (RuntimeError, AssertionError, ImportError):
        is_usable = False
    if not is_usable:
        raise ValueError(
            f"--device must be auto, or one that PyTorch can use here, such as cpu; got {name!r}"
        )
    return device


def build_net(sizes: Sequence[int], activation: str, cost: str) -> nn.Sequential:
    """Linear and activation by turns; the last is a sigmoid, or none for a cost that works on z."""
    modules: list[nn.Module] = []
    for in_features, out_features in pairwise(sizes):
        activate: type[nn.Module] = ACTIVATIONS[activation]
        modules += [Linear(in_features, out_features), activate()]
    output = [Sigmoid()] if cost == "quadratic" else []
    return nn.Sequential(*modules[:-1], *output)


def build_cost(name: str) -> Cost:
    """The cost of that name, as the mean over samples."""
    costs = {
        "quadratic": QuadraticCost,
        "sigmoid-cross-entropy": SigmoidCrossEntropyCost,
        "softmax-cross-entropy": SoftmaxCrossEntropyCost,
    }
    return costs[name]()


def targets(labels: Tensor, classes: int, cost: Cost) -> Tensor:
    """Labels as the cost wants them: class indices for the softmax, else rows of 0 and 1."""
    if isinstance(cost, SoftmaxCrossEntropyCost):
        return labels
    return F.one_hot(labels, classes).float()


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The indices of one epoch's batches, in a random order."""
    yield from torch.split(torch.randperm(count, generator=generator), batch_size)


class Training:
    """A network, its data and its optimiser, ready for one update after another."""

    def __init__(self, config: Config, data: Data) -> None:
        self.device = _device(config.device)
        self.data = data.to(self.device)
        sizes = (data.features, *config.hidden, data.classes)
        self.net_name = "-".join(map(str, sizes))
        self.cost = build_cost(config.cost)
        self.y_train = targets(self.data.label_train, data.classes, self.cost)
        self.y_test = targets(self.data.label_test, data.classes, self.cost)
        torch.manual_seed(config.seed)
        self.net = build_net(sizes, config.activation, config.cost).to(self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=config.learning_rate)
        self.explicit = config.method == "explicit"
        self.step: TrainingStep | None = None
        if config.method == "step":
            self.step = TrainingStep(self.net, self.cost, config.learning_rate)
        self.batch_size = min(config.batch_size, len(self.y_train))
        self._order = torch.Generator().manual_seed(config.seed)

    @property
    def updates_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.y_train) / self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the next epoch."""
        for indices in batches(len(self.y_train), self.batch_size, self._order):
            there = indices.to(self.device)
            yield self.data.x_train[there], self.y_train[there]

    def update(self, x: Tensor, y: Tensor, look: Callable[[Trace], None] | None = None) -> float:
        """One step of gradient descent on one batch; the cost before it.

        look is given the Trace of the step's own pass, before the weights are changed.
        """
        if self.step is not None:
            if look is not None:
                look(self.trace(x, y))
            return self.step(x, y).item()
        self.optimizer.zero_grad()
        trace: Trace | None
        if self.explicit:
            trace = self.trace(x, y)
            trace.assign_grads()
            cost = trace.cost
        else:
            with nullcontext() if look is None else record(self.net) as trace:
                cost = self.cost(self.net(x), y)
                cost.backward()
        if look is not None and trace is not None:
            look(trace)
        self.optimizer.step()
        return cost.item()

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """What the algorithm sees on a batch; the network stays as it is."""
        return backprop(self.net, x, y, self.cost)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Cost and accuracy over all training and all test samples."""
        parts = {
            "train": (self.data.x_train, self.y_train, self.data.label_train),
            "test": (self.data.x_test, self.y_test, self.data.label_test),
        }
        found = {}
        for split, (x, y, labels) in parts.items():
            output = self.net(x)
            found[f"{split}_cost"] = self.cost(output, y).item()
            found[f"{split}_accuracy"] = (output.argmax(-1) == labels).float().mean().item()
        return found

    def diagnostics(self, learning_rate: float) -> Diagnostics:
        """How well each layer learns by now, over all training samples."""
        return self.trace(self.data.x_train, self.y_train).diagnostics(learning_rate)


def observe(board: Board, training: Training, step: int) -> dict[str, float]:
    """Log what is looked at once an epoch; the metrics."""
    metrics = training.metrics()
    board.log_metrics(metrics, step)
    trace = training.trace(training.data.x_test, training.y_test)
    board.traces.log_histograms(trace, step)
    if training.data.image_shape is not None:
        board.log_weight_images(trace.layers[0].w, training.data.image_shape, step)
    return metrics


def draw(board: Board, training: Training, step: int) -> None:
    """Log the pictures that are drawn once, at the end: each takes as long as a small epoch."""
    board.traces.log_heat_map(step)
    data = training.data
    predictions = training.trace(data.x_test, training.y_test).output.argmax(-1)
    board.log_confusion(data.label_test, predictions, data.class_names, step)


def train(
    config: Config, training: Training, folder: RunFolder
) -> tuple[dict[str, float], float, float]:
    """Train for all epochs, or until the cost is no number.

    Returns the last metrics, the cost of the last batch, and how many seconds it took to log what
    the layers did.

    A bar on a terminal; where the output goes elsewhere, a plain line for each epoch.
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
    """The options that made the run, with what they came to."""
    options = asdict(config)
    del options["dry_run"]
    return options | {
        "net": training.net_name,
        "output": _output(config.cost),
        "device": str(training.device),
    }


def _output(cost: str) -> str:
    return "sigmoid" if cost == "quadratic" else "z"


def line(metrics: dict[str, float]) -> str:
    """The metrics as a person reads them."""
    return (
        f"cost {metrics['train_cost']:.4f} train, {metrics['test_cost']:.4f} test;  "
        f"accuracy {metrics['train_accuracy']:.2%} train, {metrics['test_accuracy']:.2%} test"
    )


def print_verdicts(diagnostics: Diagnostics) -> None:
    """The verdicts without the numbers, layers of the same one together."""
    names: dict[str, list[str]] = {}
    for layer in diagnostics:
        names.setdefault(layer.verdict, []).append(layer.name)
    for verdict, those in names.items():
        print(f"verdict on layer{'s' if len(those) > 1 else ''} {', '.join(those)}: {verdict}")


def warn(training: Training, metrics: dict[str, float], cost: float) -> int:
    """Say on stderr what went wrong, if anything; the exit code, 1 if a cost is no number."""
    labels = training.data.label_train
    most = labels.bincount().max().item() / len(labels)
    # Where nothing is learned, two standard errors more than that are seldom right by chance.
    chance = most + 2 * math.sqrt(most * (1 - most) / len(labels))
    for value in (cost, metrics["train_cost"]):
        if not math.isfinite(value):
            reason = f"stopped: the cost is {value}; a smaller learning rate may help"
            print(reason, file=sys.stderr)
            return 1
    if metrics["train_accuracy"] <= chance:
        print(
            f"warning: nothing was learned: {metrics['train_accuracy']:.2%} of the training "
            f"samples are right, and always naming the most frequent class gets {most:.2%}; try "
            "another learning rate, or more epochs",
            file=sys.stderr,
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code."""
    config = parse(Config, arguments, PROGRAM)
    try:
        training = Training(config, load(config.dataset))
    except (RuntimeError, TypeError) as error:  # what PyTorch raises for sizes beyond its memory
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")
    name = f"{config.dataset}__{training.net_name}__seed{config.seed}"
    path = run_path(config.run_folder, name)
    print(
        f"{training.net_name} {config.activation}, output {_output(config.cost)}, "
        f"{config.cost} cost, on {config.dataset}: "
        f"{len(training.y_train)} samples to learn from, {len(training.y_test)} to test; "
        f"epochs: {config.epochs}, updates in each: {training.updates_per_epoch}; "
        f"on {training.device}",
        flush=True,
    )
    if config.dry_run:
        for x, y in training.epoch():
            cost = training.update(x, y)
            if not math.isfinite(cost):
                break
        metrics = training.metrics()
        print(training.diagnostics(config.learning_rate))
        print(f"after one epoch: {line(metrics)}")
        print(f"a run would write to {path}; nothing was written")
        return warn(training, metrics, cost)
    try:
        folder = RunFolder(path, settings(config, training))
    except OSError as error:
        refuse(PROGRAM, f"--run-folder must be a place to make folders in: {error}")
    kept = f"what was finished is in {folder.path}"
    started = time.perf_counter()
    try:
        metrics, cost, observing = train(config, training, folder)
    except KeyboardInterrupt as stop:
        return stopped(stop, kept)
    except BrokenPipeError:  # of who reads what is printed
        raise
    except OSError as error:
        where = kept if folder.path.is_dir() else f"{folder.path} is no longer there"
        print(f"stopped: {error}; {where}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(
        f"test accuracy {metrics['test_accuracy']:.2%} after {seconds:.1f} s; "
        f"{observing:.1f} s of that went into logging what the layers did"
    )
    print_verdicts(training.diagnostics(config.learning_rate))
    print(f"run folder: {folder.path}")
    print(f"to see it:  tensorboard --logdir {shlex.quote(str(folder.path))}")
    return warn(training, metrics, cost)
