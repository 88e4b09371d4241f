import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch

from experiments import benchmark, per_sample
from experiments.benchmark import calls, main, networks, peak_bytes, quartiles, seconds, steps
from manual_bp import Linear, LinearSigmoid, Sigmoid


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "NETS", [((6, 5, 4), 3)])
    threads = torch.get_num_threads()
    assert main(["layers", "--rounds", "2"]) == 0
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"torch {torch.__version__}, cpu, threads: 1"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert [row[0] for row in rows[2:10]] == list(calls("cpu"))
    names = ["torch", "Linear, Sigmoid", "LinearSigmoid"]
    assert [row[:3] for row in rows[-3:]] == [["6-5-4", "3", name] for name in names]
    assert rows[-3][4] == rows[-3][7] == "1.000"


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two small nets, the second with samples of several rows; and the number of threads kept."""
    monkeypatch.setattr(benchmark, "PER_SAMPLE_NETS", [((6, 5, 4), (3,)), ((6, 5, 4), (3, 2))])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("peers", [[], list(per_sample.PEERS)], ids=["none", "all"])
def test_per_sample_tables(
    peers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peer in peers:
        pytest.importorskip(peer)
    monkeypatch.setattr(per_sample, "is_installed", lambda name: name in peers)
    assert main(["per-sample", "--rounds", "2"]) == 0
    first, empty, *lines = capsys.readouterr().out.splitlines()
    assert (first, empty) == (f"torch {torch.__version__}, cpu, threads: 1", "")
    if not peers:
        assert lines[0] == "left out, not installed: opacus, backpack"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    heads = ["net", "batch", "what", "contender", "ms", "time", "quartiles", "peak, MB", "memory"]
    assert rows.count(heads) == 2
    rows = [row for row in rows if row[0] == "6-5-4"]
    task = per_sample.problem((6, 5, 4), (3,), "cpu")
    names = [[c.what, c.name] for c in per_sample.contenders(task)]
    batches = [[batch, *name] for batch in ("3", "3×2") for name in names]
    assert [row[1:4] for row in rows] == batches
    assert names[0] == [".grad", "plain"]
    plain = [row[5:7] + row[8:] for row in rows if row[3] == "plain"]
    assert plain == [["1.000", "1.000 to 1.000", "1.000"]] * 2


@pytest.mark.usefixtures("_tiny")
def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(task: per_sample.Problem) -> list[per_sample.Contender]:
        *others, last = contenders(task)
        return [*others, replace(last, unit=2 * last.unit)]

    contenders = per_sample.contenders
    monkeypatch.setattr(per_sample, "contenders", wrong)
    monkeypatch.setattr(benchmark, "seconds", lambda *_: pytest.fail("was timed"))
    with pytest.raises(AssertionError, match="not close"):
        main(["per-sample", "--rounds", "2"])


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
        steps((6, 5, 4), 3, "cpu")


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    calls = {"slow": lambda: turns.append("slow"), "fast": lambda: turns.append("fast")}
    taken = seconds(calls, 4, 1)
    assert [len(times) for times in taken.values()] == [4, 4]
    changes = sum(one != two for one, two in pairwise(turns))
    assert changes >= 7


def test_a_turn_of_a_slow_contender_is_one_call() -> None:
    turns: list[str] = []

    def slow() -> None:
        time.sleep(0.11)
        turns.append("slow")

    seconds({"slow": slow, "fast": lambda: turns.append("fast")}, 3, 1)
    counts = [(name, len(list(calls))) for name, calls in groupby(turns)]
    assert counts[-6::2] == [("slow", 1)] * 3
    assert all(count > 100 for _, count in counts[-5::2])


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000)

    def together() -> int:
        return len([torch.empty(1000) for _ in range(3)])

    assert peak_bytes(one_after_the_other, "cpu") == 4000
    assert peak_bytes(together, "cpu") == 12000


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert quartiles([2.0]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["layers", "--threads", "0"], "--threads must be at least 1; got 0"),
        (
            ["layers", "--device", "tpu"],
            "must be cpu, or cuda where there is one; got tpu",
        ),
        (["sizes"], "layers"),
        (["sizes"], "per-sample"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(
    not hasattr(torch.autograd.Function, "boxed_grads_call"), reason="needs torch 2.13"
)
@pytest.mark.parametrize("sizes", [(256,) * 5, (16,) * 5], ids=["weights", "activations"])
def test_the_fused_layer_holds_no_more_than_pytorchs_pair(sizes: tuple[int, ...]) -> None:
    """Where weights fill the memory, and where activations do."""
    contenders = steps(sizes, 128, "cpu")
    peaks = {name: peak_bytes(call, "cpu") for name, call in contenders.items()}
    # PyTorch's own peak moves by a small gradient or two with the order in which it frees them.
    half_an_activation = 128 * sizes[0] * 4 / 2
    assert peaks["LinearSigmoid"] <= peaks["torch"] + half_an_activation
