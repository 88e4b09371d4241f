"""docs/compatibility.md says what is tested, and nothing else."""

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.activations import TABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
CLIENTS = ROOT / "tests" / "compatibility" / "clients"
ACTIVATIONS = [activation.name for activation in TABLE]
COSTS = ["quadratic_cost", "sigmoid_cross_entropy_cost", "softmax_cross_entropy_cost"]
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "`test_" in line]


def collect() -> list[str]:
    """All tests, as file::name."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in found.stdout.splitlines() if "::" in line]
    assert len(names) > 1000, found.stdout[-2000:] + found.stderr[-2000:]
    return names


def out_of_reach(collected: list[str]) -> list[str]:
    """Tests of a client that is not installed, read from its file, which is skipped as a whole."""
    reached = {name.split("::")[0] for name in collected}
    files = [file.relative_to(ROOT).as_posix() for file in CLIENTS.glob("test_*.py")]
    return [
        f"{file}::{name}"
        for file in files
        if file not in reached
        for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    ]


def spelled_out(pattern: str) -> list[str]:
    """A cell, repeated for each layer that its A or C stands for."""
    for letter, names in (("A", ACTIVATIONS), ("C", COSTS)):
        if re.search(rf"(?<![A-Za-z]){letter}(?![A-Za-z])|test_{letter}\b", pattern):
            return [re.sub(rf"(?<![A-Za-z]){letter}(?![A-Za-z])", name, pattern) for name in names]
    return [pattern]


def cells_without_a_test(collected: list[str]) -> list[str]:
    unparametrised = out_of_reach(collected)
    missing = []
    for row in ROWS:
        for cell in re.findall(r"`((?:test_|[\w/]+\.py::)[^`]+)`", row):
            for pattern in spelled_out(cell):
                escaped = pattern.replace("[", "[[]")
                wanted = f"*{'/' if '::' in pattern else '::'}{escaped}"
                is_there = any(fnmatchcase(name, wanted) for name in collected)
                bare = wanted.split("[[]")[0]
                if not is_there and not any(fnmatchcase(name, bare) for name in unparametrised):
                    missing.append(pattern)
    return missing


def test_every_cell_names_an_existing_test(request: pytest.FixtureRequest) -> None:
    assert len(ROWS) > 50
    # Collecting takes many seconds, and a run of the whole suite has done it.
    of_this_run = [item.nodeid for item in request.session.items]
    assert not cells_without_a_test(of_this_run) or not cells_without_a_test(collect())


def test_every_row_has_all_columns() -> None:
    (head,) = re.findall(r"^\| \| Linear \|.*$", PAGE, flags=re.MULTILINE)
    table = PAGE.split(head)[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 35
    for row in table:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5
        assert all(cell == "–" or cell.startswith("`test_") for cell in cells[1:])
