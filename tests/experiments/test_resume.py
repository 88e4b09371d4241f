"""A run that is stopped goes on as if it had not been, and what stops it is said in one line."""

import csv
import itertools
import os
import re
import resource
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint, command_line
from experiments.board import Board
from experiments.data import load
from experiments.run_folder import RunFolder
from experiments.train import main
from experiments.training import Config, Training
from tests.experiments.runs import QUICK, TOTAL, curves_in, left_by, only
from tests.helpers import logged_in, refusal

METHODS = ["autograd", "explicit", "step"]


class PowerCutError(Exception):
    """What ends a run without a last checkpoint."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What an uninterrupted run with some more options leaves."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*options: str) -> dict[str, Any]:
        if options not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert main([*QUICK, *options, "--run-folder", str(folder)]) == 0
            found[options] = left_by(only(folder))
        return found[options]

    return run


def let_happen(patch: pytest.MonkeyPatch, number: int, event: Callable[[], None]) -> None:
    """Let something happen before the update of a number, counted from 1, once."""
    update = Training._update

    def patched(training: Training, *arguments: Any) -> Any:
        if training.updates + 1 == number:
            patch.setattr(Training, "_update", update)
            event()
        return update(training, *arguments)

    patch.setattr(Training, "_update", patched)


@pytest.fixture
def before_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    return partial(let_happen, monkeypatch)


def cut() -> None:
    raise PowerCutError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def _stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        let_happen(patch, 20, interrupt)
        assert main([*QUICK, "--run-folder", str(folder)]) == 130
    return only(folder)


@pytest.fixture
def stopped(tmp_path: Path, _stopped_once: Path) -> Path:
    """A run that was stopped after update 20 of 45."""
    return shutil.copytree(_stopped_once, tmp_path / "runs" / _stopped_once.name)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_by_signals_ends_with_the_same_bits(
    method: str,
    tmp_path: Path,
    whole: Callable[..., dict[str, Any]],
    before_update: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped within an epoch and at the end of one; started again as the printed line says."""
    command = [*QUICK, "--method", method, "--run-folder", str(tmp_path)]
    for number, event, word, code in (
        (10, interrupt, "interrupted", 130),
        (30, terminate, "terminated", 143),
    ):
        before_update(number, event)
        assert main(command) == code
        run = only(tmp_path)
        said = capsys.readouterr().err
        start = f"{word}; update {number} of {TOTAL} is saved; to go on: python"
        assert said.startswith(start)
        assert said.count("\n") == 1
        program, _, module, *command = shlex.split(said.partition("to go on: ")[2])
        assert (program[:6], module, command) == (
            "python",
            "experiments.train",
            ["--resume", str(run)],
        )
    assert main(command) == 0
    assert f"going on after update 30 of {TOTAL}\n" in capsys.readouterr().out
    assert left_by(run) == whole("--method", method)


@pytest.mark.parametrize("numbers", [(1,), (9,), (16, 17), (45,)])
def test_a_run_whose_power_was_cut_ends_with_the_same_bits(
    numbers: tuple[int, ...],
    tmp_path: Path,
    whole: Callable[..., dict[str, Any]],
    before_update: Callable[..., None],
) -> None:
    """Before the first checkpoint; after points were logged that the last one does not have."""
    command = [*QUICK, "--run-folder", str(tmp_path), "--checkpoint-every", "7"]
    for number in numbers:
        before_update(number, cut)
        with pytest.raises(PowerCutError):
            main(command)
        run = only(tmp_path)
        done = checkpoint.read(run / "last.pt")["training"]["updates"]
        assert done == 7 * ((number - 1) // 7)
        command = ["--resume", str(run)]
    assert main(command) == 0
    assert left_by(run) == whole()


def test_a_run_cut_off_anywhere_in_a_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, whole: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each of the calls that put files on the disk, one after the other."""
    calls = itertools.count()
    limit = 12

    def count(kept: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if next(calls) == limit:
                raise PowerCutError
            return kept(*arguments)

        return counted

    monkeypatch.setattr(os, "fsync", count(os.fsync))
    monkeypatch.setattr(Path, "replace", count(Path.replace))
    command = [*QUICK, "--run-folder", str(tmp_path), "--checkpoint-every", "11"]
    cuts = 0
    while True:
        calls = itertools.count()
        try:
            assert main(command) == 0
            break
        except PowerCutError:
            cuts += 1
            limit += 5
        run = only(tmp_path)
        checkpoint.read(run / "last.pt")
        assert not list(run.glob(".*.unfinished"))
        command = ["--resume", str(run)]
    assert cuts >= 3
    assert left_by(run) == whole()


def test_a_finished_run_can_be_trained_further(
    tmp_path: Path, whole: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--epochs", "1", "--run-folder", str(tmp_path)]) == 0
    run = only(tmp_path)
    once = left_by(run)
    assert main(["--resume", str(run)]) == 0
    assert left_by(run) == once
    assert main(["--resume", str(run), "--epochs", "3"]) == 0
    assert left_by(run) == whole()
    said = refusal(main, ["--resume", str(run), "--epochs", "2"], capsys)
    assert said.endswith(f"--epochs must be at least 3 in {run}; got 2\n")
    assert left_by(run) == whole()


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


@pytest.mark.parametrize(
    ("option", "before", "now"),
    [
        ("--learning-rate", "3.0", "1.0"),
        ("--seed", "0", "1"),
        ("--hidden", "(8,)", "9"),
        ("--method", "autograd", "step"),
        ("--dataset", "digits", "wine"),
        ("--batch-size", "100", "10"),  # 10 is the default of a new run
        ("--run-folder", "{}", "elsewhere"),
    ],
)
def test_a_contradicting_option_is_refused_with_both_values(
    option: str, before: str, now: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.read_bytes() for path in stopped.iterdir()}
    said = refusal(main, ["--resume", str(stopped), option, now], capsys)
    got = "(9,)" if option == "--hidden" else now
    parent = before.format(stopped.parent)
    assert said == f"python -m experiments.train: {option} is {parent} in {stopped}; got {got}\n"
    assert {path: path.read_bytes() for path in stopped.iterdir()} == files


def test_options_that_agree_or_are_free_can_be_given_again(
    stopped: Path, whole: Callable[..., dict[str, Any]], before_update: Callable[..., None]
) -> None:
    """They hold from there on, even if the power is cut before the next update."""
    moved = stopped.rename(stopped.with_name("moved"))
    options = ["--batch-size", "100", "--device", "cpu", "--checkpoint-every", "5"]
    before_update(21, cut)
    with pytest.raises(PowerCutError):
        main(["--resume", str(moved), *options, "--on-nan", "continue"])
    assert main(["--resume", str(moved)]) == 0
    assert left_by(moved) == whole()
    config = RunFolder.reopened(moved).config
    assert (config["on_nan"], config["checkpoint_every"]) == ("continue", 5)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_another_format(path: Path) -> None:
    torch.save({"format": 0, "versions": {"manual_bp": "0.0"}}, path)


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (damaged, "last.pt", "/last.pt is damaged"),
        (of_another_format, "last.pt", "/last.pt has format 0, of manual_bp 0.0; "),
        (Path.unlink, "last.pt", "--resume must be the folder of a run, with a file last.pt; got"),
        (damaged, "config.json", "/config.json is damaged"),
        (Path.unlink, "config.json", "No such file or directory"),
    ],
)
def test_a_spoiled_run_is_refused_in_one_line_and_left_alone(
    spoil: Callable[[Path], None],
    name: str,
    reason: str,
    stopped: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(stopped / name)
    files = {path: path.read_bytes() for path in stopped.iterdir()}
    said = refusal(main, ["--resume", str(stopped)], capsys)
    assert reason in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in stopped.iterdir()} == files


def test_a_run_with_a_damaged_checkpoint_can_go_on_from_the_best(
    stopped: Path, whole: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(stopped / "last.pt")
    said = refusal(main, ["--resume", str(stopped)], capsys)
    copy = f"cp {stopped}/best.pt {stopped}/last.pt"
    assert f"; best.pt is whole: to go on after its update 15, first {copy}\n" in said
    (stopped / "last.pt").write_bytes((stopped / "best.pt").read_bytes())
    assert main(["--resume", str(stopped)]) == 0
    assert left_by(stopped) == whole()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--resume", "nowhere"], "--resume must be the folder of a run, with a file last.pt"),
        (["--resume", "/dev/null"], "--resume must be the folder of a run, with a file last.pt"),
        (["--resume", "a" * 300], "--resume must be the folder of a run, with a file last.pt"),
        (["--resume", ""], "--resume must not be empty"),
        (["--resume"], "Missing value for argument '--resume"),
    ],
)
def test_what_is_not_a_run_is_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(main, options, capsys)
    assert reason in said
    assert said.count("\n") == 1


def test_a_dry_run_does_not_go_on(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(main, ["--resume", str(stopped), "--dry-run"], capsys)
    assert "--dry-run trains a new network; it does not go with --resume" in said


def test_a_run_in_use_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder.reopened(stopped).lock():
        said = refusal(main, ["--resume", str(stopped)], capsys)
    assert said.endswith(f": another process is training in {stopped}\n")


def test_a_run_is_locked_while_it_trains(
    tmp_path: Path, before_update: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def go_on_too() -> None:
        said.append(refusal(main, ["--resume", str(only(tmp_path))], capsys))

    before_update(3, go_on_too)
    assert main([*QUICK, "--epochs", "1", "--run-folder", str(tmp_path)]) == 0
    assert "another process is training in" in said[0]


@pytest.fixture
def _as_nobody(stopped: Path) -> Iterator[None]:
    """As a user who can read all, but not write to the folder; root could."""
    stopped.chmod(0o555)
    is_root = os.geteuid() == 0
    parents = [p for p in stopped.parents if p.stat().st_mode & 0o005 != 0o005] if is_root else []
    modes = [parent.stat().st_mode for parent in parents]
    for parent in parents:
        parent.chmod(0o755)
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)
    for parent, mode in zip(parents, modes, strict=True):
        parent.chmod(mode)
    stopped.chmod(0o755)


@pytest.mark.usefixtures("_as_nobody")
def test_a_read_only_run_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (stopped / "config.json").read_bytes()
    said = refusal(main, ["--resume", str(stopped)], capsys)
    assert "--resume must be a folder that a run can go on in: " in said
    assert "Permission denied" in said
    assert said.count("\n") == 1
    assert (stopped / "config.json").read_bytes() == before


@pytest.mark.parametrize("room", [10_000, 60_000, 120_000])
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
        size = sum(path.stat().st_size for path in run[0].glob("events*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))

    before_update(2, fill)
    options = [*QUICK, "--checkpoint-every", "4", "--run-folder", str(tmp_path)]
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
    assert left_by(run[0]) == whole()


@pytest.mark.parametrize("method", ["autograd", "step"])  # they find out in different places
def test_a_cost_that_is_no_number_is_traced_to_its_update_and_layer(
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight of one layer breaks in update 23: the cost is nan in update 24."""
    update = Training._update

    def breaks(training: Training, *arguments: Any) -> Any:
        cost = update(training, *arguments)
        if training.updates + 1 == 23:
            with torch.no_grad():
                list(training.net.parameters())[2][1, 3] = torch.nan  # w of layer 2
        return cost

    monkeypatch.setattr(Training, "_update", breaks)
    options = [*QUICK, "--method", method, "--checkpoint-every", "1"]
    assert main([*options, "--run-folder", str(tmp_path)]) == 1
    run = only(tmp_path)
    assert capsys.readouterr().err == (
        "stopped: the cost is nan; it began with update 23, which made weights of layer 2 infinite "
        f"or nan; {run}/last.pt is from before that, after update 22; a smaller learning rate may "
        "help\n"
    )
    good = checkpoint.read(run / "last.pt")["training"]["net"]
    assert all(w.isfinite().all() for w in good.values())
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("2,24,nan,")

    monkeypatch.setattr(Training, "_update", update)
    assert main(["--resume", str(run)]) == 0


def test_on_nan_continue_goes_on_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cost", "softmax-cross-entropy", "--learning-rate", "1e38", "--on-nan", "continue"]
    assert main([*QUICK, *options, "--run-folder", str(tmp_path)]) == 1
    begins, ends = capsys.readouterr().err.splitlines()
    assert begins.startswith("warning: the cost is ")
    assert begins.endswith("; going on, as --on-nan says")
    assert re.fullmatch("warning: the cost is (inf|nan); a smaller learning rate may help", ends)
    assert len((only(tmp_path) / "metrics.csv").read_text("utf-8").splitlines()) == 4


@pytest.fixture
def _not_deterministic_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_not_deterministic_afterwards")
def test_a_deterministic_run_goes_on_with_its_number_of_threads(
    tmp_path: Path,
    before_update: Callable[..., None],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*QUICK, "--deterministic", "--device", str(device), "--run-folder", str(tmp_path)]
    before_update(20, interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        assert main(options) == 130
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for flag in ([], ["--deterministic"]):
        assert main([*flag, "--resume", str(only(tmp_path))]) == 0
        assert torch.are_deterministic_algorithms_enabled()
    assert threads[0] == 3


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


def test_curves_stay_in_order_when_the_clock_was_set_back(
    stopped: Path, whole: Callable[..., dict[str, Any]]
) -> None:
    """TensorBoard reads files in the order of the times in their names."""
    (events,) = stopped.glob("events*")
    events.rename(stopped / "events.out.tfevents.9999999999.host.1.0")
    assert main(["--resume", str(stopped)]) == 0
    assert left_by(stopped) == whole()


def test_curves_that_were_deleted_are_missed_but_the_run_goes_on(
    stopped: Path, whole: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (events,) = stopped.glob("events*")
    events.unlink()
    assert main(["--resume", str(stopped)]) == 0
    assert "warning: files of TensorBoard are missing; its" in capsys.readouterr().err
    points = curves_in(stopped)["scalar cost/test"]
    assert points == whole()["scalar cost/test"][2:]


def test_another_version_of_pytorch_is_mentioned(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {**checkpoint.versions(), "torch": "9.9"}
    was = checkpoint.versions()["torch"]
    monkeypatch.setattr(checkpoint, "versions", lambda: now)
    assert main(["--resume", str(stopped)]) == 0
    said = capsys.readouterr().err
    assert said.endswith(f"warning: the last digits may change: torch {was} before, 9.9 now\n")


def test_a_board_that_goes_on_writes_no_second_layout(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.log_metrics({"test_cost": 1.0}, 0)
    with Board(tmp_path, 1, {0: {"0": 1.0}}) as board:
        board.log_metrics({"test_cost": 0.5}, 1)
        assert board.traces.history == {0: {"0": 1.0}}
    curves = curves_in(tmp_path)
    assert curves["scalar cost/test"] == [(0, 1.0), (1, 0.5)]
    assert len(curves["tensor custom_scalars__config__"]) == 1


def test_a_reader_that_watches_the_run_sees_every_point_once(
    tmp_path: Path, whole: Callable[..., dict[str, Any]], before_update: Callable[..., None]
) -> None:
    """It has read points from after the last checkpoint before the run goes on."""
    before_update(40, cut)
    with pytest.raises(PowerCutError):
        main([*QUICK, "--checkpoint-every", "26", "--run-folder", str(tmp_path)])
    run = only(tmp_path)
    watched = logged_in(run)
    assert [point.step for point in watched.Scalars("delta/0")] == list(range(0, 40, 4))
    time.sleep(1.01 - time.time() % 1)  # a process would take longer to start
    assert main(["--resume", str(run)]) == 0
    watched.Reload()
    for tag in ("delta/0", "delta/2", "cost/test", "accuracy/train"):
        points = [(point.step, point.value) for point in watched.Scalars(tag)]
        assert points == whole()[f"scalar {tag}"]
