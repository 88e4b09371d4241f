"""What all experiments on the claims have in common."""

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark import measure as measuring
from experiments.findings import Options, middle, require_range
from tests.helpers import logged_below

QUICK = {
    "backward_cost": "--widths 8 --layers 2 --samples 4 --rounds 1 --budget 0",
    "batch_or_loop": "--samples 2 --hidden 2 --rounds 1 --budget 0",
    "gradient_check": "--halvings 2 --samples 2",
    "slow_learning": "--epochs 3",
    "small_activations": "--hidden 2 --batch-size 500",
    "vanishing": "--layers 2 3 --width 4 --samples 8",
}
WRONG = {
    "backward_cost": ("--widths 0", "--widths must be from 1 to 2048; got (0,)"),
    "batch_or_loop": ("--samples", "--samples must be from 1 to 10000; got ()"),
    "gradient_check": ("--excess nan", "--excess must be from 1e-15 to 1; got nan"),
    "slow_learning": ("--weight 200", "--weight must be from -15 to 15; got 200.0"),
    "small_activations": ("--dim 1", "--dim must be from 0 to 0.99; got 1.0"),
    "vanishing": ("--layers 1 2", "--layers must be from 2 to 200; got (1, 2)"),
}
PNG = b"\x89PNG\r\n\x1a\n"


def main_of(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}").main


@pytest.mark.parametrize("name", QUICK)
def test_an_experiment_leaves_its_numbers_curves_and_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "PAUSE", 0)
    monkeypatch.setattr(measuring, "TURN", 0.001)
    assert main_of(name)([*QUICK[name].split(), "--run-folder", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{name}__")
    assert json.loads((folder / "config.json").read_text("utf-8"))["config"]
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1
    assert all(None not in row and None not in row.values() for row in rows)
    assert any(log.Tags()["scalars"] for log in logged_below(folder).values())
    picture = folder / f"{name}.png"
    assert picture.read_bytes().startswith(PNG)
    assert picture.stat().st_size < 150_000
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *conclusion, where, how = printed.out.splitlines()
    assert first == f"run folder: {folder}"
    assert len(conclusion) > 1
    assert where == f"picture:    {picture}"
    assert how == f"to see it:  tensorboard --logdir {folder}"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_gives_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = WRONG[name]
    with pytest.raises(SystemExit) as stop:
        main_of(name)([*options.split(), "--run-folder", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"python -m experiments.{name}: {reason}\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main_of("slow_learning")(["--run-folder", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "--run-folder must be a place to write to; got" in capsys.readouterr().err


def test_the_range_includes_its_ends() -> None:
    options: Any = Options()
    object.__setattr__(options, "sizes", (1, 5))
    require_range(options, 1, 5, "sizes")
    with pytest.raises(ValueError, match=r"--sizes must be from 2 to 5; got \(1, 5\)"):
        require_range(options, 2, 5, "sizes")
    with pytest.raises(ValueError, match=r"--sizes must be from 1 to 4; got \(1, 5\)"):
        require_range(options, 1, 4, "sizes")


def test_the_middle_is_that_of_the_sizes_in_order() -> None:
    assert [middle(sizes) for sizes in ((7,), (9, 1), (9, 1, 5))] == [7, 9, 5]
