"""Traces in TensorBoard, read back from the files that it would read."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop, record
from manual_bp.board import CHARTS, HEAT_MAP, TraceBoard
from tests.helpers import logged_below, logged_in

HISTOGRAMS = ("activations a", "biases b", "errors δ", "weights w")


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(Linear(6, 4), Sigmoid(), nn.Linear(4, 3), nn.GELU(), Linear(3, 2))


def trace_of(net: nn.Module) -> Trace:
    with record(net) as trace:
        QuadraticCost()(net(torch.randn(5, 6)), torch.rand(5, 2)).backward()
    return trace


def test_scalars_are_those_of_the_diagnostics(tmp_path: Path, net: nn.Sequential) -> None:
    net[2].weight.requires_grad_(False)
    trace = trace_of(net)
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log(trace, 7, learning_rate=0.5)
    logged = logged_below(tmp_path)
    folders = ["1 6→4 sigmoid", "2 4→3", "3 3→2"]
    assert sorted(logged) == [".", *folders]
    missing = set()
    for folder, layer in zip(folders, trace.diagnostics(0.5).layers, strict=True):
        expected = {
            "2. layers/log₁₀ ‖δ‖": layer.delta_norm,
            "2. layers/log₁₀ ‖∂C∕∂w‖": layer.grad_norm,
            "2. layers/log₁₀ update÷weights": layer.update,
            "2. layers/saturated share": layer.saturated,
        }
        known = {tag: value for tag, value in expected.items() if value is not None}
        assert set(logged[folder].Tags()["scalars"]) == set(known)
        for tag, value in known.items():
            (point,) = logged[folder].Scalars(tag)
            right = math.log10(value) if "log" in tag else value
            assert (point.step, point.value) == (7, pytest.approx(right, rel=1e-6))
        missing |= {(layer.name, tag.split("/")[1]) for tag in expected.keys() - known}
    assert missing == {
        ("2", "saturated share"), ("4", "saturated share"),
        ("2", "log₁₀ ‖∂C∕∂w‖"), ("2", "log₁₀ update÷weights"),
    }  # fmt: skip


def test_a_layer_without_a_plain_number_is_called_by_its_name(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("encoder", nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    net.add_module("head", Linear(5, 2))
    trace = trace_of(net)
    assert trace.labels == {"encoder.0": "encoder.0: 6→5 relu", "head": "head: 5→2"}
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log(trace, 0)
    assert set(logged_below(tmp_path)) == {".", "encoder.0 6→5 relu", "head 5→2"}


def test_no_update_is_logged_without_a_learning_rate(tmp_path: Path, net: nn.Sequential) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log(trace_of(net), 0)
    for log in logged_below(tmp_path).values():
        assert not [tag for tag in log.Tags()["scalars"] if "update" in tag]


def test_an_error_of_zero_has_no_logarithm_and_no_point(tmp_path: Path) -> None:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2))
    nn.init.zeros_(net[2].get_parameter("weight"))
    trace = backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log(trace, 0)
    logged = logged_below(tmp_path)
    assert "2. layers/log₁₀ ‖δ‖" in logged["2 4→2"].Tags()["scalars"]
    assert logged["1 6→4 sigmoid"].Tags()["scalars"] == ["2. layers/saturated share"]


def test_every_chart_has_a_description_for_tensorboard(tmp_path: Path, net: nn.Sequential) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        trace = trace_of(net)
        board.log(trace, 0, learning_rate=0.1)
        board.log_histograms(trace, 0)
        board.log_heat_map(0)
    described = {**dict(CHARTS.values()), **dict([HEAT_MAP])}
    seen = set()
    for log in logged_below(tmp_path).values():
        tags = log.Tags()
        for tag in (*tags["scalars"], *tags["histograms"], *tags["images"]):
            metadata = log.SummaryMetadata(tag)
            assert metadata.summary_description == described[tag]
            assert metadata.data_class  # or TensorBoard's fast loader drops the description
            seen.add(tag)
    assert seen == set(described)


def test_histograms_omit_nonfinite_numbers_and_count_them(tmp_path: Path) -> None:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2, bias=False), Sigmoid())
    trace = backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())
    trace["0"].w.data[0, :2] = torch.nan  # .data does not count as an update
    trace["2"].w.data[:] = torch.inf
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log_histograms(trace, 1)
    logged = logged_below(tmp_path)
    first, second = logged["1 6→4 sigmoid"], logged["2 4→2 sigmoid"]
    a, b, delta, w = (f"3. distributions/{each}" for each in HISTOGRAMS)
    assert set(first.Tags()["histograms"]) == {a, b, delta, w}
    assert set(second.Tags()["histograms"]) == {a, delta}
    assert first.Histograms(w)[0].histogram_value.num == 4 * 6 - 2
    assert first.Histograms(a)[0].histogram_value.num == 5 * 4
    assert second.Histograms(delta)[0].histogram_value.num == 5 * 2
    assert first.Scalars("nonfinite/weights")[0].value == 2
    assert second.Scalars("nonfinite/weights")[0].value == 2 * 4


def test_a_layer_that_ran_twice_has_one_histogram(tmp_path: Path) -> None:
    layer = nn.Linear(6, 6)
    with record(layer) as trace:
        layer(layer(torch.randn(5, 6))).square().mean().backward()
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log_histograms(trace, 1)
        board.log(trace, 1)
    (log,) = (log for name, log in logged_below(tmp_path).items() if name != ".")
    assert log.Histograms("3. distributions/activations a")[0].histogram_value.num == 2 * 5 * 6


class TestHeatMap:
    def test_colours_are_logarithms_of_the_norms(self, tmp_path: Path) -> None:
        net: Any = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2))
        traces = {step: trace_of(net) for step in (0, 5, 50)}
        with torch.no_grad():
            net[2].weight.zero_()  # δ of the first layer is 0 from here on
        traces[60] = trace_of(net)
        with SummaryWriter(str(tmp_path)) as writer:
            board = TraceBoard(writer)
            for step, trace in traces.items():
                if step == 60:
                    board.log(trace, step)
                else:
                    # log would refuse, since the weights were changed after these.
                    norms = {
                        trace.labels[layer.name]: layer.delta.norm().item()
                        for layer in trace.layers
                    }
                    board.history[step] = norms
            (axes, _) = board._heat_map().axes
            board.log_heat_map(60)
        (mesh,) = axes.collections
        found: Any = mesh.get_array()
        assert found.shape == (2, 4)
        for column, trace in enumerate(traces.values()):
            for row, layer in enumerate(trace.layers):
                if column == 3 and row == 0:
                    assert found.mask[row, column]
                else:
                    expected = layer.delta.norm().log10().item()
                    assert found[row, column] == pytest.approx(expected, abs=1e-5)
        names = ["1: 6→4 sigmoid", "2: 4→2"]
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        assert [image.step for image in logged_in(tmp_path).Images(HEAT_MAP[0])] == [60]

    def test_needs_a_logged_step_and_one_is_enough(
        self, tmp_path: Path, net: nn.Sequential
    ) -> None:
        with SummaryWriter(str(tmp_path)) as writer:
            board = TraceBoard(writer)
            with pytest.raises(RuntimeError, match="log must have been called before log_heat_map"):
                board.log_heat_map(0)
            board.log(trace_of(net), 1)
            board.log_heat_map(1)
        assert len(logged_in(tmp_path).Images(HEAT_MAP[0])) == 1


NAMES = [
    "a$", "a_", "a$b$", "a b", "x^2", "\\frac{", "$\\frac{$", "{", "}", "%s", "_x", "<b>", "/",
    "//a", " ", "-x24-", "$", "größe", "层", "😀", "é\u0301", "\n", "\x00", "\ud800", "W" * 5000,
]  # fmt: skip


def test_every_name_of_a_module_gets_a_folder_and_is_drawn(tmp_path: Path) -> None:
    """Without a warning."""
    net = nn.Sequential()
    for name in NAMES:
        net.add_module(name, Linear(2, 2))
    trace = backprop(net, torch.randn(5, 2), torch.rand(5, 2), QuadraticCost())
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log(trace, 1, learning_rate=0.1)
        board.log_histograms(trace, 1)
        board.log_heat_map(1)
        (axes, _) = board._heat_map().axes
    logged = logged_below(tmp_path)
    assert len(logged.pop(".").Images(HEAT_MAP[0])) == 1
    assert all(len(name) <= 60 and "/" not in name for name in logged)
    norms = [math.log10(layer.delta_norm) for layer in trace.diagnostics().layers]
    found = [log.Scalars("2. layers/log₁₀ ‖δ‖")[0].value for log in logged.values()]
    assert sorted(found) == pytest.approx(sorted(norms))
    assert {"a-x24- 2→2", "a_ 2→2", "größe 2→2", "-x2d-x24- 2→2", "-x24- 2→2"} < set(logged)
    for log in logged.values():
        assert len(log.Tags()["histograms"]) == 4
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shown = dict(zip(NAMES, labels, strict=True))
    assert len(set(labels)) == len(NAMES)
    assert max(map(len, labels)) <= 60
    assert all(shown[name] == f"{name}: 2→2" for name in ("a$b$", "\\frac{", "x^2", "größe"))
    escaped = {"\n": "\\n", "\ud800": "\\ud800", "层": "\\u5c42"}
    assert all(shown[name] == f"{text}: 2→2" for name, text in escaped.items())
    assert shown["W" * 5000] == f"{29 * 'W'}…{24 * 'W'}: 2→2"


def test_seconds_is_the_time_spent_in_all_logs(
    tmp_path: Path, net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 100, 3))
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        trace = trace_of(net)
        monkeypatch.setattr("manual_bp.board.time.perf_counter", lambda: next(now))
        board.log(trace, 0)
        board.log_histograms(trace, 0)
        monkeypatch.undo()
    assert board.seconds == 6


def test_logging_after_the_update_is_refused(tmp_path: Path, net: nn.Sequential) -> None:
    trace = trace_of(net)
    torch.optim.SGD(net.parameters(), 0.1).step()
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        with pytest.raises(
            RuntimeError, match=r"layer '0' must still be those of the pass; .* ask"
        ):
            board.log(trace, 0)
    assert not logged_in(tmp_path).Tags()["scalars"]


def test_import_needs_neither_tensorboard_nor_matplotlib() -> None:
    code = (
        "import sys; sys.modules['tensorboard'] = sys.modules['matplotlib'] = None\n"
        "import manual_bp, manual_bp.board"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_of_the_wrong_kind_are_refused(tmp_path: Path, net: nn.Sequential) -> None:
    with pytest.raises(TypeError, match="writer must be a SummaryWriter; got str"):
        TraceBoard("runs/mine")  # type: ignore[arg-type]
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        for log in (board.log, board.log_histograms):
            with pytest.raises(TypeError, match="trace must be a Trace; got Sequential"):
                log(net, 0)  # type: ignore[arg-type]


def test_a_board_goes_on_with_the_history_of_an_earlier_one(
    tmp_path: Path, net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[int, dict[str, float]]] = []
    heat_map = TraceBoard._heat_map

    def note(board: TraceBoard) -> Any:
        drawn.append(dict(board.history))
        return heat_map(board)

    monkeypatch.setattr(TraceBoard, "_heat_map", note)
    with SummaryWriter(str(tmp_path)) as writer:
        earlier = TraceBoard(writer)
        earlier.log(trace_of(net), 0)
        later = TraceBoard(writer, history=earlier.history)
        later.log(trace_of(net), 1)
        later.log_heat_map(1)
    assert list(earlier.history) == [0]  # it is copied
    (history,) = drawn
    assert list(history) == [0, 1]
    assert history[0] == earlier.history[0]
    assert set(history[1]) == {"1: 6→4 sigmoid", "2: 4→3", "3: 3→2"}


def test_what_was_logged_from_the_purge_step_on_is_dropped(
    tmp_path: Path, net: nn.Sequential
) -> None:
    trace = trace_of(net)
    for start, steps in ((None, (0, 5, 10)), (5, (5, 15))):
        with SummaryWriter(str(tmp_path), purge_step=start) as writer:
            board = TraceBoard(writer, purge_step=start)
            for step in steps:
                board.log(trace, step)
    for name, log in logged_below(tmp_path).items():
        if name != ".":
            assert [p.step for p in log.Scalars("2. layers/log₁₀ ‖δ‖")] == [0, 5, 15]


def test_a_closed_writer_is_refused(tmp_path: Path, net: nn.Sequential) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
    with pytest.raises(ValueError, match="writer must be open; it was closed"):
        board.log(trace_of(net), 0)
