"""Options from a dataclass, through tyro; a refusal is one line and exit code 2."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
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


def require_counts(config: object, *names: str) -> None:
    """Refuse options that are below 1.

    Raises:
        ValueError: One is; this and the next two are for a dataclass's `__post_init__`.
    """
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def require_sizes(sizes: Sequence[int]) -> None:
    """Refuse hidden layers without neurons."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"--hidden must be sizes of at least 1; got {sizes}")


def require_seed(seed: int) -> None:
    """Refuse a seed that PyTorch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1; got {seed}")


def refuse(program: str, reason: object) -> NoReturn:
    """Say in one line what is wrong, and end with exit code 2."""
    print(f"{program}: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program as a command: an end from outside is an end without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal can write
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + 2  # as a shell reports the signal SIGINT
    except BrokenPipeError:
        # Python flushes stdout once more at the end, which must find somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13  # as a shell reports the signal SIGPIPE
    sys.exit(code)


def _reason(box: str, config: type) -> str:
    """What tyro says in its box: the first paragraph below the title.

    Where it may draw, the title stands in the border; where it may not, above a rule.
    """
    has_border = box.lstrip().startswith("╭")
    text = "\n".join(line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰")
    paragraphs = re.split(r"^[─-]{2,}$", text, flags=re.MULTILINE)
    words = " ".join(paragraphs[0 if has_border or len(paragraphs) == 1 else 1].split())
    reason = re.sub(r" ([.,])", r"\1", words)  # a line that was broken before a full stop
    return reason.removeprefix(f"Error parsing {config.__name__}: ")
