"""The kit judged: it must catch every planted mistake, and find none in PyTorch's own layers."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from manual_bp.verify._bench import Bench, leaves
from manual_bp.verify._case import CAPABILITIES, Case, function_case, module_case
from manual_bp.verify._report import Report
from manual_bp.verify._run import run
from manual_bp.verify.mutants import MUTANTS, Mutant

FUNCTION_CAPABILITIES = CAPABILITIES - {"factory_kwargs"}


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    report: Report
    gradcheck: str

    @property
    def caught_by(self) -> list[str]:
        """The checks that failed."""
        return [outcome.check for outcome in self.report.failures]

    @property
    def is_caught(self) -> bool:
        """Whether the check meant for it is among them."""
        return self.mutant.caught_by in self.caught_by


def judge_mutants() -> Iterator[Verdict]:
    """Every mutant, judged by all checks that stand a chance of being fast, and by its own."""
    for mutant in MUTANTS:
        report = run(mutant.case, slow=False)
        if mutant.caught_by not in {outcome.check for outcome in report.outcomes}:
            own = run(mutant.case, only=[mutant.caught_by])
            report = replace(report, outcomes=(*report.outcomes, *own.outcomes))
        yield Verdict(mutant, report, default_gradcheck(mutant.case))


def default_gradcheck(case: Case) -> str:
    """What `torch.autograd.gradcheck` says, as most people call it: "caught" or "missed"."""
    bench = Bench(case, "gradcheck")
    call: Any = case.call
    samples = bench.samples
    if case.factory is not None:
        torch.manual_seed(case.seed)
        call = case.factory().double()
        count = sum(1 for _ in call.named_parameters())
        samples = [sample[: len(sample) - count] for sample in samples]
    try:
        with warnings.catch_warnings(action="ignore"):
            return "missed" if all(gradcheck(call, leaves(s)) for s in samples) else "caught"
    except Exception:
        return "caught"


def pytorchs_own(seed: int = 0, *, slow: bool = False) -> Iterator[Report]:
    """PyTorch's own layers, of which every one must be found right."""
    for case in pytorchs_cases():
        yield run(replace(case, seed=seed), slow=slow)


def pytorchs_cases() -> list[Case]:
    """PyTorch's own layers and losses, with what they support."""

    def elementwise(g: torch.Generator) -> list[tuple[Any, ...]]:
        return [(_randn(g, 5, 3),)]

    def linear(g: torch.Generator) -> list[tuple[Any, ...]]:
        square = (_randn(g, 3, 3), _randn(g, 3, 3), _randn(g, 3))
        return [(_randn(g, 5, 3), _randn(g, 4, 3), _randn(g, 4)), square]

    def pairs(g: torch.Generator) -> list[tuple[Any, ...]]:
        return [(_randn(g, 5, 3), _randn(g, 5, 3))]

    def classes(g: torch.Generator) -> list[tuple[Any, ...]]:
        return [(_randn(g, 5, 3), torch.randint(3, (5,), generator=g))]

    def indices(g: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.randint(7, (5,), generator=g),)]

    every = FUNCTION_CAPABILITIES
    functions: list[Any] = [
        torch.sigmoid,
        torch.tanh,
        F.relu,
        F.softplus,
        F.gelu,
        F.silu,
        F.elu,
        torch.exp,
    ]
    cases = [function_case(f, elementwise, f, supports=every, in_dims=(0,)) for f in functions]
    cases += [
        function_case(F.linear, linear, F.linear, supports=every, in_dims=(0, None, None)),
        function_case(_layer_norm, elementwise, _layer_norm, supports=every, in_dims=(0,)),
        function_case(_softmax, elementwise, _softmax, supports=every, in_dims=(0,)),
        function_case(F.mse_loss, pairs, F.mse_loss, supports=every, in_dims=(0, 0)),
        function_case(F.cross_entropy, classes, F.cross_entropy, in_dims=(0, 0)),
        module_case(
            _linear_module, elementwise, _linear_module, supports=CAPABILITIES, in_dims=(0,)
        ),
        function_case(_two_outputs, pairs, _two_outputs, supports=every, in_dims=(0, 0)),
        module_case(_mlp, elementwise, _mlp, supports=every, in_dims=(0,)),
        module_case(_batch_norm, elementwise, _batch_norm, in_dims=(0,)),
        module_case(_embedding, indices, _embedding, in_dims=(0,)),
    ]
    return cases


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _linear_module(**options: Any) -> nn.Module:
    return nn.Linear(3, 4, **options)


def _two_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y, torch.sin(x) + y


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _batch_norm() -> nn.Module:
    return nn.BatchNorm1d(3)


def _embedding() -> nn.Module:
    return nn.Embedding(7, 4)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def print_matrix(verdicts: list[Verdict]) -> None:
    """Who was caught by what, beside what default gradcheck says."""
    width = max(len(verdict.mutant.name) for verdict in verdicts)
    meant = max(len(verdict.mutant.caught_by) for verdict in verdicts)
    print(
        f"{'planted mistake':{width}}  {'meant for':{meant}}  kit     gradcheck  others that fail"
    )
    for verdict in verdicts:
        others = [name for name in verdict.caught_by if name != verdict.mutant.caught_by]
        print(
            f"{verdict.mutant.name:{width}}  {verdict.mutant.caught_by:{meant}}  "
            f"{'caught' if verdict.is_caught else 'MISSED'}  {verdict.gradcheck:9}  "
            f"{', '.join(others)}".rstrip()
        )
    caught = sum(verdict.is_caught for verdict in verdicts)
    theirs = sum(verdict.gradcheck == "caught" for verdict in verdicts)
    print(f"{len(verdicts)} mistakes: the kit caught {caught}, default gradcheck {theirs}")


def self_test(seeds: int) -> bool:
    """Judge all mutants, and PyTorch's own layers over so many seeds; print both."""
    verdicts = list(judge_mutants())
    print_matrix(verdicts)
    reports = [report for seed in range(seeds) for report in pytorchs_own(seed, slow=seed == 0)]
    alarms = [report for report in reports if not report.ok]
    for report in alarms:
        print(report)
    checks = sum(report.ran for report in reports)
    layers = len(reports) // max(seeds, 1)
    print(
        f"PyTorch's own: {layers} layers, {seeds} seeds, {checks} checks, "
        f"{len(alarms)} false alarms"
    )
    return all(verdict.is_caught for verdict in verdicts) and not alarms
