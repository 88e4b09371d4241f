"""Per-sample results, and the contenders for them.

All contenders go forward and backward through a copy of one network of torch.nn's layers, which
every library knows, under the same cost, a mean over samples. They are asked for

    .grad      only the ordinary gradients, which a training step needs in any case
    norms      the norm of every sample's whole gradient
    clipped    the mean over samples of gradients scaled down to a norm of at most max_norm
    gradients  every sample's own gradient, in memory

each in the way that the library provides.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import manual_bp
from experiments.benchmark.contender import Contender, Result, allowance
from experiments.benchmark.problem import Problem

# Reads the answer off what a contender watched, or computes it from that.
Ask = Callable[[Any], Sequence[Tensor]]

# Answers the question, and returns the ordinary gradients as well, if it made any.
Call = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


@dataclass(frozen=True)
class Samples:
    """A problem, and what the right answers are.

    problem: Its x may have several rows for each sample.
    max_norm: What the gradients of samples are clipped to.
    right: The right answers, by what is asked for, computed sample by sample in float64.
    scales: For each of these tensors, how large its largest element would be if the samples that
        it may sum did not cancel. Errors are relative to the terms of a sum, not to the sum.
    """

    problem: Problem
    max_norm: float
    right: dict[str, Sequence[Tensor]]
    scales: Mapping[str, Sequence[float]]

    def contender(
        self, asked: str, who: str, call: Call, unit: float = 1.0, off: float = 0.0
    ) -> Contender:
        """A contender that is judged by its answer and its ordinary gradients.

        call: Leaves nothing behind in its network, so that each call starts with the same memory.
        unit: What its answer has to be multiplied by to be in terms of dC_x/dw. Not part of the
            call: each library answers in its cheapest unit.
        off: How far its answer is off by design, relative to the terms that it sums.
        """
        allowed = off + allowance(len(self.problem.w), self.problem.longest)

        def compare(asked: str, found: list[Tensor]) -> list[Result]:
            limits = [allowed * scale for scale in self.scales[asked]]
            return [Result(*r) for r in zip(found, self.right[asked], limits, strict=True)]

        def results() -> list[Result]:
            answer, grads = call()
            found = compare(asked, [unit * tensor for tensor in answer])
            return found + (compare(".grad", list(grads)) if grads else [])

        return Contender(f"{asked}, {who}", call, results=results, is_ours=who == "ours")

    def contenders(
        self,
        who: str,
        net: nn.Module,
        asks: Mapping[str, Ask],
        watch: Callable[[], Any] = nullcontext,
        clear: Callable[[], object] | None = None,
        unit: float = 1.0,
        off: float = 0.0,
    ) -> list[Contender]:
        """Contenders that go forward and backward through a network while something watches.

        asks: What each is asked for, and how it reads the answer off what `watch` returned.
        clear: Removes what the pass left in the network; by default its gradients.
        """

        def call(ask: Ask) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            with watch() as seen:
                cost: Any = F.mse_loss(net(self.problem.x), self.problem.y)
                cost.backward()
            found = ask(seen), attributes(net, "grad")
            (clear or net.zero_grad)()
            return found

        return [
            self.contender(asked, who, partial(call, ask), unit, off) for asked, ask in asks.items()
        ]


def samples(problem: Problem) -> Samples:
    """The problem with its right answers; about half of its samples are to be clipped."""
    net = copy.deepcopy(problem.net).double()
    parameters = list(net.parameters())
    gradients = [
        torch.autograd.grad(F.mse_loss(net(x[None]), y[None]), parameters)
        for x, y in zip(problem.x.double(), problem.y.double(), strict=True)
    ]
    stacked = [torch.stack(of_one) for of_one in zip(*gradients, strict=True)]
    norms = norms_of(stacked)
    max_norm = norms.median().item()

    def answers(gradients: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        return {
            ".grad": [g.mean(0) for g in gradients],
            "norms": [norms],
            "clipped": clipped(gradients, norms, max_norm),
            "gradients": gradients,
        }

    uncancelled = answers([g.abs() for g in stacked])
    scales = {asked: [t.max().item() for t in tensors] for asked, tensors in uncancelled.items()}
    return Samples(problem, max_norm, answers(stacked), scales)


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each sample's whole gradient, from every sample's gradient."""
    of_each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    found: Tensor = torch.linalg.vector_norm(torch.stack(of_each), dim=0)
    return found


def clipped(gradients: Sequence[Tensor], norms: Tensor, max_norm: float) -> list[Tensor]:
    """The mean over samples of clipped gradients, from every sample's gradient."""
    weights = (max_norm / norms).clamp(max=1) / len(norms)
    return [torch.einsum("n,n...->...", weights, g) for g in gradients]


def attributes(net: nn.Module, name: str) -> list[Tensor]:
    """An attribute of every parameter."""
    return [getattr(p, name) for p in net.parameters()]


def plain(task: Samples) -> list[Contender]:
    """Forward and backward through autograd, for the ordinary gradients alone."""
    net = copy.deepcopy(task.problem.net)
    return task.contenders("plain", net, {".grad": lambda _: attributes(net, "grad")})


def ours(task: Samples) -> list[Contender]:
    """Our recording of the pass, and what its Trace gives."""
    net = copy.deepcopy(task.problem.net)

    def in_order(found: Mapping[str, Tensor]) -> list[Tensor]:
        return [found[name] for name, _ in net.named_parameters()]

    asks: dict[str, Ask] = {
        "norms": lambda trace: [trace.per_sample_norms()],
        "clipped": lambda trace: in_order(trace.clipped_grads(task.max_norm)),
        "gradients": lambda trace: in_order(trace.per_sample_grads()),
    }
    return task.contenders("ours", net, asks, partial(manual_bp.record, net))


def torch_func(task: Samples) -> list[Contender]:
    """Every sample's gradient by vmap over grad; norms and clipping are computed from these."""
    net = copy.deepcopy(task.problem.net)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        return F.mse_loss(functional_call(net, parameters, (x,)), y)

    of_each = vmap(grad(of_one), in_dims=(None, 0, 0))

    def call(ask: Ask) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        gradients = of_each(parameters, task.problem.x, task.problem.y)
        return ask(list(gradients.values())), []

    asks: dict[str, Ask] = {
        "norms": lambda gradients: [norms_of(gradients)],
        "clipped": lambda gradients: clipped(gradients, norms_of(gradients), task.max_norm),
        "gradients": lambda gradients: gradients,
    }
    return [task.contender(asked, "torch.func", partial(call, ask)) for asked, ask in asks.items()]


def opacus_hooks(task: Samples) -> list[Contender]:
    """Opacus' hooks, which keep every sample's gradient."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net: Any = GradSampleModule(copy.deepcopy(task.problem.net))
    optimizer: Any = DPOptimizer(**_options(task, net))
    contenders = partial(
        task.contenders, "Opacus", net, clear=partial(optimizer.zero_grad, set_to_none=True)
    )

    def clipped(_: object) -> list[Tensor]:
        optimizer.clip_and_accumulate()
        return attributes(net, "summed_grad")

    asks: dict[str, Ask] = {
        "norms": lambda _: [norms_of(attributes(net, "grad_sample"))],
        "gradients": lambda _: attributes(net, "grad_sample"),
    }
    unit, off = _clipped_by_opacus(task)
    return contenders(asks) + contenders({"clipped": clipped}, unit=unit, off=off)


def opacus_ghost(task: Samples) -> list[Contender]:
    """Opacus' ghost clipping, which computes norms without the gradients."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net: Any = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.problem.net), max_grad_norm=task.max_norm, use_ghost_clipping=True
    )
    optimizer: Any = DPOptimizerFastGradientClipping(**_options(task, net))
    cost: Any = DPLossFastGradientClipping(net, optimizer, _CostOfEach(), "mean")
    clear = partial(optimizer.zero_grad, set_to_none=True)
    asks: dict[str, Ask] = {"norms": lambda _: [net.get_norm_sample()]}

    def clipped() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # Goes backward twice, the second time with weighted samples.
        cost(net(task.problem.x), task.problem.y).backward()
        found = attributes(net, "grad")
        clear()
        return found, []

    return [
        *task.contenders("Opacus, ghost", net, asks, clear=clear),
        task.contender("clipped", "Opacus, ghost", clipped, *_clipped_by_opacus(task)),
    ]


def _clipped_by_opacus(task: Samples) -> tuple[float, float]:
    # Opacus divides by the number of samples only after it has added the noise, and adds 1e-6 to a
    # norm before it divides by it.
    least_norm = task.right["norms"][0].min().item()
    return 1 / len(task.problem.x), 1e-6 / least_norm


class _CostOfEach:
    """The cost of every sample, in the form in which Opacus wants it."""

    reduction = "mean"

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y, reduction="none").flatten(1).mean(1)


def _options(task: Samples, net: nn.Module) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD(net.parameters()),
        "noise_multiplier": 0.0,
        "max_grad_norm": task.max_norm,
        "expected_batch_size": len(task.problem.x),
    }


def backpack(task: Samples) -> list[Contender]:
    """BackPACK's extensions for norms and gradients; it has none for clipping."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad, BatchL2Grad

    net = extend(copy.deepcopy(task.problem.net))

    def contenders(asked: str, extension: Any, ask: Ask) -> list[Contender]:
        def clear() -> None:
            net.zero_grad()
            for parameter in net.parameters():
                delattr(parameter, extension.savefield)

        # BackPACK gives each sample's part of the mean over samples.
        unit, watch = len(task.problem.x), partial(backpack, extension)
        return task.contenders("BackPACK", net, {asked: ask}, watch, clear, unit=unit)

    return [
        *contenders(
            "norms",
            BatchL2Grad(),
            lambda _: [torch.stack(attributes(net, "batch_l2")).sum(0).sqrt()],
        ),
        *contenders("gradients", BatchGrad(), lambda _: attributes(net, "grad_batch")),
    ]
