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
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import manual_bp

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

    The folder never exists without its config.json, even if the program is killed. Rows are on the
    disk as soon as they are written, so an interrupted run keeps the rows that it finished.

    Args:
        path: The folder to create. If it exists, it is left alone, and a number is appended.
        config: The settings of the run.

    Raises:
        OSError: The folder cannot be created.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        description = {
            "config": self.config,
            "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": {"manual_bp": manual_bp.__version__} | versions(_PACKAGES),
            "git": _git(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        }
        text = json.dumps(description, indent=2, default=str)
        self.path = _make(path, {"config.json": text + "\n"})
        self._metrics = self.path / "metrics.csv"

    def add_metrics(self, row: Mapping[str, float]) -> None:
        """Append a row to metrics.csv, after a header if it is the first one."""
        is_first = not self._metrics.exists()
        with self._metrics.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_first:
                writer.writeheader()
            writer.writerow(row)


def _make(path: Path, files: Mapping[str, str]) -> Path:
    """Create a folder with its files in one step: under a temporary name, and then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, text in files.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        return _rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


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
