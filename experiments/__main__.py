"""The list of all experiments, which their own docstrings make."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command_line import parse, run

PROGRAM = "python -m experiments"


@dataclass(frozen=True)
class Config:
    """List all experiments, with the command that runs each. Each command explains its --help."""


def experiments() -> dict[str, str]:
    """The first line of the docstring of every experiment, by the command that the docstring gives.

    The files are parsed, not imported: PyTorch alone takes a second.
    """
    here = Path(__file__).parent
    found: dict[str, str] = {}
    for path in sorted([*here.glob("*.py"), *here.glob("*/__init__.py")]):
        name = path.parent.name if path.stem == "__init__" else path.stem
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if re.search(rf"^    {re.escape(PROGRAM)}\.{name}\b", text, re.MULTILINE):
            found[f"{PROGRAM}.{name}"] = text.splitlines()[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the list; return the exit code."""
    parse(Config, arguments, PROGRAM)
    found = experiments()
    width = max(map(len, found))
    for command, line in found.items():
        print(f"{command:{width}}  {line}")
    return 0


if __name__ == "__main__":
    run(main)
