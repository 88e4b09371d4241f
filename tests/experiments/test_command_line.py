import io
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from experiments.command_line import parse, refuse


@dataclass(frozen=True)
class Options:
    """What the test runs."""

    kind: Literal["plain", "fancy"] = "plain"
    """Which kind."""
    count: int = 3
    """How many."""
    loud: bool = False
    """Whether to shout."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1; got {self.count}")


def test_options() -> None:
    assert parse(Options, [], "prog") == Options()
    arguments = ["--kind", "fancy", "--count", "5", "--loud"]
    assert parse(Options, arguments, "prog") == Options("fancy", 5, True)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "prog")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("What the test runs", "Which kind", "How many", "shout"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "many"], "Error parsing --count: invalid literal for int()"),
        (["--count", "0"], "prog: --count must be at least 1; got 0"),
        (["--count"], "Missing value for argument '--count'"),
        (["--kind", "odd"], "invalid choice 'odd' for argument '--kind'. Expected one of ('plain'"),
        (["--colour", "red"], "Unrecognized options: --colour"),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    arguments: list[str],
    reason: str,
    encoding: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as stop:
        parse(Options, arguments, "prog")
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("prog: ")
    assert reason in said.err


def test_a_reason_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse("prog", "first\n   second")
    assert capsys.readouterr().err == "prog: first second\n"
