import json
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, train
from experiments.data import load
from experiments.walk.__main__ import LARGEST, Config, invent, main, write
from tests.helpers import refusal


def test_it_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "walk.html"
    assert main(["--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert said == f"{file.stat().st_size:,} bytes; open it in a browser: {file}\n"
    first = file.read_bytes()
    assert first.startswith(b"<!DOCTYPE html>")
    assert len(first) < 100_000
    assert main(["--output", str(file), "--seed", "1"]) == 0
    assert file.read_bytes() != first
    assert main(["--output", str(file)]) == 0
    assert file.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "4"], "--sizes must be two or more sizes of at least 1; got 4"),
        (["--sizes", "4", "0", "2"], "--sizes must be two or more sizes of at least 1; got 4 0 2"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--output", "."], "--output must be a file to write to; got '.'"),
        (["--output", "/dev/null/walk.html"], "--output must be a file to write to; got "),
        (["--activation", "step"], "invalid choice 'step' for argument '--activation'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(main, arguments, capsys)
    assert reason in said
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of the main job."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = "--dataset iris --hidden 3 --epochs 2 --cost softmax-cross-entropy"
    assert train.main([*arguments.split(), "--run-folder", str(runs), "--device", "cpu"]) == 0
    (folder,) = runs.iterdir()
    return folder


def test_a_checkpoint_gives_the_net_and_the_test_data_of_its_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "walk.html"
    options = ["--batch-size", "4", "--output", str(file)]
    assert main(["--checkpoint", str(run), *options]) == 0
    page = file.read_text(encoding="utf-8")
    numbers = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    assert numbers["net"] == {
        "sizes": [4, 3, 3],
        "activation": "sigmoid",
        "output": "none",
        "cost": "softmax-cross-entropy",
        "learning_rate": 3.0,
        "samples": 4,
        "source": "iris after 24 updates",
    }
    state = checkpoint.read(run / checkpoint.LAST)
    w, b = (state["training"]["net"][f"2.{name}"] for name in ("weight", "bias"))
    assert numbers["shared"]["w2"] == [[float(f"{v:.6g}") for v in row] for row in w.tolist()]
    data = load("iris")
    hidden = torch.tensor(numbers["passes"][0]["a1"])
    torch.testing.assert_close(torch.tensor(numbers["passes"][0]["a0"]), data.x_test[:4])
    torch.testing.assert_close(torch.tensor(numbers["passes"][0]["z2"]), hidden @ w.mT + b)
    assert numbers["passes"][3]["y"] == [[float(c == data.label_test[2]) for c in range(3)]]
    assert main(["--checkpoint", str(run / checkpoint.LAST), *options]) == 0
    assert file.read_text(encoding="utf-8") == page
    capsys.readouterr()


def test_a_checkpoint_that_cannot_be_walked_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(main, ["--checkpoint", str(run), "--sizes", "4", "2"], capsys)
    assert said.endswith(": --sizes is the run's own; it does not go with --checkpoint\n")
    said = refusal(main, ["--checkpoint", str(tmp_path)], capsys)
    assert "--checkpoint must be the folder of a run: [Errno 2] No such file" in said
    broken = tmp_path / "broken.pt"
    broken.write_bytes((run / checkpoint.LAST).read_bytes()[:-50])
    said = refusal(main, ["--checkpoint", str(broken)], capsys)
    assert f"{broken} is damaged" in said
    broken.write_bytes(checkpoint.pack({"config": {"dataset": "iris"}}))
    said = refusal(main, ["--checkpoint", str(broken)], capsys)
    assert said.endswith(f"{broken} is not a checkpoint of experiments.train\n")


def test_a_net_too_large_for_a_page_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "walk.html"
    said = refusal(main, ["--sizes", "784", "100", "10", "--output", str(file)], capsys)
    assert "--sizes and --batch-size must make a page below 1,000,000 bytes; got 2," in said
    assert "for 784-100-10 and 5 samples" in said
    assert not file.exists()


def test_a_large_net_has_only_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "walk.html"
    assert main(["--sizes", "784", "30", "10", "--output", str(file)]) == 0
    assert capsys.readouterr().out.startswith("only the whole batch: with each sample, the page ")
    assert 500_000 < file.stat().st_size < LARGEST
    config = Config(sizes=(64, 30, 10))
    text, has_samples = write(config, invent(config))
    assert has_samples
    assert len(text.encode()) < LARGEST
