"""Options from a dataclass, through tyro; a refusal is one line and exit code 2."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import tyro

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str] | None, program: str) -> Config:
    """The options of a dataclass; its own ValueErrors are refusals as well.

    Raises:
        SystemExit: With 2, after one line on stderr, for an unknown or impossible value; with 0
            after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                args=arguments,
                prog=program,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        refuse(program, _reason(said.getvalue(), config))


def refuse(program: str, reason: object) -> NoReturn:
    """Say in one line what is wrong, and end with exit code 2."""
    print(f"{program}: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


def _reason(box: str, config: type) -> str:
    """What tyro says above the first rule in its box, without the box."""
    lines = [re.sub(r"^│|│$", "", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if not line.startswith(("╭", "╰"))]
    ends = [i for i, line in enumerate(lines) if line.startswith("──")]
    reason = " ".join(lines[: ends[0]] if ends else lines)
    return reason.removeprefix(f"Error parsing {config.__name__}: ")
