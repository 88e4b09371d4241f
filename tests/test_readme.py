"""The README and what it leads to agree with the code."""

import re
import shlex
from pathlib import Path

import manual_bp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
NOTATION = (ROOT / "docs" / "notation.md").read_text("utf-8")
LAYERS = (ROOT / "docs" / "layers.md").read_text("utf-8")
BACKPROP = (ROOT / "manual_bp" / "backprop.py").read_text("utf-8")


def test_the_equations_are_the_lines_of_backprop() -> None:
    rows = re.findall(r"^\| (BP\d) \| .*? \| `(.*?)` \|", NOTATION, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["BP1", "BP2", "BP3", "BP4"]
    for name, line in rows:
        assert f"{line}  # {name}\n" in BACKPROP


def test_the_table_of_layers_and_costs_has_all_of_them_and_nothing_else() -> None:
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \| `(\w+)\(", LAYERS, flags=re.MULTILINE)
    functions = {name.removesuffix("Function") for name in manual_bp.__all__ if "Function" in name}
    assert {module for module, _ in rows} == functions
    for module, function in rows:
        assert {module, function} <= set(manual_bp.__all__)


def test_both_commands_install_with_the_constraints_and_then_run() -> None:
    commands = re.findall(r"^python -m pip install .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("-c") + 1] == "constraints.txt"
        assert "&&" in words
