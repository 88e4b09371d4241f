import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from experiments import checkpoint
from experiments.board import CHARTS, TILE, Board, keep_events
from experiments.train import main
from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop
from tests.experiments.walk.browser import needs_chromium, watch
from tests.helpers import logged_below, logged_in


@pytest.fixture
def trace() -> Trace:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2), Sigmoid())
    return backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())


def test_traces_and_metrics_become_scalars(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.traces.log(trace, 7)
        board.log_metrics({"train_cost": 0.5, "test_accuracy": 0.75}, 7)
    logged = logged_below(tmp_path)
    assert set(logged) == {".", "train", "test", "1 6→4 sigmoid", "2 4→2 sigmoid"}
    assert logged["train"].Tags()["scalars"] == ["1. learning/cost"]
    assert logged["test"].Scalars("1. learning/accuracy")[0].value == 0.75
    assert "2. layers/log₁₀ ‖δ‖" in logged["2 4→2 sigmoid"].Tags()["scalars"]


def test_each_folder_has_one_file_and_the_sizes_are_theirs(tmp_path: Path, trace: Trace) -> None:
    with Board(tmp_path) as board:
        board.traces.log(trace, 0)
        board.log_config({"hidden": (4,), "learning_rate": 3.0, "fast": True})
        sizes = board.sizes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = {str(path.parent.relative_to(tmp_path)): path.stat().st_size for path in files}
    assert len(files) == len(found) == 4
    assert sizes == found


def test_a_run_begins_with_how_to_read_it(tmp_path: Path) -> None:
    with Board(tmp_path):
        pass
    (event,) = logged_in(tmp_path).Tensors("how to read this run/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    groups = {tag.partition("/")[0] for tag, _ in CHARTS}
    assert groups == set(re.findall(r"\*\*(\d\. \w+)\*\*", text))
    assert all(f"By BP{number}" in text or f"by BP{number}" in text for number in (1, 2, 3, 4))


def test_weights_and_confusion_become_images(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        board.log_weight_image(torch.randn(7, 6), (2, 3), 0)
        board.log_weight_image(torch.zeros(7, 6), (2, 3), 1)
        board.log_weight_image(torch.full((7, 6), torch.nan), (2, 3), 2)
        labels = torch.tensor([0, 1, 1])
        board.log_confusion(labels, labels.flip(0), ("no", "maybe", "yes"), 0)
    logged = logged_in(tmp_path)
    images = logged.Images("4. pictures/weights of the first layer")
    assert [image.step for image in images] == [0, 1, 2]
    assert len(logged.Images("4. pictures/which classes are confused")) == 1


def test_a_tile_is_white_where_a_weight_is_largest_and_grey_where_it_is_zero(
    tmp_path: Path,
) -> None:
    w = torch.zeros(2, 6)
    w[0, 1], w[1, 5] = 2.0, -2.0
    with Board(tmp_path) as board:
        board.log_weight_image(w, (2, 3), 0)
    (image,) = logged_in(tmp_path).Images("4. pictures/weights of the first layer")
    picture = imread(BytesIO(image.encoded_image_string))[..., 0]
    frame, size = 2, TILE // 3
    assert picture.shape == (2 * frame + 2 * size, 2 * (2 * frame + 3 * size))
    middle = frame + size // 2
    assert picture[middle, middle + size] == 1  # the first neuron, row 0, column 1
    second = 2 * frame + 3 * size
    assert picture[middle + size, second + middle + 2 * size] == 0
    assert picture[middle, middle] == pytest.approx(0.5, abs=0.01)


def test_the_confusion_is_also_written_as_a_picture(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        labels = torch.tensor([0, 1, 1])
        board.log_confusion(labels, labels, ("no", "yes"), 0)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_events_are_cut_to_their_sizes_in_every_folder(
    tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Board(tmp_path) as board:
        board.log_metrics({"train_cost": 0.5}, 0)
        before = board.sizes()
        board.log_metrics({"train_cost": 0.25, "test_cost": 0.5}, 1)
        board.traces.log(trace, 1)
    synced: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", synced.append)
        assert keep_events(tmp_path, before)
        assert [path.parent.name for path in synced] == ["train"]
        assert keep_events(tmp_path, before)  # once more, as after a kill
        assert len(synced) == 1  # the cut files; what was kept whole is on the disk
    logged = logged_below(tmp_path)
    assert set(logged) == {".", "train"}  # the others are from later
    assert [point.step for point in logged["train"].Scalars("1. learning/cost")] == [0]
    assert not keep_events(tmp_path, before | {"test": 10})


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of a short run, and the address of a TensorBoard that shows it."""
    runs = tmp_path_factory.mktemp("served")
    options = ["--epochs", "2", "--batch-size", "100", "--log-every", "5"]
    assert main([*options, "--run-folder", str(runs)]) == 0
    (folder,) = runs.iterdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--port", str(port), "--host", "localhost"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        yield folder, f"http://localhost:{port}/data/plugin"
        server.terminate()


def asked(address: str) -> Any:
    """What TensorBoard answers, once it is up."""
    opener = build_opener(ProxyHandler({}))
    for _ in range(300):
        try:
            with opener.open(address, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


@pytest.mark.parametrize("kind", ["scalars", "histograms", "images"])
def test_every_tag_arrives_in_tensorboard_with_its_description(
    kind: str, served: tuple[Path, str]
) -> None:
    folder, address = served
    logged = logged_below(folder)
    expected = {name: set(log.Tags()[kind]) for name, log in logged.items() if log.Tags()[kind]}
    for _ in range(300):  # it reads the files after it has begun to answer
        found = asked(f"{address}/{kind}/tags")
        if {name: set(tags) for name, tags in found.items()} == expected:
            break
        time.sleep(0.1)
    assert {name: set(tags) for name, tags in found.items()} == expected
    for tags in found.values():
        for tag, about in tags.items():
            assert about["displayName"] == tag
            assert about["description"].startswith("<p>")


def test_the_text_arrives_in_tensorboard(served: tuple[Path, str]) -> None:
    _, address = served
    for _ in range(300):
        found = asked(f"{address}/text/tags")
        if found:
            break
        time.sleep(0.1)
    assert found == {".": ["how to read this run/text_summary"]}


def test_the_report_has_every_chart_and_needs_nothing_else(served: tuple[Path, str]) -> None:
    folder, _ = served
    page = (folder / "report.html").read_text("utf-8")
    assert len(page) < 2_000_000
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", page)
    assert not re.findall(r"url\((?!#)", page)
    logs = logged_below(folder).values()
    tags = {tag for log in logs for kind in ("scalars", "histograms") for tag in log.Tags()[kind]}
    assert page.count("<svg") == len(tags) == 10
    assert page.count("<img") == 3
    for tag, _ in CHARTS:
        title = tag.partition("/")[2]
        assert (f"<b>{title}</b>" in page) == (title != "what the network answers")
    assert "64→30 sigmoid" in page
    assert "<td>quadratic</td>" in page


@needs_chromium
@pytest.mark.parametrize("width", [1240, 360])
def test_a_browser_shows_the_whole_report_and_nothing_is_wider_than_the_page(
    width: int, served: tuple[Path, str], tmp_path: Path
) -> None:
    page = (served[0] / "report.html").read_text("utf-8")
    found = watch(
        page.replace("'none';", "'none'; script-src 'unsafe-inline';", 1),  # for the test's own
        f"""
        document.documentElement.style.width = "{width}px";
        const boxes = (parts) => all(parts).map((part) => part.getBoundingClientRect());
        return {{
          drawn: boxes("figure svg, figure img").filter((box) => box.height > 60).length,
          wide: boxes("body :not(svg *)").filter((box) => box.right > {width} + 1).length,
          loaded: all("img").every((image) => image.naturalWidth > 100),
        }};
        """,
        tmp_path,
    )
    assert found == {"drawn": page.count("<figure>"), "wide": 0, "loaded": True}


def test_a_description_is_written_with_the_first_value_only(tmp_path: Path) -> None:
    steps = 100
    for again in (0, steps):  # the second one goes on
        with Board(tmp_path, again, {0: {}} if again else None) as board:
            for step in range(again, again + steps):
                board.log_metrics({"train_cost": 0.5}, step)
    for path in (tmp_path / "train").iterdir():
        events = RawEventFileLoader(str(path)).Load()
        values = [v for event in events for v in Event.FromString(event).summary.value]
        found = [value.metadata.summary_description for value in values]
        assert found == [CHARTS[0][1], *[""] * (steps - 1)]


def test_only_what_has_grown_is_forced_to_the_disk(
    tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "sync", synced.append)
    for step in range(5):  # as a run that goes on again and again
        with Board(tmp_path, step, {} if step else None) as board:
            board.traces.log(trace, step)
            board.log_metrics({"test_cost": 0.5, "train_cost": 0.5}, step)
            board.sizes()
            board.sync()
            runs = [tmp_path, *(path for path in tmp_path.iterdir() if path.is_dir())]
            assert len(runs) == 5
            newest = [max(run.glob("events*")) for run in runs]
            assert sorted(synced) == sorted([*runs, *newest])  # not more each time
            synced.clear()
            board.log_metrics({"test_cost": 0.5}, step)
            board.sizes()
            board.sync()
            board.sync()
        assert [path.parent.name for path in synced] == ["test"]
        synced.clear()
