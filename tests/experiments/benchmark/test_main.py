"""Every question on small networks: what is printed and written, and what happens on failure."""

import csv
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmark import __main__ as command
from experiments.benchmark import backward, growth, layers, measure, per_sample, step
from experiments.benchmark.__main__ import main
from experiments.benchmark.contender import Contender, Result
from experiments.benchmark.contenders import samples
from experiments.benchmark.problem import problem
from experiments.benchmark.report import Table
from tests.helpers import refusal


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small networks, and no compiler, since compiling takes a while.

    For per-sample results, the second network has samples of several rows.
    """
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    monkeypatch.setattr(measure, "TURN", 0.002)
    for question in (step, layers):
        monkeypatch.setattr(question, "NETS", [((6, 5, 4), 3), ((6, 4), 2)])
    monkeypatch.setattr(per_sample, "NETS", [((6, 5, 4), (3,)), ((6, 5, 4), (3, 2))])
    for name, value in {
        "DEPTHS": (1, 2, 3),
        "DEPTH_WIDTH": 8,
        "BATCHES": (2, 4),
        "BATCH_SIZES": (6, 5, 4),
    }.items():
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr(backward, "WIDTHS", (8, 16))
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


def run(
    question: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
    notes: int = 0,
    code: int = 0,
) -> Any:
    """The lines before the tables, and the tables; they are the same in all that was written.

    Some rows have notes instead of figures, and the run ends with an exit code.
    """
    arguments = [question, "--rounds", "2", "--folder", str(folder), *more]
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert bool(printed.err) == bool(code)
    assert f"written: {folder / question}.md" in printed.out
    found = tables(printed.out)
    page = (folder / f"{question}.md").read_text("utf-8")
    assert tables(page) == found
    with (folder / f"{question}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, found))
    for read, row in zip(rows, [row for table in found for row in table], strict=True):
        assert {name: read[name] for name in row} == row
    assert sum(bool(row.get("note")) for row in rows) == notes
    assert (folder / f"{question}.png").read_bytes().startswith(b"\x89PNG")
    lines = printed.out.split("\n\n")[0].splitlines()
    assert all(f"- {line}" in page.splitlines() for line in lines)
    return lines, found


def test_step_compares_all_contenders_on_each_net_and_their_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, (first, second, *adam, memory) = run("step", tmp_path / "new", capsys)
    assert lines[0].startswith("command: python -m experiments.benchmark step --rounds 2 --folder")
    assert f"torch {version('torch')}" in lines[2]
    assert lines[4] == "threads: 1; float32 matrix products: highest"
    assert lines[5].startswith("left out, not available: a C++ compiler")
    names = [row["contender"] for row in first]
    assert names[:4] == ["ours", "ours, 32 networks", "torch, SGD", "torch, fused SGD"]
    assert "NumPy" in names
    assert names[-1] == "bare products"
    for of_sgd, of_adam in zip((first, second), adam, strict=True):
        assert of_adam[0]["net"] == of_sgd[0]["net"]
        assert [row["contender"] for row in of_adam][:2] == ["ours", "torch, Adam"]
    assert [row["net"] for row in (first[0], second[0])] == ["6-5-4", "6-4"]
    assert (first[0]["times ours"], first[-1]["times the products"]) == ("1.000", "1.000")
    assert all(float(row["µs"]) > 0 for row in first + second)
    assert [row["net, contender"] for row in memory][:2] == [
        "6-5-4, batch 3: ours",
        "6-5-4, batch 3: torch, SGD",
    ]
    assert memory[0]["activations alone, MB"] == f"{3 * 9 * 4 / 1e6:.3f}"
    assert memory[0]["parameters, MB"] == f"{59 * 4 / 1e6:.3f}"


def test_growth_goes_over_layers_and_over_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (depth, batch) = run("growth", tmp_path, capsys)
    names = ["ours", "torch, SGD", "bare products"]
    assert [(r["contender"], r["layers"]) for r in depth] == [(n, d) for n in names for d in "123"]
    assert [(r["contender"], r["samples"]) for r in batch] == [(n, d) for n in names for d in "24"]
    for row in depth:
        each = float(row["µs per layer"])
        assert each == pytest.approx(float(row["µs"]) / int(row["layers"]), abs=0.06)
    for row in batch:  # a line through two points
        assert row["linear fit, µs"] == row["µs"]


@pytest.mark.parametrize("question", ["growth", "backward", "layers"])
def test_the_budget_bounds_the_rounds_and_each_table_says_how_many(
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
    """Two for each layer, except for BP2 of the first, which nothing needs."""
    _, (table,) = run("backward", tmp_path, capsys)
    assert [row["width"] for row in table] == ["8", "16"]
    for row in table:
        products = 3 * 2 * 128 * int(row["width"]) ** 2
        assert float(row["operations, forward"]) == pytest.approx(products, rel=0.01)
        assert row["times forward"] == f"{5 / 3:.3f}"
        assert float(row["products, timed"]) > 0 < float(row["autograd, timed"])


def test_layers_compares_each_call_and_each_net(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (each, *nets) = run("layers", tmp_path, capsys)
    assert [row["forward, 10 samples, 30 to 10"] for row in each] == list(layers.calls("cpu"))
    for net, table in zip(("6-5-4", "6-4"), nets, strict=True):
        assert [row["layers"] for row in table] == ["torch", "Linear, Sigmoid", "LinearSigmoid"]
        assert table[0]["net"] == net
        assert table[0]["time"] == table[0]["memory"] == "1.000"


@pytest.mark.parametrize("peers", [[], list(per_sample.PEERS)], ids=["none", "all"])
def test_per_sample_compares_the_libraries_that_are_installed(
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
        assert lines[5] == "left out, not available: opacus, backpack"
    task = samples.samples(problem((6, 5, 4), 3, "cpu"))
    names = [contender.name for contender in per_sample.contenders(task)]
    for batch, table in zip(("3", "3×2"), found, strict=True):
        assert [(row["batch"], row["what, contender"]) for row in table] == [
            (batch, name) for name in names
        ]
        assert table[0]["what, contender"] == ".grad, plain"
        assert (table[0]["time"], table[0]["memory"]) == ("1.000", "1.000")


def test_the_precision_of_products_is_set_and_then_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def table(_: Any) -> Iterator[Any]:
        seen.append(torch.get_float32_matmul_precision())
        yield Table("title", [{"who": "x", "µs": "1"}], "µs", "who")

    monkeypatch.setitem(command._QUESTIONS, "growth", (table, lambda _: []))
    lines, _ = run("growth", tmp_path, capsys, "--matmul-precision", "medium")
    assert lines[-1] == "threads: 1; float32 matrix products: medium"
    assert (seen, torch.get_float32_matmul_precision()) == (["medium"], "highest")


def planted(
    contenders: Callable[..., list[Contender]], name: str, fault: Callable[[Contender], None]
) -> Callable[..., list[Contender]]:
    """The contenders, with a fault in the one of that name."""

    def make(*arguments: Any) -> list[Contender]:
        found = contenders(*arguments)
        (one,) = (contender for contender in found if contender.name == name)
        fault(one)
        return found

    return make


def is_inexact(contender: Contender) -> None:
    """Make each result off by 1 %, and the contender fail if it is called for anything else."""
    results = contender.results

    def wrong() -> list[Result]:
        found = [Result(1.01 * found, right, allowed) for found, right, allowed in results()]
        contender.call = lambda: pytest.fail("was timed")
        return found

    contender.results = wrong


def raises(contender: Contender) -> None:
    def call() -> None:
        raise RuntimeError("not supported on this device")

    contender.call = call


INEXACT = re.compile(r"inexact: off by \d\.\de-\d\d, \d\.\de-\d\d allowed")
RAISES = re.compile("RuntimeError: not supported on this device")

ONLY_COMPILER = {name: p for name, p in step.PEERS.items() if "compiler" in name}  # missing here

every_fault = pytest.mark.parametrize(
    ("fault", "note"), [(is_inexact, INEXACT), (raises, RAISES)], ids=["inexact", "raises"]
)


@every_fault
@pytest.mark.parametrize(
    ("module", "question", "name", "column"),
    [
        (step, "step", "torch, fused SGD", "contender"),
        (per_sample, "per-sample", "clipped, torch.func", "what, contender"),
    ],
    ids=["step", "per-sample"],
)
def test_a_peer_that_fails_gets_a_note_and_the_others_go_on(
    module: Any,
    question: str,
    name: str,
    column: str,
    fault: Callable[[Contender], None],
    note: re.Pattern[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place, value in {"PEERS": ONLY_COMPILER, "SGD_PEERS": {}, "LARGEST_OF_MANY": 0}.items():
        monkeypatch.setattr(step, place, value)
    monkeypatch.setattr(module, "contenders", planted(module.contenders, name, fault))
    _, found = run(question, tmp_path, capsys, notes=2)
    for table in found[:2]:
        assert list(table[0])[-1] == "note"
        (failed,) = (row for row in table if row[column] == name)
        assert note.fullmatch(failed.pop("note"))
        assert [head for head, cell in failed.items() if cell] == ["net", "batch", column]
        for row in table:
            if row is not failed:
                assert all(cell for head, cell in row.items() if head != "note")


@every_fault
@pytest.mark.parametrize(
    ("module", "question", "name", "ratio"),
    [
        (step, "step", "ours", "times ours"),
        (per_sample, "per-sample", "norms, ours", "time"),
    ],
    ids=["step", "per-sample"],
)
def test_our_own_failure_ends_the_run_with_exit_code_1_after_the_tables_are_written(
    module: Any,
    question: str,
    name: str,
    ratio: str,
    fault: Callable[[Contender], None],
    note: re.Pattern[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for place, value in {"PEERS": ONLY_COMPILER, "SGD_PEERS": {}, "LARGEST_OF_MANY": 0}.items():
        monkeypatch.setattr(step, place, value)
    monkeypatch.setattr(module, "contenders", planted(module.contenders, name, fault))
    errors: list[str] = []
    printed = capsys.readouterr

    def readouterr() -> Any:
        found = printed()
        errors.extend(found.err.splitlines())
        return found

    monkeypatch.setattr(capsys, "readouterr", readouterr)
    _, found = run(question, tmp_path, capsys, notes=2, code=1)
    assert len(errors) == 2
    for error in errors:
        said, found_note = error.rsplit(f": {name}: ", 1)
        assert re.fullmatch(r"our own code failed: [\w -]+, batch \S+", said)
        assert note.fullmatch(found_note)
    if question == "step":  # there is nothing to compare with
        assert not any(row[ratio] for table in found[:2] for row in table)
        assert all(row["µs"] for table in found[:2] for row in table[1:])


def test_a_layer_of_ours_that_is_inexact_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = layers.calls

    def calls(device: str) -> Any:
        found = real(device)
        theirs, ours = found["tanh"]
        return found | {"tanh": (theirs, lambda: 1.01 * ours())}

    def networks(*arguments: Any) -> Any:
        nets = real_networks(*arguments)
        torch.nn.init.zeros_(nets["LinearSigmoid"][0].get_parameter("weight"))
        return nets

    real_networks = layers.networks
    monkeypatch.setattr(layers, "calls", calls)
    monkeypatch.setattr(layers, "networks", networks)
    _, (each, *nets) = run("layers", tmp_path, capsys, notes=3, code=1)
    (tanh,) = (row for row in each if row["note"])
    assert tanh["forward, 10 samples, 30 to 10"] == "tanh"
    assert tanh["note"].startswith("tanh, ours: inexact: off by ")
    assert not tanh["extra, µs"]
    for table in nets:
        assert [bool(row["note"]) for row in table] == [False, False, True]
        assert [bool(row["time"]) for row in table] == [True, True, False]


def test_growth_and_backward_go_on_without_a_contender_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setitem(growth.MAKERS, "torch, SGD", fail)
    monkeypatch.setattr(backward, "autograd_passes", fail)
    _, (depth, batch) = run("growth", tmp_path, capsys, notes=5)
    assert [row["note"] for row in depth] == [""] * 3 + ["out of memory"] * 3 + [""] * 3
    assert [row["linear fit, µs"] == "" for row in batch] == [False] * 2 + [True] * 2 + [False] * 2
    _, (table,) = run("backward", tmp_path, capsys, notes=2)
    for row in table:
        assert row["note"] == "autograd: out of memory"
        assert float(row["products, timed"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["growth", "--budget", "-1"], "--budget must be at least 0; got -1"),
        (["growth", "--budget", "nan"], "--budget must be at least 0; got nan"),
        (["layers", "--threads", "0"], "--threads must be at least 1; got 0"),
        (
            ["layers", "--device", "tpu"],
            "must be cpu, or cuda if PyTorch finds such a device; got tpu",
        ),
        (["sizes"], "layers"),
        (["sizes"], "per-sample"),
        (["--matmul-precision", "low"], "medium"),
        (["--folder", "/dev/null/results"], "--folder must be a place to write to"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(main, arguments, capsys)
