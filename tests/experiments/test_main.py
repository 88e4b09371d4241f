import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import PROGRAM, experiments, main

ROOT = Path(__file__).parents[2]


def test_every_module_that_runs_as_an_experiment_is_listed() -> None:
    """Each has a PROGRAM, which its docstring must repeat."""
    programs = {
        path: f"{PROGRAM}.{path.parent.name if path.stem == '__main__' else path.stem}"
        for path in (ROOT / "experiments").rglob("*.py")
        if "\nPROGRAM = " in path.read_text("utf-8")
    }
    del programs[ROOT / "experiments" / "__main__.py"]
    assert set(experiments()) == set(programs.values())


def test_the_list_has_one_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(experiments())
    for line in lines:
        command, _, text = line.partition("  ")
        module = importlib.import_module(command.split()[-1])
        assert module.__doc__ is not None
        assert text.strip() == module.__doc__.splitlines()[0]


def test_the_list_does_without_pytorch() -> None:
    code = (
        "import sys; from experiments.__main__ import main; main([]); print('torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "False"


def test_an_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["vanishing"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"{PROGRAM}: Unrecognized options: vanishing\n"
