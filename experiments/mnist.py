"""MNIST from its four idx files: in a folder, or downloaded once and kept."""

import gzip
import math
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# The files of a training set and a test set, images and labels, with the SHA-256 of each.
FILES = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
CLASSES = 10

Bytes = NDArray[np.uint8]


class Split(NamedTuple):
    """The training set or the test set.

    images: (N, height, width), from 0, the background, to 255.
    labels: (N,), from 0 to 9.
    """

    images: Bytes
    labels: Bytes


def load_mnist(folder: Path | None) -> tuple[Split, Split]:
    """The training set and the test set.

    Args:
        folder: Where the four files are, compressed or not; None downloads them to the user's
            cache, unless they are there.

    Raises:
        OSError: A file is missing, or cannot be read or downloaded.
        ValueError: A file is damaged, or is not what it should be.
    """
    paths = [_download(name) if folder is None else _find(folder, name) for name in FILES]
    train, test = _split(*paths[:2]), _split(*paths[2:])
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{paths[2]} must have images of {_times(train.images.shape[1:])}, as {paths[0]} has; "
            f"got {_times(test.images.shape[1:])}"
        )
    return train, test


def read_idx(path: Path, dimensions: int) -> Bytes:
    """An array of bytes from an idx file, which may be compressed with gzip.

    The file has a magic number of four bytes (0, 0, 8 for bytes, the number of dimensions), each
    dimension in four bytes, and the numbers; the most significant byte comes first.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or has another type or number of dimensions.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: gzip says {error}") from None
    start = 4 * (1 + dimensions)
    magic, wanted = int.from_bytes(content[:4], "big"), 0x0800 + dimensions
    if len(content) < start or magic != wanted:
        raise ValueError(
            f"{path} must be an idx file of bytes in {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''}, with the magic number {wanted}; "
            + (f"got {len(content)} bytes" if len(content) < start else f"got {magic}")
        )
    shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")]
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} must have {_times(shape)} bytes after its header of {start}; "
            f"got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _split(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.size == 0:
        raise ValueError(f"{images_path} must have images; got {_times(images.shape)} bytes")
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path} must have a label for each of the {len(images)} images in "
            f"{images_path}; got {len(labels)}"
        )
    if labels.max() >= CLASSES:
        raise ValueError(
            f"{labels_path} must have labels from 0 to {CLASSES - 1}; got {labels.max()}"
        )
    return Split(images, labels)


def _find(folder: Path, name: str) -> Path:
    """The file of that name in a folder, or the same without .gz."""
    plain = folder / name.removesuffix(".gz")
    for path in (plain, folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no {plain.name} or {name} in {folder}")


def _download(name: str) -> Path:
    """The file in the cache; it is downloaded from the first mirror that has it whole."""
    import pooch  # takes a while
    import requests

    pooch.get_logger().setLevel("WARNING")
    cache = pooch.os_cache("manual_bp") / "mnist"
    if not (cache / name).exists():
        print(f"downloading {name} to {cache}", flush=True)
    failures = []
    for mirror in MIRRORS:
        try:
            found = pooch.retrieve(
                mirror + name,
                known_hash=FILES[name],
                fname=name,
                path=cache,
                progressbar=sys.stderr is not None and sys.stderr.isatty(),
            )
        except (OSError, ValueError) as error:
            is_away = isinstance(error, ConnectionError | requests.ConnectionError)
            failures.append(f"{mirror}: {'cannot be reached' if is_away else error}")
        else:
            return Path(found)
    raise OSError(f"{name} cannot be downloaded: {'; '.join(failures)}")


def _times(shape: tuple[int, ...] | list[int]) -> str:
    return " × ".join(map(str, shape))
