import csv
import json
import re
from pathlib import Path

import pytest
import torch

import manual_bp
from experiments import run_folder
from experiments.run_folder import RunFolder, run_path


def test_name_and_time() -> None:
    path = run_path(Path("runs"), "digits__64-30-10__seed0")
    assert re.fullmatch(r"runs/digits__64-30-10__seed0__\d{8}-\d{6}", path.as_posix())


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run", {"seed": 3, "where": Path("runs")})
    description = json.loads((folder.path / "config.json").read_text("utf-8"))
    assert description["config"] == {"seed": 3, "where": "runs"}
    assert description["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert description["versions"]["manual_bp"] == manual_bp.__version__
    assert set(description) >= {"command", "started", "git", "machine"}


def test_git_says_where_the_code_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc", "status": " M file"}
    monkeypatch.setattr(run_folder, "_git_says", lambda verb, *_: answers[verb])
    assert run_folder._git() == {"commit": "abc", "modified": True}
    answers["status"] = ""
    assert run_folder._git() == {"commit": "abc", "modified": False}


def test_outside_of_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_folder._git() == {"commit": None, "modified": None}


def test_rows_are_there_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    for epoch in (1, 2):
        folder.add_metrics({"epoch": epoch, "cost": 1 / epoch})
        with (folder.path / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == epoch
        assert rows[-1] == {"epoch": str(epoch), "cost": str(1 / epoch)}


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    first, second, third = (RunFolder(tmp_path / "run", {"n": n}) for n in range(3))
    names = [folder.path.name for folder in (first, second, third)]
    assert names == ["run", "run-2", "run-3"]
    assert json.loads((first.path / "config.json").read_text("utf-8"))["config"] == {"n": 0}


def test_a_place_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunFolder(tmp_path / "file" / "run", {})
