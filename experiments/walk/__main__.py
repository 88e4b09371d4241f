"""The command line of the walk: `python -m experiments.walk`."""

if __name__ == "__main__":  # first, so that it can be interrupted while everything else is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.walk.__main__").main())

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tyro.extras import literal_type_from_choices

from experiments import checkpoint
from experiments.command_line import parse, refuse, require_counts, require_rate, require_seed
from experiments.data import load
from experiments.networks import activations, build_cost, build_net
from experiments.run_folder import can_be_made
from experiments.walk.page import page
from experiments.walk.passes import one_pass, parameters
from manual_bp import Cost

PROGRAM = "python -m experiments.walk"

# Bytes of a page, so that it opens at once and can be sent by mail.
LARGEST = 1_000_000


@dataclass(frozen=True)
class Config:
    """Write a page that shows one step of learning: forward, BP1 to BP4, gradient descent."""

    sizes: tuple[int, ...] = (4, 3, 2)
    """Inputs, neurons of each layer, outputs."""
    activation: Annotated[
        str,
        tyro.conf.arg(
            constructor_factory=lambda: literal_type_from_choices(sorted(activations())),
            help_behavior_hint="(default: sigmoid)",  # which tyro would show as a list
        ),
    ] = "sigmoid"
    """The activation of the hidden layers."""
    cost: Literal["quadratic", "sigmoid-cross-entropy", "softmax-cross-entropy"] = "quadratic"
    """The cost, which determines the output: a sigmoid for the quadratic cost, no activation for
    the cross-entropies, which take z."""
    batch_size: int = 5
    """Samples in the batch."""
    learning_rate: float = 3.0
    """η, the step size of gradient descent."""
    seed: int = 0
    """Determines the weights, the inputs and the targets."""
    checkpoint: Path | None = None
    """Walk through the network of a run of experiments.train, with the first samples of its test
    data: the run's folder, for its last state, or one of the checkpoints in it."""
    output: Path = Path("runs/walk.html")
    """Where the page is written; an existing file is replaced."""

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            sizes = " ".join(map(str, self.sizes))
            raise ValueError(f"--sizes must be two or more sizes of at least 1; got {sizes}")
        require_counts(self, "batch_size")
        require_rate(self.learning_rate)
        require_seed(self.seed)
        if self.checkpoint is not None:
            self._require_nothing_of_the_run()
        if self.output.is_dir() or not can_be_made(self.output.parent):
            raise ValueError(f"--output must be a file to write to; got {str(self.output)!r}")

    def _require_nothing_of_the_run(self) -> None:
        for name in ("sizes", "activation", "cost", "seed"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name} is the run's own; it does not go with --checkpoint")


class Subject(NamedTuple):
    """What is walked through: a network, a batch of x (N, in) and y (N, out), and the cost.

    source: Where the network and the batch come from, for the page.
    """

    net: nn.Sequential
    x: Tensor
    y: Tensor
    cost: Cost
    source: str


def invent(config: Config) -> Subject:
    """A network with initial weights, normally distributed inputs, and a random class for each."""
    torch.manual_seed(config.seed)
    net = build_net(config.sizes, config.activation, config.cost)
    x = torch.randn(config.batch_size, config.sizes[0])
    labels = torch.randint(config.sizes[-1], (config.batch_size,))
    y = F.one_hot(labels, config.sizes[-1]).float()
    return Subject(net, x, y, build_cost(config.cost), f"seed {config.seed}")


def trained(config: Config, run: Path) -> tuple[Config, Subject]:
    """The network of a run and the first samples of its test data; and the options of that net.

    Raises:
        OSError: The checkpoint cannot be read.
        ValueError: It is damaged, or not one of experiments.train.
    """
    state = checkpoint.read(run / checkpoint.LAST if run.is_dir() else run)
    try:
        options, training = state["config"], state["training"]
        folder = options["data_dir"]
        data = load(options["dataset"], folder if folder is None else Path(folder))
        sizes = (data.features, *options["hidden"], data.classes)
        net = build_net(sizes, options["activation"], options["cost"])
        net.load_state_dict(training["net"])
        source = f"{options['dataset']} after {training['updates']} updates"
    except (KeyError, TypeError, RuntimeError):
        raise ValueError(f"{run} is not a checkpoint of experiments.train") from None
    x = data.x_test[: config.batch_size]
    y = F.one_hot(data.label_test[: config.batch_size], data.classes).float()
    subject = Subject(net, x, y, build_cost(options["cost"]), source)
    return replace(
        config, sizes=sizes, activation=options["activation"], cost=options["cost"], checkpoint=None
    ), subject


def write(config: Config, subject: Subject) -> tuple[str, bool]:
    """The page, and whether it has the passes of single samples, which may take too much room."""
    net, x, y, cost, source = subject
    description = {
        "sizes": config.sizes,
        "activation": config.activation,
        "output": "sigmoid" if config.cost == "quadratic" else "none",
        "cost": config.cost,
        "learning_rate": config.learning_rate,
        "samples": len(x),
        "source": source,
    }
    shared = parameters(net)
    batch = one_pass(net, x, y, cost, config.learning_rate)
    # A page with one more pass for each sample has at least this many bytes.
    least = len(x) * 4 * sum(batch[name].numel() for name in batch if name.startswith("grad_"))
    if len(x) > 1 and least < LARGEST:
        samples = [
            one_pass(net, x[i : i + 1], y[i : i + 1], cost, config.learning_rate)
            for i in range(len(x))
        ]
        text = page(description, shared, [batch, *samples])
        if len(text.encode()) < LARGEST:
            return text, True
    return page(description, shared, [batch]), len(x) == 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    try:
        if config.checkpoint is None:
            subject = invent(config)
        else:
            config, subject = trained(config, config.checkpoint)
    except (OSError, ValueError) as error:
        refuse(PROGRAM, f"--checkpoint must be the folder of a run: {error}")
    except (RuntimeError, TypeError) as error:  # what PyTorch raises if the sizes are too large
        refuse(PROGRAM, f"the network cannot be made: {str(error).splitlines()[0]}")
    text, has_samples = write(config, subject)
    size = len(text.encode())
    if size >= LARGEST:
        refuse(
            PROGRAM,
            f"--sizes and --batch-size must make a page below {LARGEST:,} bytes; got "
            f"{size:,} for {'-'.join(map(str, config.sizes))} and {len(subject.x)} samples",
        )
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(text, encoding="utf-8")
    except OSError as error:
        refuse(PROGRAM, f"--output must be a file to write to: {error}")
    if not has_samples:
        print(f"only the whole batch: with each sample, the page would exceed {LARGEST:,} bytes")
    print(f"{size:,} bytes; open it in a browser: {config.output}")
    return 0
