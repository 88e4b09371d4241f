"""BP1 to BP4 against finite differences, and what a mistake looks like.

    python -m experiments.gradient_check

compares each equation with (C(p + h) − C(p − h)) / 2h for step sizes h from 1 down to 2^-40, in
float64 and in float32. A long step errs by curvature, a short one by rounding, so the error of what
is right has the shape of a V. The error of what is wrong does not fall below the mistake.
"""

if __name__ == "__main__":  # first, so that it can be interrupted while PyTorch is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.gradient_check").main())

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd import Function

from experiments.command_line import parse, require_seed
from experiments.curves import Row
from experiments.findings import Findings, Options, require_range
from experiments.networks import build_net
from manual_bp import QuadraticCost, SigmoidFunction, backprop, verify

PROGRAM = "python -m experiments.gradient_check"

SIZES = (6, 5, 4)
DTYPES = {"float64": torch.float64, "float32": torch.float32}
EQUATIONS = ("BP1", "BP2", "BP3", "BP4")
FORGOTTEN, TOO_LARGE = "forgotten", "too_large"
CHARTS = {
    "error": "The norm of the difference between a gradient and finite differences, relative to "
    "the larger of both. Step: how often the step of the differences was halved, from 1 on.",
}
COST = QuadraticCost()


@dataclass(frozen=True)
class Config(Options):
    """See how far the four equations and finite differences agree, for each size of a step."""

    halvings: int = 40
    """How often the step is halved, from 1 on."""
    excess: float = 1e-4
    """How much too large one of the planted gradients is, relative to the right one."""
    samples: int = 5
    """Samples in the batch."""
    seed: int = 0
    """Determines the weights and the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, 100, "halvings")
        require_range(self, 1e-15, 1, "excess")
        require_range(self, 1, 100, "samples")
        require_seed(self.seed)


@dataclass(frozen=True)
class Problem:
    """A network of two layers, and a batch for it."""

    net: nn.Sequential
    x: Tensor
    y: Tensor


def problem(config: Config, dtype: torch.dtype) -> Problem:
    """The same problem in either dtype, up to rounding."""
    torch.manual_seed(config.seed)
    net = build_net(SIZES, "sigmoid", "quadratic").double().to(dtype)
    x, y = (torch.randn(config.samples, size, dtype=torch.float64) for size in (SIZES[0], SIZES[2]))
    return Problem(net, x.to(dtype), y.sigmoid().to(dtype))


@torch.no_grad()
def differences(cost: Callable[[], Tensor], of: Tensor, step: float) -> Tensor:
    """(C(p + h) − C(p − h)) / 2h for every number p of a tensor, which the cost depends on."""
    numbers, found = of.detach().view(-1), torch.empty_like(of)
    for index in range(len(numbers)):
        number = numbers[index].clone()
        numbers[index] = number + step
        above = cost()
        numbers[index] = number - step
        below = cost()
        numbers[index] = number
        found.view(-1)[index] = (above - below) / (2 * step)
    return found


def equations(task: Problem) -> dict[str, tuple[Tensor, Callable[[float], Tensor]]]:
    """What each equation says, and how to find the same by differences: of z for BP1 and BP2."""
    net, x, y = task.net, task.x, task.y
    first, last = backprop(net, x, y, COST).layers
    assert first.grad_b is not None
    assert first.b is not None
    assert first.grad_w is not None

    def of_z(z: Tensor, place: int) -> Callable[[float], Tensor]:
        above = net[place + 1 :]
        return partial(differences, lambda: COST(above(z), y), z)

    def of_parameter(parameter: Tensor) -> Callable[[float], Tensor]:
        return partial(differences, lambda: COST(net(x), y), parameter)

    return {
        "BP1": (last.delta, of_z(last.z.clone(), 2)),
        "BP2": (first.delta, of_z(first.z.clone(), 0)),
        "BP3": (first.grad_b, of_parameter(first.b)),
        "BP4": (first.grad_w, of_parameter(first.w)),
    }


class ForgottenFunction(SigmoidFunction):
    """A sigmoid whose backward forgets ⊙ σ'."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        """Return ∂C/∂a where ∂C/∂z belongs."""
        del ctx
        return grad_a


def too_large(excess: float) -> type[Function]:
    """A sigmoid whose backward is too large by that share."""

    class TooLargeFunction(SigmoidFunction):
        @staticmethod
        def backward(ctx: Any, grad_a: Any) -> Any:
            right: Any = SigmoidFunction.backward(ctx, grad_a)
            return right * (1 + excess)

    return TooLargeFunction


def mistakes(config: Config) -> dict[str, type[Function]]:
    """The planted mistakes, by name."""
    return {FORGOTTEN: ForgottenFunction, TOO_LARGE: too_large(config.excess)}


def wrong_grad_w(task: Problem, sigmoid: Any) -> Tensor:
    """∂C/∂w of the first layer, if the hidden layer has that sigmoid."""
    first, _, *above = task.net
    a = nn.Sequential(*above)(sigmoid.apply(first(task.x)))
    (grad_w,) = torch.autograd.grad(COST(a, task.y), [task.net.get_parameter("0.weight")])
    return grad_w


def measure(config: Config) -> Iterator[Row]:
    """The relative error for each dtype, halving of the step, and equation or planted mistake."""
    for name, dtype in DTYPES.items():
        task = problem(config, dtype)
        wrong = {what: wrong_grad_w(task, kind) for what, kind in mistakes(config).items()}
        for halvings in range(config.halvings + 1):
            for what, (claimed, of_step) in equations(task).items():
                found = of_step(2.0**-halvings)
                label = {"dtype": name, "halvings": halvings}
                yield label | {"gradient": what, "error": error(claimed, found)}
            for what, claimed in wrong.items():  # found is now that of BP4
                yield label | {"gradient": what, "error": error(claimed, found)}


def error(claimed: Tensor, found: Tensor) -> float:
    """The norm of the difference, relative to the larger of both norms."""
    return float((claimed - found).norm() / torch.maximum(claimed.norm(), found.norm()))


def errors(rows: Sequence[Row], dtype: str, gradient: str) -> list[float]:
    """The errors of one gradient, by halvings of the step."""
    return [row["error"] for row in rows if (row["dtype"], row["gradient"]) == (dtype, gradient)]


def draw(config: Config, rows: Sequence[Row], figure: Figure) -> None:
    """Errors over the step size: of the four equations, and of the planted mistakes."""
    figure.suptitle("Is a gradient right? Its difference from finite differences")
    right, wrong = figure.subplots(1, 2, sharey=True)
    steps = [2.0**-halvings for halvings in range(config.halvings + 1)]
    shown = {
        FORGOTTEN: "σ' forgotten",
        TOO_LARGE: f"{100 * config.excess:.3g} % too large",
        "BP4": "right, as BP4",
    }
    for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
        for place, what in enumerate(EQUATIONS):
            label = f"{what}, {dtype}"
            right.plot(steps, errors(rows, dtype, what), f"C{place}", ls=style, label=label)
        for what, colour in zip(shown, ("black", "C4", "C3"), strict=True):
            label = f"{shown[what]}, {dtype}"
            wrong.plot(steps, errors(rows, dtype, what), colour, ls=style, label=label)
    right.set(title="right: a V", ylabel="relative difference", xscale="log", yscale="log")
    wrong.set(title="wrong: a floor", xscale="log")
    for axes in (right, wrong):
        axes.set(xlabel="step h   (← rounding        curvature →)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def conclusion(config: Config, rows: Sequence[Row]) -> list[str]:
    """The best agreement in each dtype, and how the planted mistakes stand out from it."""
    lines = []
    for dtype in DTYPES:
        worst = [
            max(each) for each in zip(*(errors(rows, dtype, e) for e in EQUATIONS), strict=True)
        ]
        best = min(worst)
        small = min(errors(rows, dtype, TOO_LARGE))
        is_seen = small > 10 * min(errors(rows, dtype, "BP4"))
        lines += [
            f"{dtype}: all four equations agree with differences to {best:.1g} at best, for "
            f"h = 2^-{worst.index(best)}.",
            f"    A gradient that is {100 * config.excess:.3g} % too large differs by "
            f"{small:.1g} at best, the right one by {min(errors(rows, dtype, 'BP4')):.1g}: "
            + ("it stands out." if is_seen else "that does not show."),
            f"    One without σ' differs by {min(errors(rows, dtype, FORGOTTEN)):.2g} or more, "
            "whatever the step.",
        ]
    return lines + [f"manual_bp.verify on {verdict}" for verdict in verdicts(config)]


def verdicts(config: Config) -> Iterator[str]:
    """What the verification kit says about the planted mistakes."""

    def samples(generator: torch.Generator) -> Any:
        return [(torch.randn(5, 3, generator=generator, dtype=torch.float64),)]

    shown = {FORGOTTEN: "the one without σ'", TOO_LARGE: "the one that is too large"}
    for what, kind in mistakes(config).items():
        only = ["gradients_match_reference"]
        report = verify.check_function(kind, samples, torch.sigmoid, only=only)
        yield f"{shown[what]}: {str(report).splitlines()[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    config = parse(Config, arguments, PROGRAM)
    findings = Findings(PROGRAM, config)
    kinds = len(EQUATIONS) + len(mistakes(config))
    rows = findings.add_rows(measure(config), len(DTYPES) * (config.halvings + 1) * kinds)
    findings.add_curves(rows, over="halvings", charts=CHARTS)
    findings.add_picture(partial(draw, config, rows))
    return findings.conclude(conclusion(config, rows))
