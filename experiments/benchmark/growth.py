"""How the cost of a training step grows, with the number of layers and with that of samples."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from math import nan

import numpy as np

from experiments.benchmark.contender import Contender, Row, gather
from experiments.benchmark.contenders.step import autograd, bare_products, ours
from experiments.benchmark.measure import Conditions, measure
from experiments.benchmark.problem import Problem, problem
from experiments.benchmark.report import Table

# Layers of one width, and samples for one network.
DEPTHS = (1, 2, 4, 8, 16, 32)
DEPTH_WIDTH, DEPTH_BATCH = 256, 128
BATCHES = (32, 64, 128, 256, 512, 1024)
BATCH_SIZES = (784, 512, 512, 10)

Net = tuple[tuple[int, ...], int]

MAKERS: dict[str, Callable[[Problem], list[Contender]]] = {
    "ours": ours,
    "torch, SGD": autograd,
    "bare products": bare_products,
}


def tables(conditions: Conditions) -> Iterator[Table]:
    """Over the number of layers, then over that of samples."""
    depths = {depth: ((DEPTH_WIDTH,) * (depth + 1), DEPTH_BATCH) for depth in DEPTHS}
    title = f"Layers of {DEPTH_WIDTH} neurons, batch {DEPTH_BATCH}"
    yield _table(title, "layers", depths, conditions)
    batches = {batch: (BATCH_SIZES, batch) for batch in BATCHES}
    title = f"Samples, {'-'.join(map(str, BATCH_SIZES))}"
    yield _table(title, "samples", batches, conditions)


def _table(title: str, over: str, nets: Mapping[int, Net], conditions: Conditions) -> Table:
    found = [
        gather(MAKERS, problem(*net, conditions.device, conditions.threads))
        for net in nets.values()
    ]
    everyone = list(chain(*found))
    measure(everyone, conditions)
    rows: list[Row] = []
    for of_one in zip(*found, strict=True):
        rows += _rows(over, dict(zip(nets, of_one, strict=True)))
    return Table(title, rows, "µs", "contender", everyone, over)


def _rows(over: str, contenders: Mapping[int, Contender]) -> list[Row]:
    """The rows of one contender over all sizes, with a straight line fitted to them."""
    micros = {size: c.micros for size, c in contenders.items() if not c.note}
    x, y = list(micros), list(micros.values())
    slope, start = np.polyfit(x, y, 1) if len(micros) > 1 else (nan, nan)

    def cells(size: int, contender: Contender) -> Row:
        return {
            "µs": f"{contender.micros:.1f}",
            f"µs per {over.removesuffix('s')}": f"{contender.micros / size:.2f}",
            "linear fit, µs": f"{start + slope * size:.1f}",
        }

    return [
        c.row({"contender": c.name, over: str(size)}, partial(cells, size))
        for size, c in contenders.items()
    ]
