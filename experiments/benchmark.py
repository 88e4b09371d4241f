"""What gradients by hand cost beside PyTorch's own, as ratios taken in one run.

    python -m experiments.benchmark layers
    python -m experiments.benchmark per-sample

Contenders take turns, round by round, and each round gives a ratio: so a machine that is now fast,
now slow, is so for all of them. Results are checked equal before anything is timed.
"""

import copy
import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer, set_torch_threads
from torch.utils.benchmark import timer as clock

import manual_bp
from experiments import per_sample
from experiments.command_line import parse, run

PROGRAM = "python -m experiments.benchmark"

# Sizes of a network, from the input on, and samples in a batch.
NETS = [((784, 30, 10), 10), ((784, 512, 512, 10), 128), ((2048,) * 5, 512)]

# The same for per-sample results; the last is of samples of several rows.
PER_SAMPLE_NETS = [
    ((784, 30, 10), (10,)),
    ((784, 512, 512, 10), (128,)),
    ((64, 128, 64), (32, 16)),
]

Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Config:
    """Compare speed and memory with PyTorch's."""

    question: Annotated[Literal["layers", "per-sample"], tyro.conf.Positional]
    """layers: what a call of each layer costs, and a step of training of whole networks.
    per-sample: what every sample's gradient, its norm, or clipping by it costs, beside torch.func,
    Opacus and BackPACK."""
    rounds: int = 50
    """How many ratios are taken of each; the median is shown, and the quartiles."""
    threads: int = 1
    """Threads that PyTorch may use on the CPU."""
    device: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if self.device != "cpu" and not (self.device == "cuda" and torch.cuda.is_available()):
            raise ValueError(f"--device must be cpu, or cuda where there is one; got {self.device}")


def seconds(contenders: Contenders, rounds: int, threads: int) -> dict[str, list[float]]:
    """How long a call takes, of each contender, round by round.

    A turn is as many calls as fit into 20 ms, warmed up; but one call, as it comes, of a contender
    that takes long.
    """
    timers = {name: timeit.Timer(call, timer=clock) for name, call in contenders.items()}
    speeds = {name: _speed(call, threads) for name, call in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in timers}
    with set_torch_threads(threads):
        for _ in range(rounds):
            for name, timer in timers.items():
                number = max(1, int(0.02 / speeds[name]))
                timer.timeit(min(2, int(0.1 / speeds[name])))
                taken[name].append(timer.timeit(number) / number)
    return taken


def _speed(call: Callable[[], Any], threads: int) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=0.02).median


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at any one time, beyond what was there before."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for change in changes:
        held += change.nbytes()
        most = max(most, held)
    return most


def calls(device: str) -> dict[str, Contenders]:
    """Each layer's forward beside PyTorch's, so small that what counts is the call itself."""
    options: Any = {"device": device}
    a = torch.randn(10, 30, **options)
    w = torch.randn(10, 30, requires_grad=True, **options)
    b = torch.randn(10, requires_grad=True, **options)
    z = torch.randn(10, 10, requires_grad=True, **options)
    theirs = nn.Linear(30, 10, **options)
    ours = copy.deepcopy(theirs)
    manual_bp.convert(ours)
    return {
        "linear": {"torch": lambda: F.linear(a, w, b), "ours": lambda: manual_bp.linear(a, w, b)},
        "Linear": {"torch": lambda: theirs(a), "ours": lambda: ours(a)},
        "linear_sigmoid": {
            "torch": lambda: torch.sigmoid(F.linear(a, w, b)),
            "ours": lambda: manual_bp.linear_sigmoid(a, w, b),
        },
        "sigmoid": {"torch": lambda: torch.sigmoid(z), "ours": lambda: manual_bp.sigmoid(z)},
        "tanh": {"torch": lambda: torch.tanh(z), "ours": lambda: manual_bp.tanh(z)},
        "relu": {"torch": lambda: F.relu(z), "ours": lambda: manual_bp.relu(z)},
        "leaky_relu": {
            "torch": lambda: F.leaky_relu(z),
            "ours": lambda: manual_bp.leaky_relu(z),
        },
        "softplus": {"torch": lambda: F.softplus(z), "ours": lambda: manual_bp.softplus(z)},
    }


def networks(sizes: Sequence[int], device: str) -> dict[str, nn.Sequential]:
    """PyTorch's network; ours, of two layers to its two; and ours with the two in one."""
    pairs = [(nn.Linear(*size), nn.Sigmoid()) for size in pairwise(sizes)]
    theirs = nn.Sequential(*[module for pair in pairs for module in pair]).to(device)
    ours, fused = copy.deepcopy(theirs), copy.deepcopy(theirs)
    manual_bp.convert(ours)
    manual_bp.convert(fused, fuse=True)
    joined = nn.Sequential(*[m for m in fused if not isinstance(m, nn.Identity)])
    return {"torch": theirs, "Linear, Sigmoid": ours, "LinearSigmoid": joined}


def steps(sizes: Sequence[int], batch: int, device: str) -> Contenders:
    """Forward and backward through each network, under one and the same cost of PyTorch's."""
    nets = networks(sizes, device)
    x = torch.randn(batch, sizes[0], device=device)
    y = torch.rand(batch, sizes[-1], device=device)

    def step(net: nn.Sequential) -> None:
        net.zero_grad()
        cost: Any = F.mse_loss(net(x), y)
        cost.backward()

    for net in nets.values():
        step(net)
        for found, right in zip(net.parameters(), nets["torch"].parameters(), strict=True):
            torch.testing.assert_close(found.grad, right.grad)
    return {name: partial(step, net) for name, net in nets.items()}


def compare_calls(config: Config) -> str:
    """A table of what a call of each layer takes beyond PyTorch's, forward alone."""
    table = []
    for name, contenders in calls(config.device).items():
        results = [call() for call in contenders.values()]
        torch.testing.assert_close(*results)
        taken = seconds(contenders, config.rounds, config.threads)
        pairs = zip(taken["torch"], taken["ours"], strict=True)
        lower, more, upper = quartiles([1e6 * (ours - torch) for torch, ours in pairs])
        row = {
            "forward, 10 samples, 30 to 10": name,
            "torch, µs": f"{1e6 * statistics.median(taken['torch']):.2f}",
            "ours, µs": f"{1e6 * statistics.median(taken['ours']):.2f}",
            "more, µs": f"{more:.2f}",
            "quartiles": f"{lower:.2f} to {upper:.2f}",
        }
        table.append(row)
    return tabulate(table, "keys", tablefmt="github", disable_numparse=True)


def compare_steps(config: Config) -> str:
    """A table of what forward and backward take, in time and in memory, against PyTorch's."""
    table = []
    for sizes, batch in NETS:
        contenders = steps(sizes, batch, config.device)
        taken = seconds(contenders, config.rounds, config.threads)
        peaks = {name: peak_bytes(call, config.device) for name, call in contenders.items()}
        for name in contenders:
            row = {
                "net": "-".join(map(str, sizes)),
                "batch": str(batch),
                "layers": name,
                "µs": f"{1e6 * statistics.median(taken[name]):.1f}",
                **_ratios(name, "torch", taken, peaks),
            }
            table.append(row)
    return tabulate(table, "keys", tablefmt="github", disable_numparse=True)


def _ratios(
    name: str, base: str, taken: dict[str, list[float]], peaks: dict[str, int]
) -> dict[str, str]:
    pairs = zip(taken[name], taken[base], strict=True)
    lower, ratio, upper = quartiles([one / other for one, other in pairs])
    return {
        "time": f"{ratio:.3f}",
        "quartiles": f"{lower:.3f} to {upper:.3f}",
        "peak, MB": f"{peaks[name] / 1e6:.2f}",
        "memory": f"{peaks[name] / peaks[base]:.3f}",
    }


def compare_per_sample(config: Config, sizes: Sequence[int], batch: Sequence[int]) -> str:
    """A table of what per-sample results take, in time and in memory, against plain backward."""
    with per_sample.quiet():
        task = per_sample.problem(sizes, batch, config.device)
        contenders = per_sample.contenders(task)
        per_sample.require_same(task, contenders)
        calls = {f"{c.what}, {c.name}": c.call for c in contenders}
        taken = seconds(calls, config.rounds, config.threads)
        peaks = {name: peak_bytes(call, config.device) for name, call in calls.items()}
    plain, *_ = calls
    table = []
    for contender, name in zip(contenders, calls, strict=True):
        row = {
            "net": "-".join(map(str, sizes)),
            "batch": "×".join(map(str, batch)),
            "what": contender.what,
            "contender": contender.name,
            "ms": f"{1e3 * statistics.median(taken[name]):.3f}",
            **_ratios(name, plain, taken, peaks),
        }
        table.append(row)
    return tabulate(table, "keys", tablefmt="github", disable_numparse=True)


def _show_layers(config: Config) -> None:
    print(compare_calls(config), "\n", sep="", flush=True)
    print(compare_steps(config), flush=True)


def _show_per_sample(config: Config) -> None:
    if per_sample.left_out():
        print(f"left out, not installed: {', '.join(per_sample.left_out())}\n")
    tables = (compare_per_sample(config, *net) for net in PER_SAMPLE_NETS)
    for number, table in enumerate(tables):
        print("\n" * bool(number) + table, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    config = parse(Config, arguments, PROGRAM)
    torch.manual_seed(0)
    torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {config.device}, threads: {config.threads}\n")
    _SHOW[config.question](config)
    return 0


_SHOW = {"layers": _show_layers, "per-sample": _show_per_sample}


if __name__ == "__main__":
    run(main)
