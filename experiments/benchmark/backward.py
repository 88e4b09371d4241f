"""How a backward pass compares with a forward pass: operations counted, and both timed."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark.contender import Contender, Row, gather, notes_of
from experiments.benchmark.contenders.step import cost, products
from experiments.benchmark.measure import Conditions, measure
from experiments.benchmark.problem import Problem, problem
from experiments.benchmark.report import Table

# Networks with layers of one width.
WIDTHS = (32, 128, 512, 2048)
LAYERS, BATCH = 3, 128


def tables(conditions: Conditions) -> Iterator[Table]:
    """One table, with a row for each width."""
    rows: list[Row] = []
    everyone: list[Contender] = []
    for width in WIDTHS:
        task = problem((width,) * (LAYERS + 1), BATCH, conditions.device, conditions.threads)
        found = gather({"products": bare_passes, "autograd": autograd_passes}, task)
        measure(found, conditions)
        rows.append({"width": str(width)} | _cells(found))
        everyone += found
    title = f"Backward over forward, {LAYERS} layers, batch {BATCH}"
    yield Table(title, rows, "products, timed", "width", everyone)


def _cells(contenders: Sequence[Contender]) -> Row:
    """The ratios of those that did not drop out, and why others did."""
    row: Row = {}
    pairs = {
        what: [c for c in contenders if c.name.startswith(what) and not c.note]
        for what in ("products", "autograd")
    }
    if len(pairs["autograd"]) == 2:
        forward, backward = map(operations, pairs["autograd"])
        row["operations, forward"] = f"{forward:.3g}"
        row["backward"] = f"{backward:.3g}"
        row["times forward"] = f"{backward / forward:.3f}"
    for what, pair in pairs.items():
        if len(pair) == 2:
            row[f"{what}, timed"], _ = pair[1].ratio(pair[0])
    return row | notes_of(contenders)


def operations(contender: Contender) -> int:
    """How many operations its matrix products take."""
    counter: Any = FlopCounterMode(display=False)
    with counter:
        contender.call()
    return int(counter.get_total_flops())


def bare_passes(task: Problem) -> list[Contender]:
    """The matrix products of forward, and those of backward."""
    forward, backward = products(task)
    return [Contender("products, forward", forward), Contender("products, backward", backward)]


def autograd_passes(task: Problem) -> list[Contender]:
    """Forward and backward through autograd; the input gets no gradient."""
    net = copy.deepcopy(task.net)
    parameters = list(net.parameters())
    forward = partial(cost, net, task.x, task.y)
    backward = partial(torch.autograd.grad, forward(), parameters, retain_graph=True)
    return [Contender("autograd, forward", forward), Contender("autograd, backward", backward)]
