"""MNIST's files, read from a folder or downloaded; here they are small ones that the tests make."""

import gzip
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import mnist
from experiments.data import load
from experiments.mnist import FILES, Bytes, load_mnist, read_idx
from experiments.train import main
from experiments.walk import __main__ as walk
from tests.experiments.runs import files_in, interrupt, left_by, only
from tests.helpers import refusal

PLAIN = [name.removesuffix(".gz") for name in FILES]
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = PLAIN


def idx(array: Bytes) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def digits(count: int, seed: int) -> tuple[Bytes, Bytes]:
    """Images of 4 × 5 and their labels: the pixel of that number is bright."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    labels[:10] = range(10)
    images = generator.integers(0, 100, (count, 20), dtype=np.uint8)
    images[range(count), labels] = 255
    return images.reshape(count, 4, 5), labels


ARRAYS = dict(zip(PLAIN, [*digits(90, 0), *digits(30, 1)], strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the four files, two of them compressed."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, array in ARRAYS.items():
        if "images" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


def test_files_are_read_whether_they_are_compressed_or_not(folder: Path) -> None:
    train, test = load_mnist(folder)
    for found, name in zip([*train, *test], PLAIN, strict=True):
        assert found.dtype == np.uint8
        assert np.array_equal(found, ARRAYS[name])


def test_a_name_that_says_otherwise_does_not_matter(folder: Path) -> None:
    """Some browsers decompress what they download, and keep the name."""
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(idx(ARRAYS[TRAIN_IMAGES]))
    (folder / TRAIN_LABELS).write_bytes(gzip.compress(idx(ARRAYS[TRAIN_LABELS])))
    train, _ = load_mnist(folder)
    assert np.array_equal(train.images, ARRAYS[TRAIN_IMAGES])
    assert np.array_equal(train.labels, ARRAYS[TRAIN_LABELS])


def test_as_data_pixels_are_from_0_to_1(folder: Path) -> None:
    data = load("mnist", folder)
    assert np.array_equal(data.x_train * 255, ARRAYS[TRAIN_IMAGES].reshape(90, 20))
    assert data.label_test.tolist() == ARRAYS[TEST_LABELS].tolist()
    assert (data.image_shape, data.classes) == ((4, 5), 10)
    assert (data.x_test.min().item(), data.x_test.max().item()) == (0, 1)


IMAGES = idx(ARRAYS[TEST_IMAGES])
LABELS = idx(ARRAYS[TEST_LABELS])
PACKED = gzip.compress(IMAGES)
BAD: list[tuple[str, bytes, str]] = [
    (
        TEST_IMAGES,
        b"",
        "must be an idx file of bytes in 3 dimensions, with the magic number 2051; g",
    ),
    (TEST_IMAGES, b"<html>not found</html>", "with the magic number 2051; got 1013478509"),
    (TEST_IMAGES, LABELS, "with the magic number 2051; got 2049"),
    (TEST_LABELS, IMAGES, "bytes in 1 dimension, with the magic number 2049; got 2051"),
    (TEST_IMAGES, b"\0\0\x0d\3" + IMAGES[4:], "with the magic number 2051; got 3331"),  # floats
    (TEST_IMAGES, IMAGES[:10], "with the magic number 2051; got 10 bytes"),
    (TEST_IMAGES, IMAGES[:-1], "must have 30 × 4 × 5 bytes after its header of 16; got 599"),
    (TEST_IMAGES, IMAGES + b"\0", "must have 30 × 4 × 5 bytes after its header of 16; got 601"),
    (TEST_LABELS, LABELS[:-1], "must have 30 bytes after its header of 8; got 29"),
    (TEST_IMAGES, PACKED[:-9], "is damaged: gzip says Compressed file ended before"),
    (TEST_IMAGES, PACKED[:20] + b"\xff" * 20 + PACKED[40:], "is damaged: gzip says "),
    (TEST_IMAGES, PACKED[:-8] + b"\0" * 8, "is damaged: gzip says CRC check failed"),
    (TEST_IMAGES, PACKED + b"more", "is damaged: gzip says "),
    (TEST_LABELS, idx(np.zeros(29, np.uint8)), "must have a label for each of the 30 images in"),
    (TEST_LABELS, idx(np.full(30, 26, np.uint8)), "must have labels from 0 to 9; got 26"),
    (TEST_IMAGES, idx(np.zeros((0, 4, 5), np.uint8)), "must have images; got 0 × 4 × 5"),
    (TEST_IMAGES, idx(np.zeros((30, 5, 4), np.uint8)), "must have images of 4 × 5, as "),
    (TEST_IMAGES, b"\0\0\x08\3" + b"\xff" * 12, "must have 4294967295 × 4294967295 × 4294967295"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD)
def test_a_bad_file_is_refused_with_its_name(
    name: str, content: bytes, reason: str, folder: Path
) -> None:
    (folder / f"{name}.gz").unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as refused:
        load_mnist(folder)
    assert str(refused.value).startswith(f"{folder / name} ")
    assert reason in str(refused.value)


def test_a_missing_file_is_refused_with_both_of_its_names(folder: Path) -> None:
    (folder / TEST_LABELS).unlink()
    with pytest.raises(FileNotFoundError) as refused:
        load_mnist(folder)
    assert str(refused.value) == f"there is no {TEST_LABELS} or {TEST_LABELS}.gz in {folder}"
    with pytest.raises(IsADirectoryError):
        read_idx(folder, 3)


OPTIONS = ["--dataset", "mnist", "--epochs", "2", "--hidden", "8", "--data-dir"]


def test_a_run_is_trained_on_the_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", "mnist", "--hidden", "30", "--data-dir", str(folder)]
    options += ["--cost", "softmax-cross-entropy", "--learning-rate", "1"]
    assert main([*options, "--epochs", "20", "--run-folder", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "20-30-10 sigmoid, output z, softmax-cross-entropy cost, on mnist: 90 trai" in printed
    accuracy = float(printed.partition("\ntest accuracy ")[2].partition("%")[0])
    assert accuracy > 90  # guessing gets about 10
    page = str(tmp_path / "walk.html")
    run = only(tmp_path / "runs")
    assert walk.main(["--checkpoint", str(run), "--batch-size", "2", "--output", page]) == 0


def test_a_run_goes_on_with_the_same_files_only(
    folder: Path,
    tmp_path: Path,
    before_update: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever they are now; other files are refused, and the run is left as it was."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*OPTIONS, str(folder), "--run-folder", str(whole)]) == 0
    before_update(5, interrupt)
    monkeypatch.chdir(tmp_path)
    assert main([*OPTIONS, "data", "--run-folder", str(stopped)]) == 130
    run = only(stopped)
    files = files_in(run)
    other = shutil.copytree(folder, tmp_path / "other")
    labels = ARRAYS[TRAIN_LABELS].copy()
    labels[-1] = 9 - labels[-1]
    (other / TRAIN_LABELS).write_bytes(idx(labels))
    capsys.readouterr()
    said = refusal(main, ["--resume", str(run), "--data-dir", str(other)], capsys)
    assert said.endswith(f" {run}: the data are not those that the run was trained on\n")
    assert files_in(run) == files

    folder.rename(tmp_path / "moved")
    said = refusal(main, ["--resume", str(run)], capsys)
    assert f"there is no {TRAIN_IMAGES} or {TRAIN_IMAGES}.gz in {folder}" in said
    monkeypatch.chdir("/")
    assert main(["--resume", str(run), "--data-dir", str(tmp_path / "moved")]) == 0
    assert left_by(run) == left_by(only(whole))


class Server:
    """A mirror, on this machine.

    content: What it sends as the file of each name; names that are not there are refused with 404.
    is_cut: Whether it closes the connection in the middle of each file.
    asked: The names asked for.
    """

    def __init__(self) -> None:
        self.content = {f"{name}.gz": gzip.compress(idx(a)) for name, a in ARRAYS.items()}
        self.is_cut = False
        self.asked: list[str] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/mnist/")
                mirror.asked.append(name)
                if name not in mirror.content:
                    self.send_error(404)
                    return
                content = mirror.content[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if mirror.is_cut else content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/mnist/"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The only mirror, with files of the right checksums."""
    mirror = Server()
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in mirror.content.items()}
    monkeypatch.setattr(mnist, "FILES", sums)
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.address,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=mirror.server.serve_forever, args=(0.01,))
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


def kept(tmp_path: Path) -> list[str]:
    """The names of all files in the cache."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_files_are_downloaded_once(
    mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        train, test = load_mnist(None)
        for found, name in zip([*train, *test], PLAIN, strict=True):
            assert np.array_equal(found, ARRAYS[name])
    assert mirror.asked == list(FILES)
    assert kept(tmp_path) == sorted(FILES)
    cache = tmp_path / "cache" / "manual_bp" / "mnist"
    printed = capsys.readouterr()
    assert printed.out == "".join(f"downloading {name} to {cache}\n" for name in FILES)
    assert printed.err == ""


def test_a_file_in_the_cache_that_has_changed_is_downloaded_again(
    mirror: Server, tmp_path: Path
) -> None:
    load_mnist(None)
    (tmp_path / "cache" / "manual_bp" / "mnist" / f"{TEST_LABELS}.gz").write_bytes(b"spoiled")
    assert np.array_equal(load_mnist(None)[1].labels, ARRAYS[TEST_LABELS])
    assert mirror.asked == [*FILES, f"{TEST_LABELS}.gz"]


def cut(mirror: Server) -> None:
    mirror.is_cut = True


def change(mirror: Server) -> None:
    mirror.content = {name: gzip.compress(b"another file") for name in FILES}


def refuse(mirror: Server) -> None:
    mirror.content = {}


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (cut, "Connection broken: IncompleteRead"),
        (change, "does not match the known hash"),
        (refuse, "404 Client Error"),
    ],
)
def test_a_failed_download_is_said_in_one_line_and_leaves_nothing(
    fail: Callable[[Server], None],
    reason: str,
    mirror: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Afterwards, with a mirror that works, so does the same command."""
    content = mirror.content
    fail(mirror)
    options = ["--dataset", "mnist", "--epochs", "1", "--run-folder", str(tmp_path / "runs")]
    said = refusal(main, options, capsys)
    assert said.startswith(
        f"python -m experiments.train: --dataset mnist: {TRAIN_IMAGES}.gz cannot be downloaded: "
        f"{mirror.address}: "
    )
    assert reason in said
    assert said.endswith("; --data-dir FOLDER reads files that are there already\n")
    assert said.count("\n") == 1
    assert kept(tmp_path) == []
    assert not (tmp_path / "runs").exists()

    mirror.is_cut, mirror.content = False, content
    assert main(options) == 0


def test_another_mirror_is_tried(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mnist, "MIRRORS", (f"{mirror.address}not/", mirror.address))
        train, _ = load_mnist(None)
    assert np.array_equal(train.images, ARRAYS[TRAIN_IMAGES])
    assert kept(tmp_path) == sorted(FILES)
