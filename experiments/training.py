"""What the main job trains: its options, and one network with its data and optimiser."""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tyro.extras import literal_type_from_choices

from experiments import checkpoint
from experiments.command_line import require_counts, require_rate, require_seed, require_sizes
from experiments.data import Data, Dataset
from experiments.networks import activations, build_cost, build_net, targets
from experiments.run_folder import can_be_made
from manual_bp import Trace, TrainingStep, backprop, record

# How a run is started, with these options.
COMMAND = "python -m experiments.train"
_LONGEST_NAME = 255  # bytes, on most file systems


@dataclass(frozen=True)
class Config:
    """Train a small network by stochastic gradient descent, with every gradient written by hand."""

    dataset: Dataset = "digits"
    """What to learn. mnist is downloaded, unless --data-dir says where it is; moons and xor are
    points in the plane, of two classes."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the four idx files of MNIST are (train-images-idx3-ubyte and so on, or .gz)."""
    hidden: tuple[int, ...] = (30,)
    """Sizes of the hidden layers, from the input on; there may be none. (10 for moons, 4 for
    xor.)"""
    activation: Annotated[
        str,
        tyro.conf.arg(
            constructor_factory=lambda: literal_type_from_choices(sorted(activations())),
            help_behavior_hint="(default: sigmoid)",  # which tyro would show as a list
        ),
    ] = "sigmoid"
    """The activation of the hidden layers. With relu and similar ones, a learning rate of 1 is
    safer than 3."""
    cost: Literal["quadratic", "sigmoid-cross-entropy", "softmax-cross-entropy"] = "quadratic"
    """The cost, which determines the output: a sigmoid for the quadratic cost, no activation for
    the cross-entropies, which take z."""
    learning_rate: float = 3.0
    """The step size of gradient descent on the mean cost of a batch. 3 suits the digits with the
    quadratic cost; the cross-entropies, iris, wine and breast_cancer need less. (20 for moons, 10
    for xor.)"""
    batch_size: int = 10
    """Samples in a batch; the last one of an epoch may be smaller. (5 for moons.)"""
    epochs: int = 30
    """How many times every training sample is used. (100 for moons.)"""
    seed: int = 0
    """Determines the initial weights and the order of the samples. The test set is always the
    same."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto means cuda if PyTorch finds such a device, else cpu."""
    method: Literal["autograd", "explicit", "step"] = "autograd"
    """autograd: our layers, called by PyTorch. explicit: manual_bp.backprop, without autograd.
    step: manual_bp.TrainingStep, the fastest. All of them follow the same trajectory, step up to
    rounding."""
    log_every: int = 100
    """Updates between two points of the curves that show the terms of the four equations."""
    checkpoint_every: int = 1000
    """Updates between two checkpoints, from which an interrupted run can go on."""
    on_nan: Literal["stop", "continue"] = "stop"
    """What to do when the cost is nan or infinite. stop: say in which update and layer it began,
    and keep the last checkpoint before that."""
    shard: bool = False
    """Divide the weights over the processes that torchrun starts, so that each holds a part of them
    (FSDP2). Goes with --method autograd."""
    deterministic: bool = False
    """Use only operations of PyTorch that give the same bits each time, also on a GPU; some are
    slower."""
    run_folder: Path = Path("runs")
    """Where the folder of the run is created."""
    name: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """The name of that folder; by default the dataset, the network, the seed and the time. If there
    is a run of that name, it goes on, as with --resume: so the same command starts and goes on."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = None
    """Go on with the interrupted run in this folder, with its own options. Of these, epochs,
    log-every, checkpoint-every, on-nan, device and data-dir may be given again with other values;
    shard is only what is given now."""
    dry_run: bool = False
    """Train for one epoch, show how well each layer learns, and write nothing."""

    def __post_init__(self) -> None:
        require_sizes(self.hidden)
        require_rate(self.learning_rate)
        require_counts(self, "batch_size", "epochs", "log_every", "checkpoint_every")
        require_seed(self.seed)
        if not can_be_made(self.run_folder):
            raise ValueError(
                f"--run-folder must be a place to write to; got {str(self.run_folder)!r}"
            )
        if self.name is not None and not _is_folder_name(self.name):
            raise ValueError(f"--name must be the name of a folder; got {self.name!r}")
        if self.shard and self.method != "autograd":
            raise ValueError(f"--shard goes with --method autograd; got {self.method}")
        _device(self.device)


def _is_folder_name(name: str) -> bool:
    """Whether file systems take it as a name, and a line of text can show it."""
    is_one_part = name not in ("", ".", "..") and Path(name).name == name
    return is_one_part and name.isprintable() and len(name.encode()) <= _LONGEST_NAME


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # about deprecated devices
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


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The indices of the batches of one epoch, in random order."""
    yield from torch.split(torch.randperm(count, generator=generator), batch_size)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True)


class Training:
    """A network with its data and its optimiser, ready for one update after another.

    Attributes:
        updates: How many updates it has made.
        fingerprint: That of the data.
        processes: How many processes share the work.
    """

    processes = 1

    def __init__(self, config: Config, data: Data) -> None:
        self._is_deterministic = config.deterministic
        if config.deterministic:
            _be_deterministic()
        self.device = _device(config.device)
        self.fingerprint = data.fingerprint()
        self.data = data.to(self.device)
        self.sizes = (data.features, *config.hidden, data.classes)
        self.net_name = "-".join(map(str, self.sizes))
        self.cost = build_cost(config.cost)
        self.y_train = targets(self.data.label_train, data.classes, self.cost)
        self.y_test = targets(self.data.label_test, data.classes, self.cost)
        torch.manual_seed(config.seed)
        self.net = build_net(self.sizes, config.activation, config.cost).to(self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=config.learning_rate)
        self.explicit = config.method == "explicit"
        self.step: TrainingStep | None = None
        if config.method == "step":
            self.step = TrainingStep(self.net, self.cost, config.learning_rate)
        self.batch_size = min(config.batch_size, len(self.y_train))
        self._order = torch.Generator().manual_seed(config.seed)
        self._order_at_start = self._order.get_state()  # of the epoch
        self.updates = 0

    @property
    def updates_per_epoch(self) -> int:
        """The number of batches in an epoch."""
        return math.ceil(len(self.y_train) / self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that are still to come; of the next, if none are."""
        done = self.updates % self.updates_per_epoch
        if done:
            self._order.set_state(self._order_at_start)
        else:
            self._order_at_start = self._order.get_state()
        for indices in islice(batches(len(self.y_train), self.batch_size, self._order), done, None):
            there = indices.to(self.device)
            yield self.data.x_train[there], self.y_train[there]

    def update(self, x: Tensor, y: Tensor, look: Callable[[Trace], None] | None = None) -> float:
        """Take one step of gradient descent on one batch; return the cost before it.

        look is called with the Trace of the step's own pass, before the weights change.
        """
        cost = self._update(x, y, look)
        self.updates += 1
        return cost.item()

    def _update(self, x: Tensor, y: Tensor, look: Callable[[Trace], None] | None) -> Tensor:
        if self.step is not None:
            if look is not None:
                look(self.trace(x, y))
            return self.step(x, y)
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
        return cost

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """Run the algorithm on a batch, and leave the network as it is."""
        return backprop(self.net, x, y, self.cost)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Cost and accuracy over all training samples and over all test samples."""
        parts = {
            "train": (self.data.x_train, self.y_train, self.data.label_train),
            "test": (self.data.x_test, self.y_test, self.data.label_test),
        }
        found = {}
        for split, (x, y, labels) in parts.items():
            found[f"{split}_cost"], found[f"{split}_accuracy"] = self._measured(x, y, labels)
        return found

    def _measured(self, x: Tensor, y: Tensor, labels: Tensor) -> tuple[float, float]:
        output = self.net(x)
        accuracy = (output.argmax(-1) == labels).float().mean()
        return self.cost(output, y).item(), accuracy.item()

    def whole_trace(self) -> Trace:
        """The algorithm on all training samples, as the network is now."""
        return self.trace(self.data.x_train, self.y_train)

    def is_finite(self) -> bool:
        """Whether all weights and biases are finite."""
        return all(bool(p.isfinite().all()) for p in self.net.parameters())

    @contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        """Let the state change, and go back to this one, even into the middle of an epoch."""
        now, order = copy.deepcopy(self.state_dict()), self._order.get_state()
        try:
            yield
        finally:
            self.load_state_dict(now)
            self._order.set_state(order)

    def agreed(self, received: Sequence[KeyboardInterrupt]) -> KeyboardInterrupt | None:
        """The first of the signals received so far; None if there is none."""
        return received[0] if received else None

    def state_dict(self) -> dict[str, Any]:
        """All that determines the updates to come, apart from the config; refers to the weights."""
        is_within = self.updates % self.updates_per_epoch > 0
        return {
            "net": self.net.state_dict(),
            "optimizer": (self.step or self.optimizer).state_dict(),
            "updates": self.updates,
            "order": self._order_at_start if is_within else self._order.get_state(),
            "random": checkpoint.random_state(),
            "threads": torch.get_num_threads(),
            "data": self.fingerprint,
        }

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights and biases, by their names in the network; refers to them."""
        return self.net.state_dict()

    def pack(self, state: Mapping[str, Any], run: Path) -> bytes:  # noqa: ARG002
        """The bytes of a checkpoint of a state of this training, for a file in a run folder."""
        return checkpoint.pack(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the same config.

        Raises:
            ValueError: The data are not those that the state was trained on.
        """
        if state["data"] != self.fingerprint:
            raise ValueError("the data are not those that the run was trained on")
        self._load_weights(state["net"])
        (self.step or self.optimizer).load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self._order.set_state(state["order"])
        self._order_at_start = state["order"]
        checkpoint.restore_random_state(state["random"])
        if self._is_deterministic:  # sums of another number of threads are rounded differently
            torch.set_num_threads(state["threads"])

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.net.load_state_dict(weights)
