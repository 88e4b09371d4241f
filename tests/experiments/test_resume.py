"""A run that is stopped goes on as if it had not been."""

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint
from experiments.run_folder import RunFolder
from experiments.train import main
from tests.experiments.runs import (
    IMAGES,
    QUICK,
    TOTAL,
    PowerCutError,
    cut,
    damaged,
    hang_up,
    interrupt,
    left_by,
    only,
    terminate,
)
from tests.helpers import refusal

pytestmark = pytest.mark.usefixtures("without_charts")

METHODS = ["autograd", "explicit", "step"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_by_signals_ends_with_the_same_bits(
    method: str,
    tmp_path: Path,
    whole: Callable[..., dict[str, Any]],
    before_update: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped within an epoch and at the end of one; started again as the printed line says."""
    options = [*IMAGES, "--method", method]
    command = [*options, "--run-folder", str(tmp_path)]
    for number, event, word, code in (
        (10, interrupt, "interrupted", 130),
        (30, terminate, "terminated", 143),
        (40, hang_up, "hung up", 129),
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
    assert f"going on after update 40 of {TOTAL}\n" in capsys.readouterr().out
    assert left_by(run) == whole(*options)


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


def named(run: Path) -> list[str]:
    return [*QUICK, "--run-folder", str(run.parent), "--name", run.name]


def test_a_finished_run_says_so_and_can_be_trained_further(
    tmp_path: Path, whole: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--epochs", "1", "--run-folder", str(tmp_path)]) == 0
    run = only(tmp_path)
    once = left_by(run)
    capsys.readouterr()
    for command in (["--resume", str(run)], [*named(run), "--epochs", "1"]):
        assert main(command) == 0
        assert left_by(run) == once
        _, first, _, accuracy, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"complete already: all {TOTAL // 3} updates were made before; ")
        assert re.fullmatch(r"test accuracy \d+\.\d+%", accuracy)
    assert main(["--resume", str(run), "--epochs", "3"]) == 0
    assert left_by(run) == whole()
    said = refusal(main, ["--resume", str(run), "--epochs", "2"], capsys)
    assert said.endswith(f"--epochs must be at least 3 in {run}; got 2\n")
    assert left_by(run) == whole()


def test_options_that_agree_or_are_free_can_be_given_again(
    stopped: Path, whole: Callable[..., dict[str, Any]], before_update: Callable[..., None]
) -> None:
    """They hold from there on, even if the power is cut before the next update."""
    moved = stopped.rename(stopped.with_name("moved"))
    options = ["--batch-size", "8", "--device", "cpu", "--checkpoint-every", "5"]
    before_update(21, cut)
    with pytest.raises(PowerCutError):
        main(["--resume", str(moved), *options, "--on-nan", "continue"])
    assert main(["--resume", str(moved)]) == 0
    assert left_by(moved) == whole()
    config = RunFolder.reopened(moved).config
    assert (config["on_nan"], config["checkpoint_every"]) == ("continue", 5)


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


def test_another_version_of_pytorch_is_mentioned(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {**checkpoint.versions(), "torch": "9.9"}
    was = checkpoint.versions()["torch"]
    monkeypatch.setattr(checkpoint, "versions", lambda: now)
    assert main(["--resume", str(stopped)]) == 0
    said = capsys.readouterr().err
    assert said.endswith(f"warning: the last digits may change: torch {was} before, 9.9 now\n")


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


def test_a_run_of_format_2_goes_on(stopped: Path, whole: Callable[..., dict[str, Any]]) -> None:
    """Programs that trained in one process only wrote it."""
    state = torch.load(stopped / "last.pt", weights_only=True)
    checkpoint.write(stopped / "last.pt", checkpoint.pack(state | {"format": 2}))
    assert torch.load(stopped / "last.pt", weights_only=True)["format"] == 2
    assert main(["--resume", str(stopped)]) == 0
    assert left_by(stopped) == whole()
