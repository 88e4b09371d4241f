"""Checkpoints: what a run needs to go on as if it had never stopped, in one file.

A file is complete or absent: it is written under another name, forced to the disk, and renamed. It
holds tensors and plain Python values only, so `torch.load(weights_only=True)` reads it.

If several processes train together, each writes its part of the weights to a file of its own first,
in a new folder. The checkpoint then has the name of that folder, and the checksums of its files.
"""

import contextlib
import io
import os
import random
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import manual_bp

# Raised whenever older programs can no longer read what this one writes. Format 2 is the same,
# without weights that several processes have written.
FORMAT = 3
_READABLE = (2, FORMAT)

# The names of the files: after the latest updates, and with the best test accuracy so far.
LAST, BEST = "last.pt", "best.pt"
# The name of a file while it is written. What a kill leaves of it is overwritten by the next.
UNFINISHED = ".{}.unfinished"
# The names of the folders of weights that several processes have written.
_SHARDS = "weights-{}"


@dataclass(frozen=True)
class Shards:
    """Weights that several processes have written: their folder, and each file's SHA-256."""

    folder: Path
    sha256: Mapping[str, str]


def versions() -> dict[str, str]:
    """The versions on which results depend."""
    return {"manual_bp": manual_bp.__version__, "torch": torch.__version__.split("+")[0]}


def pack(state: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint of a state, as it is now."""
    # Not straight to the file: torch.save aborts the process when the disk is full.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "versions": versions(), **state}, buffer)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a file so that, at any moment, even of a power cut, it is the old one or the new one.

    Raises:
        OSError: It cannot be written; the old file is still there.
    """
    unfinished = path.with_name(UNFINISHED.format(path.name))
    try:
        with unfinished.open("wb") as file:
            file.write(data)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_shards(run: Path) -> Path:
    """The path of a new folder of weights in a run folder."""
    numbers = (int(path.name.rpartition("-")[2]) for path in run.glob(_SHARDS.format("[0-9]*")))
    return run / _SHARDS.format(max(numbers, default=0) + 1)


def remove_unused_shards(run: Path) -> None:
    """Remove folders of weights that neither the last nor the best checkpoint of a run needs."""
    folders = set(run.glob(_SHARDS.format("*")))
    if folders:
        used = {shards.folder for name in (LAST, BEST) if (shards := _shards_of(run / name))}
        for folder in folders - used:
            shutil.rmtree(folder)


def _shards_of(path: Path) -> Shards | None:
    try:
        net = read(path, whole=False)["training"]["net"]
    except (FileNotFoundError, ValueError):  # it is not there, or is of no use any longer
        return None
    return net if isinstance(net, Shards) else None


def read(path: Path, whole: bool = True) -> dict[str, Any]:
    """The state in a checkpoint, with all tensors on the CPU.

    Args:
        path: The file.
        whole: Whether to read weights that several processes have written; else they are `Shards`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or not a checkpoint that this version can read.
    """
    state = _read(path)
    if "shards" in state:
        name, sha256 = state["shards"]
        found = Shards(path.parent / name, sha256)
        state["training"]["net"] = _weights(found) if whole else found
    return state


def _weights(found: Shards) -> dict[str, torch.Tensor]:
    from experiments import shards  # takes a second

    shards.require_whole(found.folder, found.sha256, found.sha256)
    return shards.read(found.folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as parts:
            is_whole = parts.testzip() is None  # torch.load does not compare the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if is_whole else None
    except OSError:
        raise
    except Exception:  # of many kinds, depending on where the damage is
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged ({path.stat().st_size} bytes)")
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is not a checkpoint of this program")
    if state["format"] not in _READABLE:
        raise ValueError(
            f"{path} has format {state['format']}, of manual_bp {state['versions']['manual_bp']}; "
            f"manual_bp {manual_bp.__version__} reads formats {' and '.join(map(str, _READABLE))}"
        )
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random number generator: Python, NumPy, PyTorch, CUDA."""
    cuda_is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda_is_used else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every generator to what `random_state` returned; CUDA's as far as there are devices."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if state["cuda"] else 0
    for device, generator in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(generator, device)
