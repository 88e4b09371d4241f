"""The decorators that make a mutant of what is wrong, and a twin of what is right."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from manual_bp.verify._case import Case, Samples
from manual_bp.verify._make_case import function_case, module_case

Judged = TypeVar("Judged", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mutant:
    """A planted mistake.

    name: The name of the class or function, in snake case.
    mistake: Its docstring.
    caught_by: The check meant to catch it.
    case: The case that makes the mistake.
    kind: The module in which it is declared.
    """

    name: str
    mistake: str
    caught_by: str
    case: Case
    kind: str


@dataclass(frozen=True)
class Twin:
    """What does something like a mutant and is right: every check must let it pass.

    name: The name of the class or function, in snake case.
    passed_by: The check that must judge it, and let it pass: the one that catches the mutant.
    case: The case.
    kind: The module in which it is declared.
    """

    name: str
    passed_by: str
    case: Case
    kind: str


DECLARED: list[Mutant] = []
DECLARED_TWINS: list[Twin] = []


def mutant(
    caught_by: str, samples: Samples, reference: Any = None, *, name: str = "", **options: Any
) -> Callable[[Judged], Judged]:
    """Declare that a class or function makes a mistake, which its docstring describes.

    Args:
        caught_by: The check meant to catch it.
        samples: Samples of its arguments.
        reference: What is right; None to leave the verdict to finite differences.
        name: The name of the mutant; by default that of the class or function, in snake case.
        options: Those of `function_case` and `module_case`.
    """

    def declare(wrong: Judged) -> Judged:
        case = _case(wrong, samples, reference, options)
        mistake = wrong.__doc__ or ""
        declared = Mutant(name or _snake(wrong), mistake, caught_by, case, wrong.__module__)
        DECLARED.append(declared)
        return wrong

    return declare


def twin(
    passed_by: str, samples: Samples, reference: Any = None, *, name: str = "", **options: Any
) -> Callable[[Judged], Judged]:
    """Declare that a class or function is right, although a careless check could accuse it.

    Args:
        passed_by: The check that must judge it, and let it pass.
        samples: Samples of its arguments.
        reference: The same function; None to leave the verdict to finite differences.
        name: The name of the twin; by default that of the class or function, in snake case.
        options: Those of `function_case` and `module_case`.
    """

    def declare(right: Judged) -> Judged:
        case = _case(right, samples, reference, options)
        DECLARED_TWINS.append(Twin(name or _snake(right), passed_by, case, right.__module__))
        return right

    return declare


def _case(judged: Any, samples: Samples, reference: Any, options: dict[str, Any]) -> Case:
    is_module = isinstance(judged, type) and issubclass(judged, nn.Module)
    return (module_case if is_module else function_case)(judged, samples, reference, **options)


def _snake(judged: Any) -> str:
    return re.sub("(?<!^)(?=[A-Z])", "_", judged.__name__).lower()
