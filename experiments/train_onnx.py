"""Training without PyTorch: a step is exported once, and onnxruntime and NumPy do the rest.

    python -m experiments.train_onnx

exports the training step of the main job's 64-30-10 network, and trains it on the same digits in
the same order. The loop could run on a device that has nothing but an inference runtime.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while the rest is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.train_onnx").main())

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.command_line import (
    parse,
    refuse,
    require_counts,
    require_rate,
    require_seed,
    require_sizes,
)

PROGRAM = "python -m experiments.train_onnx"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Config:
    """Train a sigmoid network on digits in onnxruntime, with a step exported from PyTorch."""

    hidden: tuple[int, ...] = (30,)
    """Sizes of the hidden layers, from the input on."""
    learning_rate: float = 3.0
    """The step size of gradient descent on the mean cost of a batch."""
    batch_size: int = 10
    """Samples in a batch; the last one of an epoch may be smaller."""
    epochs: int = 30
    """How many times every training sample is used."""
    seed: int = 0
    """Determines the initial weights and the order of the samples."""
    model: Path = Path("runs/step.onnx")
    """Where the exported step is written; an existing file is replaced."""

    def __post_init__(self) -> None:
        require_sizes(self.hidden)
        require_rate(self.learning_rate)
        require_counts(self, "batch_size", "epochs")
        require_seed(self.seed)
        if not self.model.parent.is_dir():
            raise ValueError(f"--model must be in an existing folder; got {str(self.model)!r}")


@dataclass(frozen=True)
class Data:
    """Images as rows, their labels, and their labels as rows of 0 and 1.

    orders: The order of the training samples, for each epoch.
    """

    x_train: Array
    y_train: Array
    label_train: Array
    x_test: Array
    label_test: Array
    orders: list[Array]


def prepare(config: Config) -> tuple[Data, dict[str, Array]]:
    """Export the step; return the data and the initial parameters. Only this needs PyTorch."""
    import torch

    from experiments.data import load
    from experiments.networks import build_net
    from experiments.training import batches
    from manual_bp import QuadraticCost, TrainingStep

    # The exporter logs which optional extensions of PyTorch it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    digits = load("digits")
    torch.manual_seed(config.seed)
    sizes = (digits.features, *config.hidden, digits.classes)
    try:
        net = build_net(sizes, "sigmoid", "quadratic")
    except (RuntimeError, TypeError) as error:  # what PyTorch raises if the sizes are too large
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")
    TrainingStep(net, QuadraticCost(), config.learning_rate).export_onnx(config.model)
    order = torch.Generator().manual_seed(config.seed)
    count = len(digits.label_train)
    orders = [torch.cat(list(batches(count, count, order))) for _ in range(config.epochs)]
    label_train = digits.label_train.numpy()
    data = Data(
        x_train=digits.x_train.numpy(),
        y_train=np.eye(digits.classes, dtype=np.float32)[label_train],
        label_train=label_train,
        x_test=digits.x_test.numpy(),
        label_test=digits.label_test.numpy(),
        orders=[each.numpy() for each in orders],
    )
    return data, {name: p.detach().numpy() for name, p in net.named_parameters()}


def learn(config: Config, data: Data, parameters: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Train in onnxruntime and NumPy; yield the parameters after each epoch."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a second thread slows down products this small
    session: Any = onnxruntime.InferenceSession(
        config.model, options, providers=["CPUExecutionProvider"]
    )
    outputs = [f"new.{name}" for name in parameters]
    lr = np.array(config.learning_rate, np.float32)
    for order in data.orders:
        for start in range(0, len(order), config.batch_size):
            some = order[start : start + config.batch_size]
            batch = {"x": data.x_train[some], "y": data.y_train[some], "lr": lr}
            parameters = dict(
                zip(parameters, session.run(outputs, batch | parameters), strict=True)
            )
        yield parameters


def accuracy(parameters: dict[str, Array], x: Array, label: Array) -> float:
    """The share of samples for which the output of their class is the largest."""
    a = x
    values = list(parameters.values())
    for w, b in zip(values[::2], values[1::2], strict=True):
        with np.errstate(over="ignore"):  # where e^(-z) is infinite, a is 0, which is right
            a = 1 / (1 + np.exp(-(a @ w.T + b)))
    return float((a.argmax(-1) == label).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    try:
        data, parameters = prepare(config)
    except (ImportError, OSError) as error:
        refuse(PROGRAM, error)
    print(f"step exported to {config.model}, {config.model.stat().st_size} bytes", flush=True)
    started = time.perf_counter()
    found = 0.0
    for epoch, learned in enumerate(learn(config, data, parameters), start=1):
        found = accuracy(learned, data.x_test, data.label_test)
        of_training = accuracy(learned, data.x_train, data.label_train)
        width = len(str(config.epochs))
        print(
            f"epoch {epoch:{width}}/{config.epochs}  "
            f"accuracy {of_training:.2%} train, {found:.2%} test",
            flush=True,
        )
    seconds = time.perf_counter() - started
    print(f"test accuracy {found:.2%} after {seconds:.1f} s in onnxruntime")
    return 0
