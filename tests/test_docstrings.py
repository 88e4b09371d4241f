"""Every public class and function has an example, which runs, and a place in the reference."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manual_bp
from manual_bp import board, verify
from manual_bp.verify._global_state import restored

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PUBLIC: dict[str, Any] = {
    **{f"manual_bp.{name}": getattr(manual_bp, name) for name in manual_bp.__all__},
    **{f"manual_bp.verify.{name}": getattr(verify, name) for name in verify.__all__},
    "manual_bp.board.TraceBoard": board.TraceBoard,
}
# What the pages of the reference tell the reader to import.
IMPORTS = {
    "torch": torch,
    "nn": nn,
    **{name.rpartition(".")[2]: value for name, value in PUBLIC.items()},
}


def test_the_reference_has_every_public_name_and_no_other() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in REFERENCE.glob("*.md"))
    # A function that has the name of its module is asked for as a part of that.
    names = [f"{n}.{n.rpartition('.')[2]}" if n in sys.modules else n for n in PUBLIC]
    assert sorted(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE)) == sorted(names)


CALLABLE = [
    pytest.param(name, marks=[pytest.mark.compiles] if name.endswith("CompiledStep") else [])
    for name, value in PUBLIC.items()
    if callable(value)
]


@pytest.mark.parametrize("name", CALLABLE)
def test_an_example_runs_and_prints_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "manual_bp.board.TraceBoard" and not importlib.util.find_spec("tensorboard"):
        pytest.skip("needs TensorBoard")
    found = doctest.DocTestParser().get_doctest(
        PUBLIC[name].__doc__, dict(IMPORTS), name, None, None
    )
    assert found.examples, "no example"
    with restored():
        torch.manual_seed(0)
        result = doctest.DocTestRunner(verbose=False).run(found)
    assert not result.failed
