import csv
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import benchmark, measuring, per_sample
from experiments.benchmark import calls, forward_and_backward, main, networks
from experiments.measuring import peak_bytes
from experiments.report import Table
from manual_bp import Linear, LinearSigmoid, Sigmoid
from tests.helpers import refusal


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small nets, for per-sample results the second with samples of several rows."""
    monkeypatch.setattr(measuring, "PAUSE", 0.0)
    monkeypatch.setattr(measuring, "TURN", 0.002)
    for name, value in {
        "NETS": [((6, 5, 4), 3), ((6, 4), 2)],
        "PER_SAMPLE_NETS": [((6, 5, 4), (3,)), ((6, 5, 4), (3, 2))],
        "DEPTHS": (1, 2, 3),
        "DEPTH_WIDTH": 8,
        "BATCHES": (2, 4),
        "BATCH_SIZES": (6, 5, 4),
        "WIDTHS": (8, 16),
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of each Markdown table in a text, by their columns."""
    found: list[list[dict[str, str]]] = []
    lines = [*text.splitlines(), ""]
    block: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
        elif block:
            heads, _, *rows = block
            found.append([dict(zip(heads, row, strict=True)) for row in rows])
            block = []
    return found


def run(question: str, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    """The lines before the tables, and the tables; they are the same in all that was written."""
    arguments = [question, "--rounds", "2", "--folder", str(folder), *more]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"written: {folder / question}.md" in out
    found = tables(out)
    page = (folder / f"{question}.md").read_text("utf-8")
    assert tables(page) == found
    with (folder / f"{question}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, found))
    for read, row in zip(rows, [row for table in found for row in table], strict=True):
        assert {name: read[name] for name in row} == row
    assert (folder / f"{question}.png").read_bytes().startswith(b"\x89PNG")
    lines = out.split("\n\n")[0].splitlines()
    assert all(f"- {line}" in page.splitlines() for line in lines)
    return lines, found


def test_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    lines, (first, second, memory) = run("step", tmp_path / "new", capsys)
    assert lines[0].startswith("command: python -m experiments.benchmark step --rounds 2 --folder")
    assert f"torch {version('torch')}" in lines[2]
    assert lines[4] == "threads: 1; products of float32: highest"
    assert lines[5].startswith("left out, for it is not there: a C++ compiler")
    names = [row["contender"] for row in first]
    assert names[:3] == ["ours", "torch, SGD", "torch, fused SGD"]
    assert (names[3], names[-1]) == ("NumPy", "bare products")
    assert [row["net"] for row in (first[0], second[0])] == ["6-5-4", "6-4"]
    assert (first[0]["times ours"], first[-1]["times the products"]) == ("1.000", "1.000")
    assert all(float(row["µs"]) > 0 for row in first + second)
    assert [row["net, contender"] for row in memory][:2] == [
        "6-5-4, batch 3: ours",
        "6-5-4, batch 3: torch, SGD",
    ]
    assert memory[0]["activations alone, MB"] == f"{3 * 9 * 4 / 1e6:.3f}"


def test_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (depth, batch) = run("growth", tmp_path, capsys)
    names = ["ours", "torch, SGD", "bare products"]
    assert [(r["contender"], r["layers"]) for r in depth] == [(n, d) for n in names for d in "123"]
    assert [(r["contender"], r["samples"]) for r in batch] == [(n, d) for n in names for d in "24"]
    for row in depth:
        each = float(row["µs for each of the layers"])
        assert each == pytest.approx(float(row["µs"]) / int(row["layers"]), abs=0.06)


@pytest.mark.parametrize("question", ["growth", "backward", "layers"])
def test_the_time_is_bounded_and_the_rounds_are_told(
    question: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([question, "--rounds", "50", "--budget", "0", "--folder", str(tmp_path)]) == 0
    page = (tmp_path / f"{question}.md").read_text("utf-8")
    titles = re.findall(r"^## .*$", page, flags=re.MULTILINE)
    assert titles
    out = capsys.readouterr().out
    for title in titles:
        assert title.endswith("; rounds: 1")
        assert title.removeprefix("## ") in out


def test_backward_is_five_products_to_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two for each layer, but for BP2 of the first, which nobody needs."""
    _, (table,) = run("backward", tmp_path, capsys)
    assert [row["width"] for row in table] == ["8", "16"]
    for row in table:
        products = 3 * 2 * 128 * int(row["width"]) ** 2
        assert float(row["operations, forward"]) == pytest.approx(products, rel=0.01)
        assert row["times forward"] == f"{5 / 3:.3f}"
        assert float(row["products, timed"]) > 0 < float(row["autograd, timed"])


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (each, *nets) = run("layers", tmp_path, capsys)
    assert [row["forward, 10 samples, 30 to 10"] for row in each] == list(calls("cpu"))
    for net, table in zip(("6-5-4", "6-4"), nets, strict=True):
        assert [row["layers"] for row in table] == ["torch", "Linear, Sigmoid", "LinearSigmoid"]
        assert table[0]["net"] == net
        assert table[0]["time"] == table[0]["memory"] == "1.000"


def test_the_precision_of_products_is_as_asked_and_then_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def table(_: Any) -> Iterator[Any]:
        seen.append(torch.get_float32_matmul_precision())
        yield Table("title", [{"who": "x", "µs": "1"}], "µs", "who")

    monkeypatch.setitem(benchmark._QUESTIONS, "growth", table)
    lines, _ = run("growth", tmp_path, capsys, "--matmul-precision", "medium")
    assert lines[-1] == "threads: 1; products of float32: medium"
    assert (seen, torch.get_float32_matmul_precision()) == (["medium"], "highest")


@pytest.mark.parametrize("peers", [[], list(per_sample.PEERS)], ids=["none", "all"])
def test_per_sample(
    peers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for peer in peers:
        pytest.importorskip(peer)
    monkeypatch.setattr(per_sample, "is_installed", lambda name: name in peers)
    lines, found = run("per-sample", tmp_path, capsys)
    if not peers:
        assert lines[5] == "left out, for it is not there: opacus, backpack"
    task = per_sample.problem((6, 5, 4), (3,), "cpu")
    names = [f"{c.what}, {c.name}" for c in per_sample.contenders(task)]
    for batch, table in zip(("3", "3×2"), found, strict=True):
        assert [(row["batch"], row["what, contender"]) for row in table] == [
            (batch, name) for name in names
        ]
        assert table[0]["what, contender"] == ".grad, plain"
        assert (table[0]["time"], table[0]["memory"]) == ("1.000", "1.000")


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(task: per_sample.Problem) -> list[per_sample.Contender]:
        *others, last = contenders(task)
        return [*others, replace(last, unit=2 * last.unit)]

    contenders = per_sample.contenders
    monkeypatch.setattr(per_sample, "contenders", wrong)
    monkeypatch.setattr(benchmark, "seconds", lambda *_: pytest.fail("was timed"))
    with pytest.raises(AssertionError, match="not close"):
        main(["per-sample", "--rounds", "2", "--folder", str(tmp_path)])


def test_networks_are_what_their_names_say() -> None:
    nets = networks((6, 5, 4), "cpu")
    assert [type(m) for m in nets["torch"]] == [torch.nn.Linear, torch.nn.Sigmoid] * 2
    assert [type(m) for m in nets["Linear, Sigmoid"]] == [Linear, Sigmoid] * 2
    assert [type(m) for m in nets["LinearSigmoid"]] == [LinearSigmoid] * 2


def test_unequal_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        nets = networks(*arguments)
        torch.nn.init.zeros_(nets["LinearSigmoid"][0].get_parameter("weight"))
        return nets

    monkeypatch.setattr(benchmark, "networks", wrong)
    with pytest.raises(AssertionError, match="not close"):
        forward_and_backward((6, 5, 4), 3, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["growth", "--budget", "-1"], "--budget must be at least 0; got -1"),
        (["growth", "--budget", "nan"], "--budget must be at least 0; got nan"),
        (["layers", "--threads", "0"], "--threads must be at least 1; got 0"),
        (
            ["layers", "--device", "tpu"],
            "must be cpu, or cuda where there is one; got tpu",
        ),
        (["sizes"], "layers"),
        (["sizes"], "per-sample"),
        (["--matmul-precision", "low"], "medium"),
        (["--folder", "/dev/null/results"], "--folder must be a place to write to"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(main, arguments, capsys)


@pytest.mark.skipif(
    not hasattr(torch.autograd.Function, "boxed_grads_call"), reason="needs torch 2.13"
)
@pytest.mark.parametrize("sizes", [(256,) * 5, (16,) * 5], ids=["weights", "activations"])
def test_the_fused_layer_holds_no_more_than_pytorchs_pair(sizes: tuple[int, ...]) -> None:
    """Where weights fill the memory, and where activations do."""
    contenders = forward_and_backward(sizes, 128, "cpu")
    peaks = {name: peak_bytes(call, "cpu") for name, call in contenders.items()}
    # PyTorch's own peak moves by a small gradient or two with the order in which it frees them.
    half_an_activation = 128 * sizes[0] * 4 / 2
    assert peaks["LinearSigmoid"] <= peaks["torch"] + half_an_activation
