"""A program that runs scenarios, each in several processes that the agent of torchrun starts.

    python -m tests.experiments.run_ranks < SCENARIOS

SCENARIOS is a list in JSON, see `Scenario`. What the processes say goes to a folder of the name of
the scenario, and the exit code of the first that fails to a file "code" in it. The processes are
forks of one that has imported PyTorch.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

PRELOADED = ["experiments.train", "experiments.shared_training", "torch._dynamo", __name__]


@dataclass(frozen=True)
class Scenario:
    """What the processes do.

    name: Names it.
    arguments: Those of experiments.train; if there are none, `observe` is called instead.
    processes: How many of them.
    restarts: How often the agent starts them again if one fails.
    event: What happens at an update in one of them: a signal, or "full disk".
    rank, update: In which process, and before which update, counted from 1; in the first attempt.
    copy: A folder to copy first, and its new name.
    damage: A file in which a bit is flipped first.
    draws: Whether the run ends with its pictures, which take longer than the rest.
    """

    name: str
    arguments: tuple[str, ...] = ()
    processes: int = 2
    restarts: int = 0
    event: str = ""
    rank: int = 1
    update: int = 1
    copy: tuple[str, str] | None = None
    damage: str | None = None
    draws: bool = False


# The last of five batches has one sample, so that the second process has none.
OBSERVED: dict[str, dict[str, Any]] = {
    "autograd": {"cost": "softmax-cross-entropy", "learning_rate": 1.0},
    "explicit": {"method": "explicit", "cost": "sigmoid-cross-entropy", "learning_rate": 1.0},
    "step": {"method": "step"},
    "sharded": {"shard": True},
}
COMMON: dict[str, Any] = {"hidden": (8,), "batch_size": 359, "device": "cpu"}


def observe(make: Any) -> dict[str, Any]:
    """What trainings compute in two epochs, with the settings above; in plain values and tensors.

    make: Makes the training, from the config and the data.
    """
    from experiments.data import load
    from experiments.training import Config
    from manual_bp import Trace

    def look(trace: Trace) -> None:
        diagnostics = [asdict(layer) for layer in trace.diagnostics(1.0)]
        of_layers = [(layer.z, layer.delta, layer.grad_w, layer.grad_b) for layer in trace]
        looks.append((trace.cost, trace.per_sample_norms(), of_layers, diagnostics))

    found = {}
    for name, options in OBSERVED.items():
        training = make(Config(**COMMON | options), load("digits"))
        looks: list[Any] = []
        costs: list[float] = []
        while training.updates < 10:
            for x, y in training.epoch():
                costs.append(training.update(x, y, look if training.updates > 2 else None))
        weights = {key: w.detach().clone() for key, w in training.whole_weights().items()}
        found[name] = {"costs": costs, "looks": looks, "weights": weights}
        found[name]["metrics"] = training.metrics()
    return found


def _observe_shared() -> int:
    import torch

    from experiments.distributed import Processes
    from experiments.shared_training import SharedTraining

    with Processes() as processes:
        found = observe(lambda config, data: SharedTraining(config, data, processes))
        torch.save(found, f"rank{processes.rank}.pt")
    return 0


def work(scenario: Scenario) -> None:
    """What one process does."""
    from experiments.command_line import run
    from experiments.train import main

    if not scenario.arguments:
        run(_observe_shared)
    if not scenario.draws:
        without_pictures(pytest.MonkeyPatch())
    is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if scenario.event and is_first_attempt and os.environ["RANK"] == str(scenario.rank):
        _let_happen(scenario)
    run(lambda: main(scenario.arguments))


def _let_happen(scenario: Scenario) -> None:
    from experiments.shared_training import SharedTraining

    update = SharedTraining._update

    def patched(training: SharedTraining, *arguments: Any) -> Any:
        if training.updates + 1 == scenario.update:
            if scenario.event == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            else:
                for _ in range(2):  # as from the system, and from torchrun
                    os.kill(os.getpid(), signal.Signals[scenario.event])
        return update(training, *arguments)

    SharedTraining._update = patched  # type: ignore[method-assign, assignment]


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without pictures, where these are not the point."""
    from experiments import session, train

    patch.setattr(session, "draw", lambda *_: None)
    patch.setattr(train, "write_report", lambda folder, *_: folder / "report.html")


def flip_a_bit(path: Path) -> None:
    """Flip one in the last number of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def launch(scenario: Scenario, folder: Path) -> None:
    """Run one scenario, and note how it ended."""
    folder.mkdir()
    if scenario.copy is not None:
        shutil.copytree(*scenario.copy)
    if scenario.damage is not None:
        flip_a_bit(Path(scenario.damage))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=scenario.processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=scenario.restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
    )
    code = 0
    try:
        elastic_launch(config, work)(scenario)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    (folder / "code").write_text(str(code))


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(PRELOADED)
    from tests.experiments import run_ranks  # so that what is pickled is known to the processes

    for given in json.load(sys.stdin):
        scenario = run_ranks.Scenario(**given)
        run_ranks.launch(scenario, Path(scenario.name))
