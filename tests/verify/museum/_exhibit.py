"""The decorator that makes an exhibit of a wrong Function, module or call, and of the fixed one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from manual_bp.verify import Case, function_case, module_case

Wrong = TypeVar("Wrong", bound=Callable[..., Any])


@dataclass(frozen=True)
class Exhibit:
    """A wrong gradient that somebody published and reported.

    name: The name of the wrong class or function, in snake case.
    source: The report, as owner/repository#number, or the package, version and function.
    mistake: Its docstring, one sentence.
    wrong, fixed: The case with the mistake, and the case without it.
    diagnosis: A part of the first diagnosis that the kit must give; empty if it has none.
    room: The module in which it is declared.
    """

    name: str
    source: str
    mistake: str
    wrong: Case
    fixed: Case
    diagnosis: str
    room: str


DECLARED: list[Exhibit] = []


def exhibit(
    source: str,
    samples: Any,
    reference: Any = None,
    *,
    fixed: Callable[..., Any],
    diagnosis: str = "",
    **options: Any,
) -> Callable[[Wrong], Wrong]:
    """Declare that a class or function makes a published mistake, which its docstring tells.

    Args:
        source: The report, as owner/repository#number, or the package, version and function.
        samples: Samples of its arguments.
        reference: What is right.
        fixed: The same without the mistake.
        diagnosis: A part of the first diagnosis that the kit must give; empty if it has none.
        options: Those of `function_case` and `module_case`.
    """

    def declare(wrong: Wrong) -> Wrong:
        is_module = isinstance(wrong, type) and issubclass(wrong, nn.Module)
        make = module_case if is_module else function_case
        snake = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", wrong.__name__).lower()
        bad, good = (make(one, samples, reference, **options) for one in (wrong, fixed))
        mistake = " ".join((wrong.__doc__ or "").split())
        DECLARED.append(Exhibit(snake, source, mistake, bad, good, diagnosis, wrong.__module__))
        return wrong

    return declare
