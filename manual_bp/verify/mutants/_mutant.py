"""The decorator that makes a mutant of a wrong Function, module or call."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from manual_bp.verify._case import Case, Samples
from manual_bp.verify._make_case import function_case, module_case

Wrong = TypeVar("Wrong", bound=Callable[..., Any])


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


DECLARED: list[Mutant] = []


def mutant(
    caught_by: str, samples: Samples, reference: Any = None, *, name: str = "", **options: Any
) -> Callable[[Wrong], Wrong]:
    """Declare that a class or function makes a mistake, which its docstring describes.

    Args:
        caught_by: The check meant to catch it.
        samples: Samples of its arguments.
        reference: What is right; None to leave the verdict to finite differences.
        name: The name of the mutant; by default that of the class or function, in snake case.
        options: Those of `function_case` and `module_case`.
    """

    def declare(wrong: Wrong) -> Wrong:
        is_module = isinstance(wrong, type) and issubclass(wrong, nn.Module)
        case = (module_case if is_module else function_case)(wrong, samples, reference, **options)
        snake = re.sub("(?<!^)(?=[A-Z])", "_", wrong.__name__).lower()
        mistake = wrong.__doc__ or ""
        DECLARED.append(Mutant(name or snake, mistake, caught_by, case, wrong.__module__))
        return wrong

    return declare
