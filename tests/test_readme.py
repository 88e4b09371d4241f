"""What the README says of the code is so."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import manual_bp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BACKPROP = (ROOT / "manual_bp" / "backprop.py").read_text("utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": nn.Sequential(nn.Linear(64, 10), nn.ReLU())}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert len(names["report"].changed) == 2
    assert type(names["model"][0]) is nn.Linear
    assert names["norms"].shape == (5,)
    assert names["value"] < names["trace"].cost
    assert (tmp_path / "step.pt2").exists()


def test_the_equations_are_the_lines_of_backprop() -> None:
    rows = re.findall(r"^\| (BP\d) \| .*? \| `(.*?)` \|", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["BP1", "BP2", "BP3", "BP4"]
    for name, line in rows:
        assert f"{line}  # {name}\n" in BACKPROP


def test_the_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_there_and_documented() -> None:
    for name in manual_bp.__all__:
        assert getattr(manual_bp, name).__doc__, name
    for name in re.findall(r"`([A-Z]\w+|\w+_cost)\(", README):
        assert name in manual_bp.__all__


def test_the_two_commands_install_what_they_need_and_then_run() -> None:
    commands = re.findall(r"^python -m pip install .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("-c") + 1] == "constraints.txt"
        assert "&&" in words
