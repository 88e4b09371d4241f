"""The README agrees with the code."""

import re
import shlex
from pathlib import Path

import manual_bp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BACKPROP = (ROOT / "manual_bp" / "backprop.py").read_text("utf-8")


def test_the_equations_are_the_lines_of_backprop() -> None:
    rows = re.findall(r"^\| (BP\d) \| .*? \| `(.*?)` \|", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["BP1", "BP2", "BP3", "BP4"]
    for name, line in rows:
        assert f"{line}  # {name}\n" in BACKPROP


def test_every_public_name_is_documented_and_every_name_in_the_readme_is_public() -> None:
    for name in manual_bp.__all__:
        assert getattr(manual_bp, name).__doc__, name
    for name in re.findall(r"`([A-Z]\w+|\w+_cost)\(", README):
        assert name in manual_bp.__all__


def test_both_commands_install_with_the_constraints_and_then_run() -> None:
    commands = re.findall(r"^python -m pip install .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("-c") + 1] == "constraints.txt"
        assert "&&" in words
