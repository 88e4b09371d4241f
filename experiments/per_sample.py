"""Contenders for per-sample results: the same answers, each got in a library's own way.

All of them go forward and backward through a copy of one network of torch.nn's, whose layers every
library knows, under one and the same cost: the mean over samples. They are asked for

    .grad      the ordinary gradients alone: what a step of training needs anyway
    norms      the norm of every sample's whole gradient
    clipped    the mean over samples of gradients scaled down to a norm of at most max_norm
    gradients  every sample's own gradient, in memory
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import manual_bp
from experiments.contending import allowance, is_installed, sigmoid_network


@dataclass(frozen=True)
class Problem:
    """What all contenders work on.

    net: Linear layers and Sigmoids of torch.nn's.
    x, y: Inputs and desired outputs; samples come first, and one may have several rows.
    max_norm: What a sample's gradient is clipped to.
    expected: The right answers, by what is asked for, found sample by sample in float64.
    scales: For each of these tensors how large its largest element would be if the samples, which
        it may add up, did not cancel. An element errs by what its terms err.
    least_norm: The smallest norm of a sample's gradient.
    """

    net: nn.Sequential
    x: Tensor
    y: Tensor
    max_norm: float
    expected: dict[str, list[Tensor]]
    scales: dict[str, list[float]]
    least_norm: float


class Found(NamedTuple):
    """What was asked for; and the ordinary gradients, unless the contender makes none."""

    asked: list[Tensor]
    grads: list[Tensor] | None = None


@dataclass(frozen=True)
class Contender:
    """One way to what is asked for.

    call: Leaves nothing behind in its network, so that each call starts from the same memory.
    unit: What its answer is to be multiplied with to be of dC_x/dw. Not part of its call: each
        library answers in the unit that it finds cheapest.
    off: How far its answer is off by design, relative to the terms that it adds up.
    """

    what: str
    name: str
    call: Callable[[], Found]
    unit: float = 1.0
    off: float = 0.0


def problem(sizes: Sequence[int], batch: Sequence[int], device: str) -> Problem:
    """A network of these sizes, for so many samples, or so many samples of so many rows."""
    net = sigmoid_network(sizes, device)
    x = torch.randn(*batch, sizes[0], device=device)
    y = torch.rand(*batch, sizes[-1], device=device)
    gradients = _sample_by_sample(copy.deepcopy(net).double(), x.double(), y.double())
    norms = _norms(gradients)
    max_norm = norms.median().item()  # clips about half of the samples
    expected = _answers(gradients, norms, max_norm)
    uncancelled = _answers([torch.abs(g) for g in gradients], norms, max_norm)
    return Problem(
        net,
        x,
        y,
        max_norm,
        {what: [t.float() for t in tensors] for what, tensors in expected.items()},
        {what: [t.max().item() for t in tensors] for what, tensors in uncancelled.items()},
        norms.min().item(),
    )


def _answers(
    gradients: Sequence[Tensor], norms: Tensor, max_norm: float
) -> dict[str, Sequence[Tensor]]:
    return {
        ".grad": [g.mean(0) for g in gradients],
        "norms": [norms],
        "clipped": _clipped(gradients, max_norm),
        "gradients": gradients,
    }


def contenders(task: Problem) -> list[Contender]:
    """Plain backward first, then all ways to what is asked for, of the libraries there are."""
    found = [*_of_pytorch(task), *_of_ours(task), *_of_torch_func(task)]
    for name, of_peer in PEERS.items():
        if is_installed(name):
            found += of_peer(task)
    order = list(task.expected)
    return sorted(found, key=lambda contender: order.index(contender.what))


def left_out() -> list[str]:
    """The libraries that are not installed, and so do not contend."""
    return [name for name in PEERS if not is_installed(name)]


def require_same(task: Problem, all_of_them: Sequence[Contender]) -> None:
    """Check that every contender's answers are right, and its ordinary gradients.

    Raises:
        AssertionError: One of them is not; the message names the contender.
    """
    for contender in all_of_them:
        found = contender.call()
        asked = [tensor * contender.unit for tensor in found.asked]
        _require_close(asked, contender.what, task, contender)
        if found.grads is not None:
            _require_close(found.grads, ".grad", task, contender)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that comes from the hooks of Opacus and of BackPACK."""
    with warnings.catch_warnings():
        # PyTorch says so of a first layer, whose input wants no gradient; neither reads that one.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def _require_close(found: Sequence[Tensor], what: str, task: Problem, contender: Contender) -> None:
    weights = [p for p in task.net.parameters() if p.ndim == 2]
    rows = task.x[..., 0].numel()
    allowed = allowance(len(weights), max(rows, *(n for w in weights for n in w.shape)))
    for one, right, scale in zip(found, task.expected[what], task.scales[what], strict=True):
        torch.testing.assert_close(
            one,
            right,
            rtol=0,
            atol=(allowed + contender.off) * scale,
            msg=lambda said: f"{contender.what}, {contender.name}: {said}",
        )


def _cost(output: Tensor, y: Tensor) -> Any:
    return F.mse_loss(output, y)


def _sample_by_sample(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    parameters = list(net.parameters())
    gradients = [
        torch.autograd.grad(_cost(net(x[i : i + 1]), y[i : i + 1]), parameters)
        for i in range(len(x))
    ]
    return [torch.stack(of_one) for of_one in zip(*gradients, strict=True)]


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    of_each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    found: Tensor = torch.linalg.vector_norm(torch.stack(of_each), dim=0)
    return found


def _clipped(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    weights = (max_norm / _norms(gradients)).clamp(max=1) / len(gradients[0])
    return [torch.einsum("n,n...->...", weights, g) for g in gradients]


# What the answers are read from, given what `watch` gave.
Ask = Callable[[Any], list[Tensor]]


def _step(
    task: Problem,
    net: nn.Module,
    watch: Callable[[], AbstractContextManager[Any]],
    ask: Ask,
    clear: Callable[[], object],
) -> Found:
    with watch() as seen:
        _cost(net(task.x), task.y).backward()
    found = Found(ask(seen), _attributes(net, "grad"))
    clear()
    return found


def _attributes(net: nn.Module, name: str) -> list[Tensor]:
    return [getattr(p, name) for p in net.parameters()]


def _of_pytorch(task: Problem) -> list[Contender]:
    net = copy.deepcopy(task.net)
    call = partial(_step, task, net, nullcontext, lambda _: _attributes(net, "grad"), net.zero_grad)
    return [Contender(".grad", "plain", call)]


def _of_ours(task: Problem) -> list[Contender]:
    net = copy.deepcopy(task.net)
    names = [name for name, _ in net.named_parameters()]

    def clipped(trace: manual_bp.Trace) -> list[Tensor]:
        found = trace.clipped_grads(task.max_norm)
        return [found[name] for name in names]

    def gradients(trace: manual_bp.Trace) -> list[Tensor]:
        found = trace.per_sample_grads()
        return [found[name] for name in names]

    asks: dict[str, Ask] = {
        "norms": lambda trace: [trace.per_sample_norms()],
        "clipped": clipped,
        "gradients": gradients,
    }
    step = partial(_step, task, net, partial(manual_bp.record, net))
    return [
        Contender(what, "ours", partial(step, ask, net.zero_grad)) for what, ask in asks.items()
    ]


def _of_torch_func(task: Problem) -> list[Contender]:
    net = copy.deepcopy(task.net)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def cost(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        return _cost(functional_call(net, parameters, (x,)), y)

    of_each = vmap(grad(cost), in_dims=(None, 0, 0))

    def call(ask: Ask) -> Found:
        return Found(ask(list(of_each(parameters, task.x, task.y).values())))

    return [Contender(what, "torch.func", partial(call, ask)) for what, ask in _asks(task).items()]


def _asks(task: Problem) -> dict[str, Ask]:
    """What is asked for, of whoever has every sample's gradient in memory."""
    return {
        "norms": lambda gradients: [_norms(gradients)],
        "clipped": lambda gradients: _clipped(gradients, task.max_norm),
        "gradients": lambda gradients: gradients,
    }


def _of_opacus(task: Problem) -> list[Contender]:
    return [*_of_opacus_hooks(task), *_of_opacus_ghost(task)]


def _of_opacus_hooks(task: Problem) -> list[Contender]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net: Any = GradSampleModule(copy.deepcopy(task.net))
    optimizer: Any = DPOptimizer(**_optimizer_options(task, net))

    def clipped(_: object) -> list[Tensor]:
        optimizer.clip_and_accumulate()
        return _attributes(net, "summed_grad")

    off = _off_by_opacus(task)
    step = partial(_step, task, net, nullcontext)
    clear = partial(optimizer.zero_grad, set_to_none=True)
    norms = partial(step, lambda _: [_norms(_attributes(net, "grad_sample"))], clear)
    gradients = partial(step, lambda _: _attributes(net, "grad_sample"), clear)
    return [
        Contender("norms", "Opacus", norms),
        # Opacus divides by the number of samples when it has added the noise.
        Contender("clipped", "Opacus", partial(step, clipped, clear), 1 / len(task.x), off),
        Contender("gradients", "Opacus", gradients),
    ]


def _of_opacus_ghost(task: Problem) -> list[Contender]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net: Any = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.net), max_grad_norm=task.max_norm, use_ghost_clipping=True
    )
    optimizer: Any = DPOptimizerFastGradientClipping(**_optimizer_options(task, net))
    cost: Any = DPLossFastGradientClipping(net, optimizer, _CostOfEach(), "mean")
    clear = partial(optimizer.zero_grad, set_to_none=True)
    norms = partial(_step, task, net, nullcontext, lambda _: [net.get_norm_sample()], clear)

    def clipped() -> Found:
        cost(net(task.x), task.y).backward()  # twice, the second time with the samples weighted
        found = Found(_attributes(net, "grad"))
        clear()
        return found

    return [
        Contender("norms", "Opacus, ghost", norms),
        Contender("clipped", "Opacus, ghost", clipped, 1 / len(task.x), _off_by_opacus(task)),
    ]


def _off_by_opacus(task: Problem) -> float:
    # Opacus adds 1e-6 to a norm before it divides by it.
    return 1e-6 / task.least_norm


class _CostOfEach:
    """The cost of every sample, as Opacus asks for it."""

    reduction = "mean"

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y, reduction="none").flatten(1).mean(1)


def _optimizer_options(task: Problem, net: nn.Module) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD(net.parameters()),
        "noise_multiplier": 0.0,
        "max_grad_norm": task.max_norm,
        "expected_batch_size": len(task.x),
    }


def _of_backpack(task: Problem) -> list[Contender]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad, BatchL2Grad

    net = extend(copy.deepcopy(task.net))

    def norms(_: object) -> list[Tensor]:
        squares = torch.stack(_attributes(net, "batch_l2"))
        return [squares.sum(0).sqrt()]

    def clear(field: str) -> None:
        net.zero_grad()
        for parameter in net.parameters():
            delattr(parameter, field)

    def contender(what: str, extension: Any, ask: Ask) -> Contender:
        watch = partial(backpack, extension)
        call = partial(_step, task, net, watch, ask, partial(clear, extension.savefield))
        # Of the mean over samples, what BackPACK gives is each sample's part of it.
        return Contender(what, "BackPACK", call, len(task.x))

    return [
        contender("norms", BatchL2Grad(), norms),
        contender("gradients", BatchGrad(), lambda _: _attributes(net, "grad_batch")),
    ]


PEERS = {"opacus": _of_opacus, "backpack": _of_backpack}
