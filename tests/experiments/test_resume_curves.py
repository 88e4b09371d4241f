"""The curves of a run that goes on have every point once, in order."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.board import Board
from experiments.train import main
from tests.experiments.runs import QUICK, PowerCutError, curves_in, cut, left_by, only
from tests.helpers import logged_below

pytestmark = pytest.mark.usefixtures("without_charts")


def test_curves_stay_in_order_when_the_clock_was_set_back(
    stopped: Path, whole: Callable[..., dict[str, Any]]
) -> None:
    """TensorBoard reads files in the order of the times in their names."""
    for events in stopped.rglob("events*"):
        events.rename(events.with_name("events.out.tfevents.9999999999.host.1.0"))
    assert main(["--resume", str(stopped)]) == 0
    assert left_by(stopped) == whole()


def test_curves_that_were_deleted_are_missed_but_the_run_goes_on(
    stopped: Path, whole: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (events,) = stopped.glob("test/events*")
    events.unlink()
    assert main(["--resume", str(stopped)]) == 0
    assert "warning: files of TensorBoard are missing; its" in capsys.readouterr().err
    points = curves_in(stopped)["test: 1. learning/cost"]
    assert points == whole()["test: 1. learning/cost"][2:]


def test_a_board_that_goes_on_does_not_say_twice_how_to_read_it(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.log_metrics({"test_cost": 1.0}, 0)
    with Board(tmp_path, 1, {0: {"0": 1.0}}) as board:
        board.log_metrics({"test_cost": 0.5}, 1)
        assert board.traces.history == {0: {"0": 1.0}}
    curves = curves_in(tmp_path)
    assert curves["test: 1. learning/cost"] == [(0, 1.0), (1, 0.5)]
    assert len(curves[".: how to read this run/text_summary"]) == 1


def test_a_reader_that_watches_the_run_sees_every_point_once(
    tmp_path: Path, whole: Callable[..., dict[str, Any]], before_update: Callable[..., None]
) -> None:
    """It has read points from after the last checkpoint before the run goes on."""
    before_update(40, cut)
    with pytest.raises(PowerCutError):
        main([*QUICK, "--checkpoint-every", "26", "--run-folder", str(tmp_path)])
    run = only(tmp_path)
    watched = logged_below(run)
    error = "2. layers/log₁₀ ‖δ‖"
    (layer,) = (name for name in watched if name.startswith("1 "))
    assert [point.step for point in watched[layer].Scalars(error)] == list(range(0, 40, 4))
    time.sleep(1.01 - time.time() % 1)  # a process would take longer to start
    assert main(["--resume", str(run)]) == 0
    for folder, tag in ((layer, error), ("test", "1. learning/cost")):
        watched[folder].Reload()
        points = [(point.step, point.value) for point in watched[folder].Scalars(tag)]
        assert points == whole()[f"{folder}: {tag}"]
