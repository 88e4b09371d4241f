"""A run that was not stopped, one that was, a way to stop one, and runs of several processes."""

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from experiments import report
from experiments.train import main
from tests.experiments import scenarios
from tests.experiments.runs import QUICK, interrupt, left_by, let_happen, only


@pytest.fixture(scope="session", autouse=True)
def _can_be_interrupted() -> Iterator[None]:
    """As on a terminal: what a script starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What an uninterrupted run leaves; with QUICK, unless other options are given."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*options: str) -> dict[str, Any]:
        if options not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert main([*(options or QUICK), "--run-folder", str(folder)]) == 0
            found[options] = left_by(only(folder))
        return found[options]

    return run


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of the report, half of the time of a short run.

    They are drawn in the tests of the report, of the board, and of the main job.
    """
    monkeypatch.setattr(report, "_chart", lambda _: "<svg/>")


@pytest.fixture
def before_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    return partial(let_happen, monkeypatch)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder in which all scenarios have run, once for all processes of pytest."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "scenarios"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            scenarios.run_all(folder)
            (folder / "done").touch()
    return folder
