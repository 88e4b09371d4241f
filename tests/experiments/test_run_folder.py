import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import manual_bp
from experiments import checkpoint, run_folder
from experiments.run_folder import RunFolder, can_be_made, run_path


def test_a_run_is_named_by_its_name_and_the_time() -> None:
    path = run_path(Path("runs"), "digits__64-30-10__seed0")
    assert re.fullmatch(r"runs/digits__64-30-10__seed0__\d{8}-\d{6}", path.as_posix())


@pytest.mark.parametrize("layers", [1, 20, 40, 1000])
def test_a_long_name_is_cut_in_the_middle(layers: int, tmp_path: Path) -> None:
    net = "-".join(["64", *["30"] * layers, "10"])
    config = {"net": net}
    name = f"breast_cancer__{net}__seed{2**63 - 1}"
    folders = [RunFolder(run_path(tmp_path, name), config).path for _ in range(2)]
    for folder in folders:
        assert len(folder.name) <= 130
        assert folder.name.startswith("breast_cancer__64-30-")
        assert re.search(r"-10__seed9223372036854775807__\d{8}-\d{6}(-2)?$", folder.name)
        assert json.loads((folder / "config.json").read_text("utf-8"))["config"] == config
    assert (net in folders[0].name) == (layers < 20)


def test_a_folder_with_too_long_a_name_cannot_be_made(tmp_path: Path) -> None:
    assert can_be_made(tmp_path / "a" / "b")
    assert not can_be_made(tmp_path / ("a" * 300))
    assert not can_be_made(tmp_path / ("a" * 300) / "b")


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run", {"seed": 3, "where": Path("runs")})
    description = json.loads((folder.path / "config.json").read_text("utf-8"))
    assert description["config"] == {"seed": 3, "where": "runs"}
    assert description["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert description["versions"]["manual_bp"] == manual_bp.__version__
    assert set(description) >= {"command", "started", "git", "machine"}


def test_the_commit_and_changes_since_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc", "status": " M file"}
    monkeypatch.setattr(run_folder, "_git_says", lambda verb, *_: answers[verb])
    assert run_folder._git() == {"commit": "abc", "modified": True}
    answers["status"] = ""
    assert run_folder._git() == {"commit": "abc", "modified": False}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_folder._git() == {"commit": None, "modified": None}


def test_rows_are_on_the_disk_at_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    for epoch in (1, 2):
        folder.add_metrics({"epoch": epoch, "cost": 1 / epoch})
        with (folder.path / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == epoch
        assert rows[-1] == {"epoch": str(epoch), "cost": str(1 / epoch)}


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    first, second, third = (RunFolder(tmp_path / "run", {"n": n}) for n in range(3))
    names = [folder.path.name for folder in (first, second, third)]
    assert names == ["run", "run-2", "run-3"]
    assert json.loads((first.path / "config.json").read_text("utf-8"))["config"] == {"n": 0}


def test_an_existing_empty_folder_is_left_alone(tmp_path: Path) -> None:
    for there in ("run", "run-2"):
        (tmp_path / there).mkdir()
    assert RunFolder(tmp_path / "run", {}).path.name == "run-3"
    assert not list((tmp_path / "run").iterdir())


def test_two_runs_that_start_at_once_get_separate_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run takes the name after it was found to be free."""
    exists = os.path.lexists

    def taken_now(path: Path) -> bool:
        was_there = exists(path)
        if not was_there and path.name == "run":
            monkeypatch.setattr(os.path, "lexists", exists)
            RunFolder(path, {"n": "other"})
        return was_there

    monkeypatch.setattr(os.path, "lexists", taken_now)
    found = RunFolder(tmp_path / "run", {"n": "ours"})
    assert found.path.name == "run-2"
    for name, n in (("run", "other"), ("run-2", "ours")):
        description = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert description["config"] == {"n": n}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_never_exists_without_its_description(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append([each.name for each in tmp_path.iterdir()])
        raise error

    monkeypatch.setattr(checkpoint, "write", fail)
    with pytest.raises(type(error)):
        RunFolder(tmp_path / "run", {})
    # If the program is killed, what remains has a hidden name.
    assert [name.startswith(".unfinished-") for (name,) in seen] == [True]
    assert not list(tmp_path.iterdir())


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    modes = [
        path.stat().st_mode for path in (tmp_path / "plain", RunFolder(tmp_path / "run", {}).path)
    ]
    assert modes[0] == modes[1]


def test_a_folder_inside_a_file_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunFolder(tmp_path / "file" / "run", {})


CSV = "epoch,step,cost\r\n1,15,0.5\r\n2,30,0.25\r\n"


@pytest.mark.parametrize(
    ("there", "step", "kept"),
    [
        (CSV, 31, CSV),
        (CSV, 30, CSV[:-11]),
        (CSV[:-3], 99, CSV[:-11]),  # the power went while the row was written
        (CSV, 15, None),
        (CSV[:9], 99, None),
        ("", 99, None),
        (None, 99, None),
    ],
)
def test_a_run_that_goes_on_keeps_the_whole_rows_from_before(
    there: str | None, step: int, kept: str | None, tmp_path: Path
) -> None:
    path = RunFolder(tmp_path / "run", {"epochs": 2}).path
    if there is not None:
        (path / "metrics.csv").write_bytes(there.encode())
    folder = RunFolder.reopened(path)
    assert folder.config == {"epochs": 2}
    folder.go_on({"epochs": 3}, step)
    assert (path / "metrics.csv").exists() == (kept is not None)
    if kept is not None:
        assert (path / "metrics.csv").read_bytes() == kept.encode()
    description = json.loads((path / "config.json").read_text("utf-8"))
    assert description["config"] == folder.config == {"epochs": 3}
    assert [again["step"] for again in description["resumed"]] == [step]


@pytest.mark.parametrize("there", ["a,b\n1,2\n", "epoch,step\n1,two\n", "epoch,step\n1\n"])
def test_a_table_of_another_kind_is_left_alone(there: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    (folder.path / "metrics.csv").write_text(there)
    before = (folder.path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
        folder.go_on({}, 1)
    assert (folder.path / "metrics.csv").read_text() == there
    assert (folder.path / "config.json").read_bytes() == before


def test_one_process_at_a_time_has_the_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    with folder.lock(), pytest.raises(BlockingIOError, match="another process is training in"):
        RunFolder.reopened(folder.path).lock()
    with RunFolder.reopened(folder.path).lock():
        pass


def test_a_folder_has_further_files_from_the_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {}, {"more": b"data"})
    assert (folder.path / "more").read_bytes() == b"data"
