"""What our layers cost, compared with PyTorch's: calls, then forward and backward of networks."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manual_bp
from experiments.benchmark.contender import Contender, Result, Row, allowance, notes_of, spread
from experiments.benchmark.measure import Conditions, measure
from experiments.benchmark.problem import NETS, Problem, problem
from experiments.benchmark.report import Table, relative
from manual_bp.layers._activation import ACTIVATIONS

Call = Callable[[], Any]


def tables(conditions: Conditions) -> Iterator[Table]:
    """A table of calls of each layer, forward only; then time and memory of each network."""
    yield _calls(conditions)
    for net in NETS:
        task = problem(*net, conditions.device, conditions.threads)
        found = forward_and_backward(task)
        measure(found, conditions, memory=True)
        yield relative(f"Forward and backward of {task}", task.label, "layers", "µs", found)


def calls(device: str) -> dict[str, tuple[Call, Call]]:
    """Forward of PyTorch's layers and of ours, on tensors so small that the call itself counts."""
    options: Any = {"device": device}
    a = torch.randn(10, 30, **options)
    w = torch.randn(10, 30, requires_grad=True, **options)
    b = torch.randn(10, requires_grad=True, **options)
    z = torch.randn(10, 10, requires_grad=True, **options)
    theirs = nn.Linear(30, 10, **options)
    ours = copy.deepcopy(theirs)
    manual_bp.convert(ours)
    found: dict[str, tuple[Call, Call]] = {
        "linear": (partial(F.linear, a, w, b), partial(manual_bp.linear, a, w, b)),
        "Linear": (partial(theirs, a), partial(ours, a)),
        "linear_sigmoid": (
            lambda: torch.sigmoid(F.linear(a, w, b)),
            lambda: manual_bp.linear_sigmoid(a, w, b),
        ),
    }
    for activation in ACTIVATIONS:
        name, ours_of_z = activation.function.__name__, activation.function
        theirs_of_z = getattr(torch, name, None) or getattr(F, name)
        found[name] = partial(theirs_of_z, z), partial(ours_of_z, z)
    return found


def _calls(conditions: Conditions) -> Table:
    rows: list[Row] = []
    everyone: list[Contender] = []
    by = "forward, 10 samples, 30 to 10"
    for layer, functions in calls(conditions.device).items():
        theirs, ours = map(Contender, (f"{layer}, torch", f"{layer}, ours"), functions)
        ours.results = partial(_call_results, *functions)
        ours.is_ours = True
        measure([theirs, ours], conditions)
        rows.append({by: layer} | _cells(theirs, ours))
        everyone += theirs, ours
    title = "The extra cost of calling one of our layers instead of PyTorch's"
    return Table(title, rows, "extra, µs", by, everyone)


def _call_results(theirs: Call, ours: Call) -> list[Result]:
    return _results([ours()], [theirs()], 1, 30)


def _cells(theirs: Contender, ours: Contender) -> Row:
    if notes := notes_of([theirs, ours]):
        return notes
    extra, quartiles = spread(1e6 * np.subtract(ours.seconds, theirs.seconds), 2)
    return {
        "torch, µs": f"{theirs.micros:.2f}",
        "ours, µs": f"{ours.micros:.2f}",
        "extra, µs": extra,
        "quartiles": quartiles,
    }


def networks(theirs: nn.Sequential) -> dict[str, nn.Sequential]:
    """PyTorch's network; ours, layer by layer; and ours with linear layer and sigmoid in one."""
    ours, fused = copy.deepcopy(theirs), copy.deepcopy(theirs)
    manual_bp.convert(ours)
    manual_bp.convert(fused, fuse=True)
    joined = nn.Sequential(*[m for m in fused if not isinstance(m, nn.Identity)])
    return {"torch": theirs, "Linear, Sigmoid": ours, "LinearSigmoid": joined}


def forward_and_backward(task: Problem) -> list[Contender]:
    """Forward and backward through each network, under PyTorch's mean squared error."""
    nets = networks(task.net)

    def step(net: nn.Module) -> None:
        net.zero_grad()
        cost: Any = F.mse_loss(net(task.x), task.y)
        cost.backward()

    def gradients(net: nn.Module) -> list[Any]:
        step(net)
        return [p.grad for p in net.parameters()]

    def results(net: nn.Module) -> list[Result]:
        return _results(gradients(net), gradients(task.net), len(task.w), task.longest)

    found = [
        Contender(name, partial(step, net), results=partial(results, net), is_ours=True)
        for name, net in nets.items()
    ]
    found[0].is_ours = False
    return found


def _results(
    found: Sequence[Tensor], right: Sequence[Tensor], layers: int, longest: int
) -> list[Result]:
    """Results that may be off by a part of their largest element."""
    relative = allowance(layers, longest)
    pairs = zip(found, right, strict=True)
    return [Result(f.detach(), r.detach(), relative * r.abs().max().item()) for f, r in pairs]
