"""Several processes survive what happens to them, or end with one line."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments import checkpoint
from experiments.distributed import Processes
from experiments.train import main
from tests.experiments.run_ranks import without_pictures
from tests.experiments.runs import left_by
from tests.experiments.scenarios import QUICK, TOTAL, code, needs_gloo, said
from tests.helpers import refusal

pytestmark = needs_gloo


def test_only_the_first_process_prints_and_writes(ran: Path) -> None:
    first, second = (said(ran / "whole", "stdout")[f"0.{rank}"] for rank in range(2))
    lines = first.splitlines()
    assert lines[0].endswith("; on cpu, in 2 processes")
    assert [line[:9] for line in lines[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-3:-1] == ["run folder: runs/whole", "report:     runs/whole/report.html"]
    assert second == ""
    assert set(said(ran / "whole", "stderr").values()) == {""}
    by_folder = Counter(path.parent for path in (ran / "runs/whole").rglob("events*"))
    assert set(by_folder.values()) == {1}


def test_a_run_whose_process_was_killed_is_restarted_and_ends_with_the_same_bits(ran: Path) -> None:
    assert code(ran / "killed") == 0
    out, err = said(ran / "killed", "stdout"), said(ran / "killed", "stderr")
    assert f"going on after update 5 of {TOTAL}\n" in out["1.0"]
    assert err["0.0"] == (
        f"stopped: another process has ended; update 5 of {TOTAL} is saved; to go on: torchrun "
        "--nproc-per-node 2 -m experiments.train --resume runs/killed\n"
    )
    assert (err["0.1"], err["1.0"], err["1.1"]) == ("", "", "")
    assert left_by(ran / "runs/killed") == left_by(ran / "runs/whole")


def test_a_signal_to_one_process_stops_all_after_a_checkpoint(ran: Path) -> None:
    assert code(ran / "stopped") == 143
    assert said(ran / "stopped", "stderr") == {
        "0.0": f"terminated; update 9 of {TOTAL} is saved; to go on: torchrun --nproc-per-node 2 "
        "-m experiments.train --resume runs/stopped\n",
        "0.1": "",
    }
    assert checkpoint.read(ran / "runs/stopped/last.pt")["training"]["updates"] == 9


def test_a_full_disk_of_one_process_ends_all_with_one_line(ran: Path) -> None:
    assert code(ran / "full") == 1
    first, second = (said(ran / "full", "stderr")[f"0.{rank}"] for rank in range(2))
    assert first == (
        f"stopped: [Errno 27] File too large; update 5 of {TOTAL} is saved; to go on: torchrun "
        "--nproc-per-node 2 -m experiments.train --resume runs/full\n"
    )
    assert second == ""
    assert checkpoint.read(ran / "runs/full/last.pt")["training"]["updates"] == 5


def test_a_wrong_option_is_refused_in_one_line(ran: Path) -> None:
    assert code(ran / "refused") == 2
    assert said(ran / "refused", "stderr") == {
        "0.0": "python -m experiments.train: --shard goes with --method autograd; got step\n",
        "0.1": "",
    }


def test_a_cost_that_is_no_number_is_traced_as_in_one_process(
    ran: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To find where it began, all processes repeat the updates together."""
    assert code(ran / "diverges") == 1
    without_pictures(monkeypatch)
    options = ["--learning-rate", "1e38", "--run-folder", str(tmp_path), "--name", "diverges"]
    assert main([*QUICK, *options]) == 1
    expected = capsys.readouterr().err.replace(str(tmp_path), "runs")
    assert "it began" in expected
    assert said(ran / "diverges", "stderr") == {"0.0": expected, "0.1": ""}


def under_torchrun(patch: pytest.MonkeyPatch, **variables: str) -> Processes:
    for name, value in variables.items():
        patch.setenv(name, value)
    return Processes()


def test_a_restart_must_find_its_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    said = refusal(main, QUICK, capsys)
    assert "--name must be given with --max-restarts: a restart needs it\n" in said


def test_restarts_over_several_machines_need_a_new_store_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_of_four = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    processes = under_torchrun(monkeypatch, **two_of_four, TORCHELASTIC_USE_AGENT_STORE="True")
    processes.require_restartable(False)  # without restarts
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the env"):
        processes.require_restartable(True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    processes.require_restartable(True)
    assert processes.launcher == ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", "-m"]


@pytest.mark.parametrize(
    ("option", "has_cuda", "device"),
    [
        ("auto", False, "auto"),
        ("auto", True, "cuda:1"),
        ("cuda", True, "cuda:1"),
        ("cuda:0", True, "cuda:1"),  # what the first process noted in a checkpoint
        ("cpu", True, "cpu"),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    option: str, has_cuda: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    processes = under_torchrun(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    assert processes.device(option) == device


def test_a_named_run_starts_and_goes_on_with_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    command = [*QUICK, "--run-folder", str(tmp_path), "--name", "mine"]
    assert main([*command, "--epochs", "1"]) == 0
    assert main(command) == 0
    assert "going on after update 8 of 16\n" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    said = refusal(main, [*command, "--seed", "1"], capsys)
    assert said.endswith(f"--seed is 0 in {tmp_path}/mine; got 1\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--name", "a/b"], "--name must be the name of a folder; got 'a/b'"),
        (["--name", ".."], "--name must be the name of a folder; got '..'"),
        (["--name", "a\0b"], r"--name must be the name of a folder; got 'a\x00b'"),
        (["--name", "a\nb"], r"--name must be the name of a folder; got 'a\nb'"),
        (["--name", "a\udcff"], r"--name must be the name of a folder; got 'a\udcff'"),
        (["--name", "ü" * 128], "--name must be the name of a folder; got 'üü"),
        (["--name", "taken"], "--name must be that of a run, or a new one; got "),
        (["--name", "x", "--resume", "y"], "--name is for a run that may be new; it does not go"),
        (
            ["--name", "x", "--dry-run"],
            "--dry-run trains a new network; it does not go with --name",
        ),
        (["--shard"], "--shard divides weights over the processes that torchrun starts; got one"),
    ],
)
def test_options_that_do_not_suit_are_refused(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    said = refusal(main, [*QUICK, "--run-folder", str(tmp_path), *options], capsys)
    assert reason in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
