"""What per-sample results cost, in time and in memory, against a plain forward and backward."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiments.benchmark.contender import Contender, gather, is_installed
from experiments.benchmark.contenders import samples
from experiments.benchmark.measure import Conditions, measure
from experiments.benchmark.problem import problem
from experiments.benchmark.report import Table, relative

# Layer sizes, and samples in a batch; in the last one, samples and the rows of each.
NETS = [
    ((784, 30, 10), (10,)),
    ((784, 512, 512, 10), (128,)),
    ((64, 128, 64), (32, 16)),
]

Maker = Callable[[samples.Samples], list[Contender]]

# The peers by the library that they need.
PEERS: dict[str, dict[str, Maker]] = {
    "opacus": {"Opacus": samples.opacus_hooks, "Opacus, ghost": samples.opacus_ghost},
    "backpack": {"BackPACK": samples.backpack},
}


def tables(conditions: Conditions) -> Iterator[Table]:
    """A table for each network."""
    for net in NETS:
        with quiet():
            task = samples.samples(problem(*net, conditions.device, conditions.threads))
            found = contenders(task)
            measure(found, conditions, memory=True)
        title, label = f"Per-sample results of {task.problem}", task.problem.label
        yield relative(title, label, "what, contender", "ms", found)


def contenders(task: samples.Samples) -> list[Contender]:
    """Plain backward first, then everything asked for, each by all installed libraries."""
    makers: dict[str, Maker]
    makers = {"plain": samples.plain, "ours": samples.ours, "torch.func": samples.torch_func}
    for library, of_library in PEERS.items():
        makers |= of_library if is_installed(library) else {}
    found = gather(makers, task)
    asked = ["plain", *task.right, *(c.name for c in found if c.note)]
    return sorted(found, key=lambda c: asked.index(c.name if c.note else c.name.partition(", ")[0]))


def left_out(_: str) -> list[str]:
    """The libraries that are not installed, on any device."""
    return [name for name in PEERS if not is_installed(name)]


@contextmanager
def quiet() -> Iterator[None]:
    """A region without the warning that the hooks of Opacus and of BackPACK cause."""
    with warnings.catch_warnings():
        # PyTorch warns if the first layer's input needs no gradient; neither reads that gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield
