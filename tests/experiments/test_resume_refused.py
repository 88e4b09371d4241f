"""What cannot go on is refused in one line, and left alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from experiments.run_folder import RunFolder
from experiments.train import main
from tests.experiments.runs import QUICK, damaged, files_in
from tests.helpers import refusal


@pytest.mark.parametrize(
    ("option", "before", "now"),
    [
        ("--learning-rate", "3.0", "1.0"),
        ("--seed", "0", "1"),
        ("--hidden", "(8,)", "9"),
        ("--method", "autograd", "step"),
        ("--dataset", "iris", "wine"),
        ("--batch-size", "8", "10"),  # 10 is the default of a new run
        ("--run-folder", "{}", "elsewhere"),
    ],
)
def test_a_contradicting_option_is_refused_with_both_values(
    option: str, before: str, now: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_in(stopped)
    said = refusal(main, ["--resume", str(stopped), option, now], capsys)
    got = "(9,)" if option == "--hidden" else now
    parent = before.format(stopped.parent)
    assert said == f"python -m experiments.train: {option} is {parent} in {stopped}; got {got}\n"
    assert files_in(stopped) == files


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
    files = files_in(stopped)
    said = refusal(main, ["--resume", str(stopped)], capsys)
    assert reason in said
    assert said.count("\n") == 1
    assert files_in(stopped) == files


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


def in_use(stopped: Path) -> AbstractContextManager[object]:
    return RunFolder.reopened(stopped).lock()


def without_its_checkpoint(stopped: Path) -> AbstractContextManager[object]:
    damaged(stopped / "last.pt")
    return nullcontext()


def without_its_options(stopped: Path) -> AbstractContextManager[object]:
    damaged(stopped / "config.json")
    return nullcontext()


def without_its_metrics(stopped: Path) -> AbstractContextManager[object]:
    (stopped / "metrics.csv").write_text("step\nmany\n", "utf-8")
    return nullcontext()


def trained_on_other_data(stopped: Path) -> AbstractContextManager[object]:
    state = torch.load(stopped / "last.pt", weights_only=True)
    state["training"]["data"] = "others"
    torch.save(state, stopped / "last.pt")
    return nullcontext()


@pytest.mark.parametrize("option", ["--resume", "--name"])
@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (in_use, " must lead to a folder that a run can go on in: another process is training in "),
        (without_its_options, " must lead to a folder that a run can go on in: "),
        (without_its_metrics, " must lead to a folder that a run can go on in: "),
        (without_its_checkpoint, ": "),
        (trained_on_other_data, ": "),
    ],
)
def test_a_refusal_names_the_option_that_chose_the_run(
    option: str,
    spoiled: Callable[[Path], AbstractContextManager[object]],
    reason: str,
    stopped: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = {
        "--resume": ["--resume", str(stopped)],
        "--name": [*QUICK, "--run-folder", str(stopped.parent), "--name", stopped.name],
    }
    with spoiled(stopped):
        said = refusal(main, chosen[option], capsys)
    assert said.startswith(f"python -m experiments.train: {option}{reason}{stopped}")


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
    assert "--resume must lead to a folder that a run can go on in: " in said
    assert "Permission denied" in said
    assert said.count("\n") == 1
    assert (stopped / "config.json").read_bytes() == before
