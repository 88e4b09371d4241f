"""What a training step costs: a table of times for each network, and one of memory."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial

import torch

from experiments.benchmark.contender import Contender, Row, attempt, gather, is_installed
from experiments.benchmark.contenders import step
from experiments.benchmark.measure import Conditions, measure, take_peak
from experiments.benchmark.problem import NETS, Problem, problem
from experiments.benchmark.report import Table

# Up to how many weights a network has for which many are trained at once.
LARGEST_OF_MANY = 2**20

Maker = Callable[[Problem], list[Contender]]

# The peers by what they need.
PEERS: dict[str, Maker] = {
    "a C++ compiler": partial(step.autograd, fused=True, compiled=True),
    "numpy": step.numpy_step,
    "jax": step.jax_steps,
    "onnxruntime and onnxscript": step.onnxruntime_steps,
}


def tables(conditions: Conditions) -> Iterator[Table]:
    """Time for each network, then memory for all of them."""
    tasks = [problem(*net, conditions.device, conditions.threads) for net in NETS]
    for task in tasks:
        found = contenders(task)
        measure(found, conditions)
        cells = partial(_times, found[0], found[-1])
        rows = [c.row(task.label | {"contender": c.name}, cells) for c in found]
        yield Table(f"A step of {task}", rows, "times ours", "contender", found)
    yield _memory(tasks, conditions.device)


def _times(ours: Contender, products: Contender, contender: Contender) -> Row:
    ratio, quartiles = contender.ratio(ours)
    return {
        "µs": f"{contender.micros:.1f}",
        "times ours": ratio,
        "quartiles": quartiles,
        "times the products": contender.ratio(products)[0],
    }


def _memory(tasks: list[Problem], device: str) -> Table:
    """What a first step holds beyond parameters and data, and what it cannot do without."""
    rows: list[Row] = []
    everyone: list[Contender] = []
    for task in tasks:
        found = memory_contenders(task)
        attempt(partial(take_peak, device), found)
        everyone += found
        cells = partial(_sizes, task)
        rows += [c.row({"net, contender": f"{task}: {c.name}"}, cells) for c in found]
    return Table("Memory of a step", rows, "peak, MB", "net, contender", everyone)


def _sizes(task: Problem, contender: Contender) -> Row:
    sizes = {
        "peak, MB": contender.peak,
        "activations alone, MB": 4 * len(task.x) * sum(map(len, task.w)),
        "parameters, MB": 4 * sum(p.numel() for p in task.net.parameters()),
    }
    return {column: f"{size / 1e6:.3f}" for column, size in sizes.items()}


def contenders(task: Problem) -> list[Contender]:
    """Ours first, the bare matrix products last, and in between all peers that are available."""
    captured = {"ours, captured": partial(step.ours, captured=True)} if task.x.is_cuda else {}
    can_compile = "a C++ compiler" not in left_out(task.x.device.type)
    compiled = {"ours, compiled": step.ours_compiled} if can_compile else {}
    whole = {"torch, compiled whole": step.autograd_whole} if can_compile else {}
    is_small = sum(map(torch.numel, task.w)) <= LARGEST_OF_MANY
    makers: dict[str, Maker] = {
        "ours": step.ours,
        **captured,
        **compiled,
        **({"ours, many networks": step.ours_ensemble} if is_small else {}),
        "torch, SGD": step.autograd,
        "torch, fused SGD": partial(step.autograd, fused=True),
        **whole,
        **{name: peer for name, peer in PEERS.items() if name not in left_out(task.x.device.type)},
        "bare products": step.bare_products,
    }
    return gather(makers, task)


def memory_contenders(task: Problem) -> list[Contender]:
    """Contenders that start with nothing but their parameters."""
    found = gather({"ours": step.ours_from_scratch, "torch, SGD": step.autograd}, task)
    attempt(Contender.check, found)  # the first call of autograd allocates more
    return found


def left_out(device: str) -> list[str]:
    """What the peers need that are left out on a device."""
    return [needs for needs in PEERS if not _is_available(needs, device)]


def _is_available(needs: str, device: str) -> bool:
    if needs == "a C++ compiler":
        return any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    return device == "cpu" and all(is_installed(name) for name in needs.split(" and "))
