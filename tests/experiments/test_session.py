"""What stops a run, what is said about it, and what is kept."""

import csv
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint, command_line
from experiments.data import load
from experiments.train import main
from experiments.training import Config, Training
from tests.experiments.runs import IMAGES, QUICK, TOTAL, interrupt, left_by, only
from tests.helpers import refusal

pytestmark = pytest.mark.usefixtures("without_charts")


def test_a_second_signal_stops_at_once(
    tmp_path: Path, before_update: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        interrupt()
        interrupt()
        pytest.fail("was not stopped")

    before_update(20, twice)
    options = [*QUICK, "--checkpoint-every", "6", "--run-folder", str(tmp_path)]
    assert main(options) == 130
    assert "interrupted; update 18 of 45 is saved; to go on: " in capsys.readouterr().err


def test_a_run_is_locked_while_it_trains(
    tmp_path: Path, before_update: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def go_on_too() -> None:
        said.append(refusal(main, ["--resume", str(only(tmp_path))], capsys))

    before_update(3, go_on_too)
    assert main([*QUICK, "--epochs", "1", "--run-folder", str(tmp_path)]) == 0
    assert "another process is training in" in said[0]


@pytest.mark.parametrize("room", [10_000, 30_000, 60_000])
def test_a_full_disk_ends_a_run_in_one_line_and_it_can_go_on(
    room: int,
    tmp_path: Path,
    whole: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    before_update: Callable[..., None],
) -> None:
    """While the thread of TensorBoard writes: its file is the first to reach the limit."""
    monkeypatch.setattr(threading, "excepthook", command_line._in_a_thread)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run: list[Path] = []

    def fill() -> None:
        run.append(only(tmp_path))
        size = max(path.stat().st_size for path in run[0].rglob("events*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))

    before_update(2, fill)
    options = [*IMAGES, "--checkpoint-every", "4", "--run-folder", str(tmp_path)]
    try:
        assert main(options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    saved = checkpoint.read(run[0] / "last.pt")["training"]["updates"]
    assert said.startswith("stopped: [Errno 27] File too large")
    assert f"; update {saved} of {TOTAL} is saved; to go on: python" in said
    assert said.count("\n") == 1
    assert main(["--resume", str(run[0])]) == 0
    assert left_by(run[0]) == whole(*IMAGES)


def break_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a weight of layer 2 break in update 23, so that the cost is nan in update 24."""
    update = Training._update

    def breaks(training: Training, *arguments: Any) -> Any:
        cost = update(training, *arguments)
        if training.updates + 1 == 23:
            with torch.no_grad():
                list(training.net.parameters())[2][1, 3] = torch.nan  # w of layer 2
        return cost

    monkeypatch.setattr(Training, "_update", breaks)


@pytest.mark.parametrize("method", ["autograd", "step"])  # they find out in different places
def test_a_cost_that_is_no_number_is_traced_to_its_update_and_layer(
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_a_weight(monkeypatch)
    options = [*QUICK, "--method", method, "--checkpoint-every", "1"]
    assert main([*options, "--run-folder", str(tmp_path)]) == 1
    run = only(tmp_path)
    assert capsys.readouterr().err == (
        "stopped: the cost is nan; it began with update 23, which made weights of layer 2 (8→3 "
        f"sigmoid) infinite or nan; {run}/last.pt is from before that, after update 22; a smaller "
        "learning rate may help\n"
    )
    good = checkpoint.read(run / "last.pt")["training"]["net"]
    assert all(w.isfinite().all() for w in good.values())
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("2,24,nan,")

    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("every", "symptom"),
    [
        (1, "weights are not finite after update 23"),
        (5, "the cost is nan at update 24"),
        (1000, "the cost is nan at update 24"),
    ],
)
def test_on_nan_continue_goes_on_and_says_once_where_it_began(
    every: int,
    symptom: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_a_weight(monkeypatch)
    options = [*QUICK, "--on-nan", "continue", "--checkpoint-every", str(every)]
    assert main([*options, "--run-folder", str(tmp_path)]) == 1
    began = "it began with update 23, which made weights of layer 2 (8→3 sigmoid) infinite or nan"
    assert capsys.readouterr().err == (
        f"warning: {symptom}; {began}; going on, as --on-nan says\n"
        f"warning: the cost is nan; {began}; a smaller learning rate may help\n"
    )
    run = only(tmp_path)
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("3,45,nan,")

    assert main(["--resume", str(run), "--epochs", "4"]) == 1
    assert capsys.readouterr().err.startswith(
        "warning: weights are not finite after update 45; it began before update 46, in an "
        "earlier session; going on"
    )


@pytest.mark.parametrize("number", [20, 30])
def test_to_look_for_the_origin_changes_nothing(
    number: int,
    tmp_path: Path,
    whole: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within an epoch and at the end of one: a cost is nan once, and everything else is right."""
    update, costs = Training._update, []

    def lies(training: Training, *arguments: Any) -> Any:
        costs.append(update(training, *arguments))
        is_the_one = training.updates + 1 == number and len(costs) == number
        return costs[-1] * torch.nan if is_the_one else costs[-1]

    monkeypatch.setattr(Training, "_update", lies)
    options = [*QUICK, "--on-nan", "continue", "--checkpoint-every", "7"]
    assert main([*options, "--run-folder", str(tmp_path)]) == 0
    assert "; it did not happen again when the updates were repeated; g" in capsys.readouterr().err
    assert len(costs) > TOTAL
    assert left_by(only(tmp_path)) == whole()


def test_the_best_checkpoint_is_of_the_first_epoch_with_the_best_accuracy(tmp_path: Path) -> None:
    options = ["--dataset", "iris", "--epochs", "8", "--run-folder", str(tmp_path)]
    assert main(options) == 0
    with (only(tmp_path) / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    accuracies = [float(row["test_accuracy"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert best < 7
    state = checkpoint.read(only(tmp_path) / "best.pt")
    assert state["training"]["updates"] == int(rows[best]["step"])
    training = Training(Config(**state["config"] | {"run_folder": tmp_path}), load("iris"))
    training.load_state_dict(state["training"])
    assert training.metrics()["test_accuracy"] == accuracies[best]
