"""Weights in several files: each process writes its part, and any number of them reads all.

This is `torch.distributed.checkpoint`, with files in the format safetensors. Its usual format has a
pickle, which may run code when it is read.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights to a new folder, and wait until they are on the disk.

    Every process calls this, with tensors that are sharded or the same in all of them.

    Raises:
        OSError: One of the processes could not write, or has ended.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(weights), storage_writer=writer)
    except CheckpointException as error:
        raise _first_failure(error) from error


def read_into(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Overwrite weights with those in a folder: sharded ones, or whole ones.

    Every process calls this. The processes that wrote the folder may have been more or fewer.

    Raises:
        OSError: One of the processes could not read, or has ended.
    """
    try:
        load(dict(weights), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise _first_failure(error) from error


def read(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, whole, on the CPU; no other process takes part."""
    reader = HuggingFaceStorageReader(str(folder))
    found: Any = reader.read_metadata().state_dict_metadata  # only of tensors
    weights = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in found.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the intent is to load in a single process")
        load(weights, storage_reader=reader, no_dist=True)
    return weights


def names(folder: Path) -> set[str]:
    """The names of the files in a folder of weights."""
    return {path.name for path in folder.glob("*.safetensors")}


def checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder, by their names.

    Raises:
        OSError: One of them cannot be read.
    """
    found = {}
    for name in files:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def require_whole(folder: Path, files: Iterable[str], expected: Mapping[str, str]) -> None:
    """Check files in a folder, and that it has no others than expected.

    Args:
        folder: The folder.
        files: The names of the files to check.
        expected: The checksums of all its files.

    Raises:
        OSError: One of them cannot be read.
        ValueError: One of them is damaged, or there is one too many.
    """
    for name, checksum in checksums(folder, files).items():
        if checksum != expected[name]:
            raise ValueError(f"{folder / name} is damaged")
    others = names(folder) - expected.keys()
    if others:
        raise ValueError(f"{folder / min(others)} is not a part of this checkpoint")


def _first_failure(error: CheckpointException) -> BaseException:
    """What was raised in the first process that failed."""
    reason, _ = next(iter(error.failures.values()))
    return reason
