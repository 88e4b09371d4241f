"""What a check is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manual_bp.verify._case import Sample
from manual_bp.verify._context import CheckContext

Run = Callable[[CheckContext, Sample], None]

# What a check of derivatives builds on, first causes first.
VALUE = ("writes_nothing", "deterministic", "forward_matches_reference")
SLOPE = (*VALUE, "gradients_match_reference", "full_precision", "finite_differences")
# What a check that calls a backward twice builds on.
STATE = ("interleaved_calls", "repeatable_backward")


@dataclass(frozen=True)
class Check:
    """A check, which has the name of its function and is described by its docstring.

    The function judges one sample. It compares through its context, and raises a `Mismatch` for
    what is wrong, or `NotApplicable` if it does not apply to the sample. Any other exception comes
    from the code under test: a refusal if the check is for a capability that was not declared, else
    a failure.

    capability: It must pass only if it was declared in `supports`. If not, code that raises is
        not at fault; code that gives a wrong answer is.
    only_if_declared: A wrong answer, too, is a failure only if the capability was declared.
    slow: It uses the compiler.
    for_modules, for_operators: It applies to modules, or to operators of torch.library, only.
    best_sample: It runs on one sample, the one with the most gradients that can show a mistake.
    after_all: Runs once after all samples.
    builds_on: Names of other checks. If one of them fails, a failure of this one follows from that.
        All must be named, those on which a named one builds too, first causes first.
    """

    run: Run
    capability: bool = False
    only_if_declared: bool = False
    slow: bool = False
    for_modules: bool = False
    for_operators: bool = False
    best_sample: bool = False
    after_all: Callable[[CheckContext], None] | None = None
    builds_on: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the function, without the underscore that tells it from a builtin."""
        return self.run.__name__.rstrip("_")


def check(**flags: Any) -> Callable[[Run], Check]:
    """Turn a function into a `Check` with these flags."""
    return lambda run: Check(run, **flags)
