"""Judges the kit: it must catch every planted mistake, and find none in what is right."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import gradcheck

from manual_bp.verify._autograd import leaves
from manual_bp.verify._case import Case
from manual_bp.verify._check import CheckContext
from manual_bp.verify._global_state import restored
from manual_bp.verify._make_case import function_case, module_case
from manual_bp.verify._report import Outcome, Report
from manual_bp.verify._run import run
from manual_bp.verify.checks import CAPABILITIES, CHECKS
from manual_bp.verify.mutants import MUTANTS, TWINS, Mutant, Twin

OPERATOR_CAPABILITIES = {check.name for check in CHECKS if check.for_operators}
MODULE_CAPABILITIES = CAPABILITIES - OPERATOR_CAPABILITIES
FUNCTION_CAPABILITIES = MODULE_CAPABILITIES - {"factory_kwargs"}


@dataclass(frozen=True)
class Verdict:
    """What the kit and gradcheck said about one mutant."""

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
    """Judge every mutant by all fast checks, and by the one meant for it."""
    for mutant in MUTANTS:
        report = run(mutant.case, slow=False)
        if mutant.caught_by not in {outcome.check for outcome in report.outcomes}:
            own = run(mutant.case, only=[mutant.caught_by])
            report = replace(report, outcomes=(*report.outcomes, *own.outcomes))
        yield Verdict(mutant, report, default_gradcheck(mutant.case))


def default_gradcheck(case: Case) -> str:
    """What `torch.autograd.gradcheck` says, as most people call it: "caught" or "missed"."""
    ctx = CheckContext(case, "gradcheck")
    call: Any = case.call
    samples = ctx.samples
    if case.factory is not None:
        torch.manual_seed(case.seed)
        call = case.factory().double()
        samples = [sample[: len(sample) - case.parameters] for sample in samples]
    try:
        with restored(), warnings.catch_warnings(action="ignore"):
            return "missed" if all(gradcheck(call, leaves(s)) for s in samples) else "caught"
    except Exception:
        return "caught"


def judge_twin(twin: Twin, seed: int = 0) -> Report:
    """Judge a twin by all fast checks, and by the one it is about.

    The report is not ok if that check did not apply: it must judge the twin to clear it.
    """
    case = replace(twin.case, seed=seed)
    report = run(case, slow=False)
    if twin.passed_by not in {outcome.check for outcome in report.outcomes}:
        own = run(case, only=[twin.passed_by])
        report = replace(report, outcomes=(*report.outcomes, *own.outcomes))
    return replace(report, outcomes=tuple(_must_pass(o, twin) for o in report.outcomes))


def _must_pass(outcome: Outcome, twin: Twin) -> Outcome:
    if outcome.check != twin.passed_by or outcome.status != "not applicable":
        return outcome
    return replace(outcome, status="failed", message=f"it must apply: {outcome.message}")


def pytorch_reports(seed: int = 0, *, slow: bool = False) -> Iterator[Report]:
    """Judge PyTorch's own layers. No check may fail."""
    for case in pytorch_cases():
        yield run(replace(case, seed=seed), slow=slow)


def pytorch_cases() -> list[Case]:
    """PyTorch's own layers and losses, with what they support."""
    every = FUNCTION_CAPABILITIES

    def function(fn: Any, samples: Any, in_dims: Any, supports: Any = every) -> Case:
        return function_case(fn, samples, fn, supports=supports, in_dims=in_dims)

    def module(factory: Any, samples: Any, supports: Any = ()) -> Case:
        return module_case(factory, samples, factory, supports=supports, in_dims=(0,))

    one: Any = partial(_matrices, 1)
    two: Any = partial(_matrices, 2)
    activations = (torch.sigmoid, torch.tanh, F.relu, F.softplus, F.gelu, F.silu, F.elu, torch.exp)
    return [
        *[function(activation, one, (0,)) for activation in activations],
        function(F.linear, _linear_arguments, (0, None, None)),
        function(_layer_norm, one, (0,)),
        function(_softmax, one, (0,)),
        function(F.mse_loss, two, (0, 0)),
        function(F.cross_entropy, _classes, (0, 0), supports=()),
        module(partial(nn.Linear, 3, 4), one, supports=MODULE_CAPABILITIES),
        function(_two_outputs, two, (0, 0)),
        module(_mlp, one, supports=every),
        module(lambda: nn.BatchNorm1d(3), one),
        module(lambda: nn.Embedding(7, 4), _indices),
    ]


def _randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _matrices(count: int, g: Generator) -> list[tuple[Any, ...]]:
    return [tuple(_randn(g, 5, 3) for _ in range(count))]


def _linear_arguments(g: Generator) -> list[tuple[Any, ...]]:
    square = (_randn(g, 3, 3), _randn(g, 3, 3), _randn(g, 3))
    return [(_randn(g, 5, 3), _randn(g, 4, 3), _randn(g, 4)), square]


def _classes(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3), torch.randint(3, (5,), generator=g))]


def _indices(g: Generator) -> list[tuple[Any, ...]]:
    return [(torch.randint(7, (5,), generator=g),)]


def _two_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y, torch.sin(x) + y


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def print_matrix(verdicts: list[Verdict]) -> None:
    """Print which checks caught each mutant, and what default gradcheck says."""
    name = max(len(verdict.mutant.name) for verdict in verdicts)
    meant = max(len(verdict.mutant.caught_by) for verdict in verdicts)
    print(f"{'planted mistake':{name}}  {'meant for':{meant}}  kit     gradcheck  others that fail")
    for verdict in verdicts:
        mutant = verdict.mutant
        others = ", ".join(check for check in verdict.caught_by if check != mutant.caught_by)
        kit = "caught" if verdict.is_caught else "MISSED"
        line = f"{mutant.name:{name}}  {mutant.caught_by:{meant}}  {kit}  {verdict.gradcheck:9}"
        print(f"{line}  {others}".rstrip())
    caught = sum(verdict.is_caught for verdict in verdicts)
    theirs = sum(verdict.gradcheck == "caught" for verdict in verdicts)
    print(f"{len(verdicts)} mistakes: the kit caught {caught}, default gradcheck {theirs}")


def self_test(seeds: int) -> bool:
    """Judge all mutants, and with several seeds their twins and PyTorch's own layers; print it.

    Returns:
        Whether every mutant was caught, and every twin and every layer found right.
    """
    verdicts = list(judge_mutants())
    print_matrix(verdicts)
    twins = [judge_twin(twin, seed) for seed in range(seeds) for twin in TWINS]
    layers = [report for seed in range(seeds) for report in pytorch_reports(seed, slow=seed == 0)]
    is_right = [_print_alarms("Right twins", twins, seeds)]
    is_right.append(_print_alarms("PyTorch's own layers", layers, seeds))
    return all(is_right) and all(verdict.is_caught for verdict in verdicts)


def _print_alarms(what: str, reports: list[Report], seeds: int) -> bool:
    """Print every report with a false alarm, and a summary; return whether there was none."""
    alarms = [report for report in reports if not report.ok]
    for report in alarms:
        print(report)
    checks = sum(report.ran for report in reports)
    print(
        f"{what}: {len(reports) // seeds} cases, {seeds} seeds, {checks} checks, "
        f"{len(alarms)} false alarms"
    )
    return not alarms
