"""What gradients by hand cost beside what others do, as ratios taken in one run.

    python -m experiments.benchmark step
    python -m experiments.benchmark growth
    python -m experiments.benchmark backward
    python -m experiments.benchmark layers
    python -m experiments.benchmark per-sample

Contenders take turns, round by round, and each round gives a ratio: so a machine that is now fast,
now slow, is so for all of them. Results are checked equal before anything is timed.
"""

if __name__ == "__main__":  # first, so that it may be interrupted while all else is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.benchmark").main())

import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import manual_bp
from experiments import per_sample, steps
from experiments.command_line import parse, require_counts
from experiments.contending import sigmoid_network
from experiments.measuring import Timed, limited_to, peak_bytes, quartiles, ratios, seconds
from experiments.report import Row, Table, heading, save
from experiments.run_folder import can_be_made

PROGRAM = "python -m experiments.benchmark"

# Sizes of a network, from the input on, and samples in a batch.
NETS = [((784, 30, 10), 10), ((784, 512, 512, 10), 128), ((2048,) * 5, 512)]

# The same for per-sample results; the last is of samples of several rows.
PER_SAMPLE_NETS = [
    ((784, 30, 10), (10,)),
    ((784, 512, 512, 10), (128,)),
    ((64, 128, 64), (32, 16)),
]

# How the cost grows: with layers of one width, and with samples.
DEPTHS = (1, 2, 4, 8, 16, 32)
DEPTH_WIDTH, DEPTH_BATCH = 256, 128
BATCHES = (32, 64, 128, 256, 512, 1024)
BATCH_SIZES = (784, 512, 512, 10)

# Networks of three layers of one width each, for backward against forward.
WIDTHS = (32, 128, 512, 2048)
BACKWARD_LAYERS, BACKWARD_BATCH = 3, 128


@dataclass(frozen=True)
class Config:
    """Compare speed and memory with what others do."""

    question: Annotated[
        Literal["step", "growth", "backward", "layers", "per-sample"], tyro.conf.Positional
    ] = "step"
    """step: a step of training of whole networks, beside PyTorch, NumPy, JAX, onnxruntime and the
    bare matrix products in it. growth: how it grows with depth and with samples. backward: how a
    backward pass compares to a forward pass. layers: what a call of each layer costs, and forward
    and backward of whole networks through autograd. per-sample: what every sample's gradient, its
    norm, or clipping by it costs, beside torch.func, Opacus and BackPACK."""
    rounds: int = 50
    """How many ratios are taken of each, at most; the median is shown, and the quartiles."""
    budget: float = 60.0
    """Seconds after which contenders that take turns start no further round. Each table says how
    many rounds it is of."""
    threads: int = 1
    """Cores that may be used on the CPU, by every contender."""
    device: str = "cpu"
    """cpu or cuda."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How exact float32 products must be, for all contenders that can choose."""
    folder: Path = Path("runs/benchmark")
    """Where <question>.md, .csv and .png go; what is there of these names is replaced."""

    def __post_init__(self) -> None:
        require_counts(self, "rounds", "threads")
        if not self.budget >= 0:
            raise ValueError(f"--budget must be at least 0; got {self.budget}")
        if self.device != "cpu" and not (self.device == "cuda" and torch.cuda.is_available()):
            raise ValueError(f"--device must be cpu, or cuda where there is one; got {self.device}")
        if not can_be_made(self.folder):
            raise ValueError(f"--folder must be a place to write to; got {str(self.folder)!r}")


def compare_training_steps(config: Config) -> Iterator[Table]:
    """What a step of training takes; a table for each network."""
    for sizes, batch in NETS:
        task = steps.problem(sizes, batch, config.device, config.threads)
        contenders = steps.contenders(task)
        steps.require_same(task, contenders)
        taken = _taken({n: c.timed for n, c in contenders.items()}, config)
        rows: list[Row] = []
        for name, times in taken.items():
            lower, ratio, upper = ratios(times, taken["ours"])
            rows.append(
                {
                    "net": _name(sizes),
                    "batch": str(batch),
                    "contender": name,
                    "µs": f"{1e6 * statistics.median(times):.1f}",
                    "times ours": f"{ratio:.3f}",
                    "quartiles": f"{lower:.3f} to {upper:.3f}",
                    "times the products": _ratio(taken, name, "bare products"),
                }
            )
        title = f"A step of {_name(sizes)}, batch {batch}"
        yield Table(title, rows, "times ours", "contender", rounds=_rounds(taken))
    yield compare_memory(config)


def _taken(contenders: Mapping[str, Timed], config: Config) -> dict[str, list[float]]:
    return seconds(contenders, config.rounds, config.device, config.budget)


def _rounds(taken: Mapping[str, Sequence[float]]) -> int:
    return min(map(len, taken.values()))


def compare_memory(config: Config) -> Table:
    """What a first step holds beyond parameters and data, and what it cannot do without."""
    rows: list[Row] = []
    for sizes, batch in NETS:
        task = steps.problem(sizes, batch, config.device, config.threads)
        weights = 4 * sum(w.numel() + len(w) for w in task.w)
        activations = 4 * batch * sum(sizes[1:])
        for name, contender in steps.memory_contenders(task).items():
            peak = peak_bytes(contender, config.device)
            rows.append(
                {
                    "net, contender": f"{_name(sizes)}, batch {batch}: {name}",
                    "peak, MB": f"{peak / 1e6:.3f}",
                    "activations alone, MB": f"{activations / 1e6:.3f}",
                    "parameters, MB": f"{weights / 1e6:.3f}",
                }
            )
    return Table("Memory of a step", rows, "peak, MB", "net, contender")


def compare_growth(config: Config) -> Iterator[Table]:
    """How a step grows with the number of layers, and with the number of samples."""
    depths = {depth: ((DEPTH_WIDTH,) * (depth + 1), DEPTH_BATCH) for depth in DEPTHS}
    title = f"Layers of {DEPTH_WIDTH} neurons, batch {DEPTH_BATCH}"
    yield _growth(config, title, "layers", depths)
    samples = {batch: (BATCH_SIZES, batch) for batch in BATCHES}
    yield _growth(config, f"Samples, {_name(BATCH_SIZES)}", "samples", samples)


def _growth(
    config: Config, title: str, over: str, nets: Mapping[int, tuple[Sequence[int], int]]
) -> Table:
    contenders: dict[str, Timed] = {}
    for size, (sizes, batch) in nets.items():
        task = steps.problem(sizes, batch, config.device, config.threads)
        found = steps.torch_contenders(task)
        steps.require_same(task, found)
        contenders |= {f"{name}|{size}": c.timed for name, c in found.items()}
    taken = _taken(contenders, config)
    rows: list[Row] = []
    for name in dict.fromkeys(key.partition("|")[0] for key in taken):
        micros = [1e6 * statistics.median(taken[f"{name}|{size}"]) for size in nets]
        slope, start = np.polyfit(list(nets), micros, 1)
        for size, found_micros in zip(nets, micros, strict=True):
            rows.append(
                {
                    "contender": name,
                    over: str(size),
                    "µs": f"{found_micros:.1f}",
                    f"µs for each of the {over}": f"{found_micros / size:.2f}",
                    "straight line, µs": f"{start + slope * size:.1f}",
                }
            )
    return Table(title, rows, "µs", "contender", over, _rounds(taken))


def compare_backward(config: Config) -> Iterator[Table]:
    """Backward against forward: operations counted, bare products timed, autograd timed."""
    rows: list[Row] = []
    fewest = config.rounds
    for width in WIDTHS:
        sizes = (width,) * (BACKWARD_LAYERS + 1)
        task = steps.problem(sizes, BACKWARD_BATCH, config.device, config.threads)
        passes = steps.passes(task)
        forward, backward = (_operations(call) for call in passes.counted)
        taken = _taken(passes.timed, config)
        fewest = min(fewest, _rounds(taken))
        rows.append(
            {
                "width": str(width),
                "operations, forward": f"{forward:.3g}",
                "backward": f"{backward:.3g}",
                "times forward": f"{backward / forward:.3f}",
                "products, timed": _ratio(taken, "products, backward", "products, forward"),
                "autograd, timed": _ratio(taken, "autograd, backward", "autograd, forward"),
            }
        )
    title = f"Backward over forward, {BACKWARD_LAYERS} layers, batch {BACKWARD_BATCH}"
    yield Table(title, rows, "products, timed", "width", rounds=fewest)


def _operations(call: Callable[[], object]) -> int:
    counter: Any = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


def _ratio(taken: dict[str, list[float]], one: str, other: str) -> str:
    return f"{ratios(taken[one], taken[other])[1]:.3f}"


def calls(device: str) -> dict[str, dict[str, Callable[[], Any]]]:
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
    theirs = sigmoid_network(sizes, device)
    ours, fused = copy.deepcopy(theirs), copy.deepcopy(theirs)
    manual_bp.convert(ours)
    manual_bp.convert(fused, fuse=True)
    joined = nn.Sequential(*[m for m in fused if not isinstance(m, nn.Identity)])
    return {"torch": theirs, "Linear, Sigmoid": ours, "LinearSigmoid": joined}


def forward_and_backward(
    sizes: Sequence[int], batch: int, device: str
) -> dict[str, Callable[[], Any]]:
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


def compare_calls(config: Config) -> Table:
    """What a call of each layer takes beyond PyTorch's, forward alone."""
    rows: list[Row] = []
    fewest = config.rounds
    for name, contenders in calls(config.device).items():
        results = [call() for call in contenders.values()]
        torch.testing.assert_close(*results)
        timed = {who: Timed(call) for who, call in contenders.items()}
        taken = _taken(timed, config)
        fewest = min(fewest, _rounds(taken))
        pairs = zip(taken["torch"], taken["ours"], strict=True)
        lower, more, upper = quartiles([1e6 * (ours - torch) for torch, ours in pairs])
        row = {
            "forward, 10 samples, 30 to 10": name,
            "torch, µs": f"{1e6 * statistics.median(taken['torch']):.2f}",
            "ours, µs": f"{1e6 * statistics.median(taken['ours']):.2f}",
            "more, µs": f"{more:.2f}",
            "quartiles": f"{lower:.2f} to {upper:.2f}",
        }
        rows.append(row)
    title = "What a call of a layer takes beyond PyTorch's"
    return Table(title, rows, "more, µs", "forward, 10 samples, 30 to 10", rounds=fewest)


def compare_layers(config: Config) -> Iterator[Table]:
    """What a call of each layer takes; then forward and backward of networks, time and memory."""
    yield compare_calls(config)
    for sizes, batch in NETS:
        contenders = forward_and_backward(sizes, batch, config.device)
        timed = {name: Timed(call) for name, call in contenders.items()}
        taken = _taken(timed, config)
        peaks = {name: peak_bytes(call, config.device) for name, call in contenders.items()}
        rows: list[Row] = [
            {
                "net": _name(sizes),
                "batch": str(batch),
                "layers": name,
                "µs": f"{1e6 * statistics.median(taken[name]):.1f}",
                **_ratios(name, "torch", taken, peaks),
            }
            for name in contenders
        ]
        title = f"Forward and backward of {_name(sizes)}, batch {batch}"
        yield Table(title, rows, "time", "layers", rounds=_rounds(taken))


def _name(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def _ratios(name: str, base: str, taken: dict[str, list[float]], peaks: dict[str, int]) -> Row:
    lower, ratio, upper = ratios(taken[name], taken[base])
    return {
        "time": f"{ratio:.3f}",
        "quartiles": f"{lower:.3f} to {upper:.3f}",
        "peak, MB": f"{peaks[name] / 1e6:.2f}",
        "memory": f"{peaks[name] / peaks[base]:.3f}",
    }


def compare_per_sample(config: Config) -> Iterator[Table]:
    """What per-sample results take, in time and in memory, against plain backward."""
    for sizes, batch in PER_SAMPLE_NETS:
        with per_sample.quiet():
            task = per_sample.problem(sizes, batch, config.device)
            contenders = per_sample.contenders(task)
            per_sample.require_same(task, contenders)
            calls = {f"{c.what}, {c.name}": c.call for c in contenders}
            timed = {name: Timed(call) for name, call in calls.items()}
            taken = _taken(timed, config)
            peaks = {name: peak_bytes(call, config.device) for name, call in calls.items()}
        plain, *_ = calls
        samples = "×".join(map(str, batch))
        rows: list[Row] = [
            {
                "net": _name(sizes),
                "batch": samples,
                "what, contender": name,
                "ms": f"{1e3 * statistics.median(taken[name]):.3f}",
                **_ratios(name, plain, taken, peaks),
            }
            for name in calls
        ]
        title = f"Per-sample results of {_name(sizes)}, batch {samples}"
        yield Table(title, rows, "time", "what, contender", rounds=_rounds(taken))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    config = parse(Config, arguments, PROGRAM)
    question = _QUESTIONS[config.question]
    words = sys.argv[1:] if arguments is None else arguments
    lines = [
        *heading([*PROGRAM.split(), *words], config.device),
        f"threads: {config.threads}; products of float32: {config.matmul_precision}",
    ]
    missing = _MISSING[config.question](config.device) if config.question in _MISSING else []
    if missing:
        lines.append(f"left out, for it is not there: {', '.join(missing)}")
    print("\n".join(lines), flush=True)
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(config.matmul_precision)
    tables = []
    try:
        with limited_to(config.threads):
            for table in question(config):
                print(f"\n{table.caption}\n\n{table}", flush=True)
                tables.append(table)
    finally:
        torch.set_float32_matmul_precision(precision)
    paths = save(config.folder, config.question, lines, tables)
    print(f"\nwritten: {', '.join(map(str, paths))}")
    return 0


_QUESTIONS: dict[str, Callable[[Config], Iterator[Table]]] = {
    "step": compare_training_steps,
    "growth": compare_growth,
    "backward": compare_backward,
    "layers": compare_layers,
    "per-sample": compare_per_sample,
}

_MISSING: dict[str, Callable[[str], list[str]]] = {
    "step": steps.left_out,
    "per-sample": lambda _: per_sample.left_out(),
}
