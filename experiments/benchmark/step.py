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

# Up to how many weights a network has that Adam trains too, and many of which are trained at once.
LARGEST_OF_MANY = 2**20

Maker = Callable[[Problem], list[Contender]]

# The peers by what they need; they follow any rule.
PEERS: dict[str, Callable[..., list[Contender]]] = {
    "a C++ compiler": partial(step.autograd, fused=True, compiled=True),
    "jax": step.jax_steps,
}
# Those that follow SGD only.
SGD_PEERS: dict[str, Maker] = {
    "numpy": step.numpy_step,
    "onnxruntime and onnxscript": step.onnxruntime_steps,
}


def tables(conditions: Conditions) -> Iterator[Table]:
    """Time for each network, then with Adam for all but large ones, then memory for all."""
    tasks = [problem(*net, conditions.device, conditions.threads) for net in NETS]
    small = [task for task in tasks if _is_small(task)]
    rules = [(task, step.SGD) for task in tasks] + [(task, step.ADAM) for task in small]
    for task, rule in rules:
        found = contenders(task, rule)
        measure(found, conditions)
        cells = partial(_times, found[0], found[-1])
        rows = [c.row(task.label | {"contender": c.name}, cells) for c in found]
        what = f"A step of {task}" + ("" if rule is step.SGD else f", with {rule.name}")
        yield Table(what, rows, "times ours", "contender", found)
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


def contenders(task: Problem, rule: step.Rule = step.SGD) -> list[Contender]:
    """Ours first, the bare matrix products last, and in between all peers that are available."""
    missing = left_out(task.x.device.type)
    is_sgd, can_compile = rule is step.SGD, "a C++ compiler" not in missing
    captured = partial(step.ours, rule=rule, captured=True)
    makers: dict[str, Maker] = {
        "ours": partial(step.ours, rule=rule),
        **({"ours, captured": captured} if task.x.is_cuda else {}),
        **({"ours, compiled": partial(step.ours_compiled, rule=rule)} if can_compile else {}),
        **({"ours, many networks": step.ours_ensemble} if is_sgd and _is_small(task) else {}),
        f"torch, {rule.name}": partial(step.autograd, rule=rule),
        f"torch, fused {rule.name}": partial(step.autograd, rule=rule, fused=True),
        **({"torch, whole": partial(step.autograd_whole, rule=rule)} if can_compile else {}),
        **{name: partial(p, rule=rule) for name, p in PEERS.items() if name not in missing},
        **{name: p for name, p in SGD_PEERS.items() if is_sgd and name not in missing},
        "bare products": step.bare_products,
    }
    return gather(makers, task)


def _is_small(task: Problem) -> bool:
    return sum(map(torch.numel, task.w)) <= LARGEST_OF_MANY


def memory_contenders(task: Problem) -> list[Contender]:
    """Contenders that start with nothing but their parameters."""
    found = gather({"ours": step.ours_from_scratch, "torch, SGD": step.autograd}, task)
    attempt(Contender.check, found)  # the first call of autograd allocates more
    return found


def left_out(device: str) -> list[str]:
    """What the peers need that are left out on a device."""
    return [needs for needs in PEERS | SGD_PEERS if not _is_available(needs, device)]


def _is_available(needs: str, device: str) -> bool:
    if needs == "a C++ compiler":
        return any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    return device == "cpu" and all(is_installed(name) for name in needs.split(" and "))
