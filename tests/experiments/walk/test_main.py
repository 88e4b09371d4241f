from pathlib import Path

import pytest

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
