"""A folder for each run, with what is needed to understand and to repeat the run."""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import manual_bp
from experiments import checkpoint

_PACKAGES = ("torch", "numpy", "tensorboard", "scikit-learn", "matplotlib", "tyro")


# Longer names are cut in the middle: file systems take at most 255 bytes, and people read fewer.
_LONGEST = 100


def run_path(parent: Path, name: str) -> Path:
    """The path of a run of that name that starts now: the name, and the time."""
    if len(name) > _LONGEST:
        half = (_LONGEST - len("...")) // 2
        name = f"{name[:half]}...{name[-half:]}"
    return parent / f"{name}__{datetime.now():%Y%m%d-%H%M%S}"


def can_be_made(folder: Path) -> bool:
    """Whether a folder exists and is writable, or could be created; creates nothing."""
    try:
        str(folder).encode()
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except UnicodeEncodeError:  # TensorBoard needs a name that UTF-8 can encode
        return False
    except OSError:  # the name is too long for the file system
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


class RunFolder:
    """The folder of one run: `config.json` from the start, then `metrics.csv`, a row at a time.

    The folder never exists without its config.json, even if the program is killed. Rows are written
    at once, so an interrupted run keeps the rows that it finished.

    Args:
        path: The folder to create. If it exists, it is left alone, and a number is appended.
        config: The settings of the run.
        files: Other files that the folder has from the start, by name.

    Raises:
        OSError: The folder cannot be created.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        self.config = dict(config)
        description = {
            "config": self.config,
            **_circumstances("started"),
            "git": _git(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        }
        self.path = _make(path, {"config.json": _json(description), **(files or {})})

    @classmethod
    def reopened(cls, path: Path) -> "RunFolder":
        """The existing folder of a run, with the settings that it was last trained with.

        Raises:
            OSError: There is no config.json in it that can be read.
            ValueError: Its config.json is not what a run writes.
        """
        folder = cls.__new__(cls)
        folder.path = path
        try:
            folder.config = dict(folder._description()["config"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path / 'config.json'} is damaged") from None
        return folder

    def lock(self) -> AbstractContextManager[object]:
        """Keep other processes out of the folder, until the context or this process ends.

        Raises:
            BlockingIOError: Another process has locked it.
            OSError: The folder cannot be written to.
        """
        try:
            return FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"another process is training in {self.path}") from None

    def go_on(self, config: Mapping[str, Any], step: int) -> None:
        """Go on after a number of updates: drop later rows, and note in config.json that it did.

        metrics.csv must have a column named step; rows at `step` itself are dropped, too.

        Raises:
            OSError: A file cannot be read or written.
            ValueError: metrics.csv is not what a run writes.
        """
        try:
            self._drop_rows(step)
        except (ValueError, IndexError):
            raise ValueError(f"{self._metrics} is damaged") from None
        description = self._description()
        again = {"step": step, **_circumstances("resumed")}
        self.config = description["config"] = dict(config)
        description["resumed"] = [*description.get("resumed", []), again]
        checkpoint.write(self.path / "config.json", _json(description))
        for left_over in self.path.glob(checkpoint.UNFINISHED.format("*")):
            left_over.unlink()

    def add_metrics(self, row: Mapping[str, float]) -> None:
        """Append a row to metrics.csv, after a header if it is the first one."""
        is_first = not self._metrics.exists()
        with self._metrics.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_first:
                writer.writeheader()
            writer.writerow(row)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it, as `checkpoint.write` does.

        Raises:
            OSError: It cannot be written; the old file is still there.
        """
        checkpoint.write(self.path / name, data)

    def remove_unused(self) -> None:
        """Remove weights that no checkpoint needs any longer."""
        checkpoint.remove_unused_shards(self.path)

    def sync(self) -> None:
        """Wait until metrics.csv is on the disk."""
        if self._metrics.exists():
            checkpoint.sync(self._metrics)

    def _drop_rows(self, step: int) -> None:
        if not self._metrics.exists():
            return
        with self._metrics.open(newline="", encoding="utf-8") as file:
            header, *rows = file.read().splitlines(keepends=True) or [""]
        column = next(csv.reader([header]), []).index("step") if rows else 0
        # A row without its end was being written when the power went.
        kept = [r for r in rows if r.endswith("\n") and int(r.split(",")[column]) < step]
        if not kept:
            self._metrics.unlink()
        elif kept != rows:
            checkpoint.write(self._metrics, "".join([header, *kept]).encode())

    def _description(self) -> dict[str, Any]:
        text = (self.path / "config.json").read_text(encoding="utf-8")
        description: dict[str, Any] = json.loads(text)
        return description

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.csv"


def _circumstances(event: str) -> dict[str, Any]:
    """The command, the time of an event, and the versions."""
    return {
        "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
        event: datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"manual_bp": manual_bp.__version__} | versions(_PACKAGES),
    }


def _json(description: Mapping[str, Any]) -> bytes:
    return (json.dumps(description, indent=2, default=str) + "\n").encode()


def _make(path: Path, files: Mapping[str, bytes]) -> Path:
    """Create a folder with its files in one step: under a temporary name, and then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, data in files.items():
            checkpoint.write(unfinished / name, data)
        made = _rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    checkpoint.sync_names(path.parent)
    return made


def _rename(folder: Path, path: Path) -> Path:
    """Rename a folder, with a number appended if the name is taken."""
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        # Renaming would replace an empty folder, hence this check. If another run creates a folder
        # of this name after the check, that folder is not empty, and renaming fails.
        if not os.path.lexists(candidate):
            try:
                return folder.rename(candidate)
            except OSError:
                if not candidate.is_dir():
                    raise
        number += 1


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed versions of Python and of some packages; None for a package that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git() -> dict[str, Any]:
    """The commit of the code, and whether it was changed since; None outside of git."""
    commit = _git_says("rev-parse", "HEAD")
    changes = _git_says("status", "--porcelain")
    return {"commit": commit, "modified": bool(changes) if commit else None}


def _git_says(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
