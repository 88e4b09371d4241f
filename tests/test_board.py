"""Traces in TensorBoard, read back from the files that it would read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop, record
from manual_bp.board import LAYOUT, TraceBoard
from tests.helpers import logged_in


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
        TraceBoard(writer).log(trace, 7, learning_rate=0.5)
    logged = logged_in(tmp_path)
    expected: dict[str, float | None] = {}
    for layer in trace.diagnostics(0.5).layers:
        expected[f"delta/{layer.name}"] = layer.delta_norm
        expected[f"sat/{layer.name}"] = layer.saturated
        expected[f"grad/{layer.name}"] = layer.grad_norm
        expected[f"update/{layer.name}"] = layer.update
    known = {tag: value for tag, value in expected.items() if value is not None}
    assert set(expected) - set(known) == {"sat/2", "sat/4", "grad/2", "update/2"}
    assert set(logged.Tags()["scalars"]) == set(known)
    for tag, value in known.items():
        (point,) = logged.Scalars(tag)
        assert (point.step, point.value) == (7, pytest.approx(value, rel=1e-6))


def test_no_update_is_logged_without_a_learning_rate(tmp_path: Path, net: nn.Sequential) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        TraceBoard(writer).log(trace_of(net), 0)
    assert not [tag for tag in logged_in(tmp_path).Tags()["scalars"] if tag.startswith("update/")]


def test_writes_one_file_and_one_layout_that_includes_the_callers(
    tmp_path: Path, net: nn.Sequential
) -> None:
    mine = {"learning": {"cost": ["Multiline", ["cost/.*"]]}}
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer, mine)
        board.log(trace_of(net), 0)
        board.log_heat_map(0)
    assert [path.is_file() for path in tmp_path.rglob("*")] == [True]
    logged = logged_in(tmp_path)
    (event,) = logged.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert {category.title for category in layout.category} == {"learning", *LAYOUT}
    charts = {chart.title for category in layout.category for chart in category.chart}
    assert charts == {"cost", *LAYOUT["the terms of the four equations"]}


def test_histograms_omit_nonfinite_numbers_and_count_them(tmp_path: Path) -> None:
    net = nn.Sequential(Linear(6, 4), Sigmoid(), Linear(4, 2, bias=False), Sigmoid())
    trace = backprop(net, torch.randn(5, 6), torch.rand(5, 2), QuadraticCost())
    trace["0"].w.data[0, :2] = torch.nan  # .data does not count as an update
    trace["2"].w.data[:] = torch.inf
    with SummaryWriter(str(tmp_path)) as writer:
        TraceBoard(writer).log_histograms(trace, 1)
    logged = logged_in(tmp_path)
    names = {
        "weights/0", "biases/0", "activations/0", "errors/0", "activations/2", "errors/2",
    }  # fmt: skip
    assert set(logged.Tags()["histograms"]) == names
    assert logged.Histograms("weights/0")[0].histogram_value.num == 4 * 6 - 2
    assert logged.Histograms("activations/0")[0].histogram_value.num == 5 * 4
    assert logged.Histograms("errors/2")[0].histogram_value.num == 5 * 2
    assert logged.Scalars("nonfinite/weights/0")[0].value == 2
    assert logged.Scalars("nonfinite/weights/2")[0].value == 2 * 4


def test_a_layer_that_ran_twice_has_one_histogram(tmp_path: Path) -> None:
    layer = nn.Linear(6, 6)
    with record(layer) as trace:
        layer(layer(torch.randn(5, 6))).square().mean().backward()
    with SummaryWriter(str(tmp_path)) as writer:
        board = TraceBoard(writer)
        board.log_histograms(trace, 1)
        board.log(trace, 1)
    assert logged_in(tmp_path).Histograms("activations/")[0].histogram_value.num == 2 * 5 * 6


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
                    norms = {layer.name: layer.delta.norm().item() for layer in trace.layers}
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
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
        assert [image.step for image in logged_in(tmp_path).Images("error_of_every_layer")] == [60]

    def test_needs_a_logged_step_and_one_is_enough(
        self, tmp_path: Path, net: nn.Sequential
    ) -> None:
        with SummaryWriter(str(tmp_path)) as writer:
            board = TraceBoard(writer)
            with pytest.raises(RuntimeError, match="log must have been called before log_heat_map"):
                board.log_heat_map(0)
            board.log(trace_of(net), 1)
            board.log_heat_map(1)
        assert len(logged_in(tmp_path).Images("error_of_every_layer")) == 1


NAMES = [
    "a$", "a_", "a$b$", "a b", "x^2", "\\frac{", "$\\frac{$", "{", "}", "%s", "_x", "<b>", "/",
    "//a", " ", "-x24-", "$", "größe", "层", "😀", "é\u0301", "\n", "\x00", "\ud800", "W" * 5000,
]  # fmt: skip


def test_every_name_of_a_module_gets_a_distinct_tag_and_is_drawn(tmp_path: Path) -> None:
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
    logged = logged_in(tmp_path)
    found = {
        tag.split("/", 1)[1]: logged.Scalars(tag)[0].value
        for tag in logged.Tags()["scalars"]
        if tag.startswith("delta/")
    }
    norms = [layer.delta_norm for layer in trace.diagnostics().layers]
    assert sorted(found.values()) == pytest.approx(sorted(norms))
    assert {"a-x24-", "a_", "größe", "-x2d-x24-", "-x24-"} < set(found)
    for kind in ("weights", "biases", "activations", "errors"):
        assert set(logged.Tags()["histograms"]) >= {f"{kind}/{name}" for name in found}
    assert len(logged.Images("error_of_every_layer")) == 1
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shown = dict(zip(NAMES, labels, strict=True))
    assert len(set(labels)) == len(NAMES)
    assert max(map(len, labels)) <= 60
    assert all(shown[name] == name for name in ("a$b$", "\\frac{", "x^2", "größe"))
    assert (shown["\n"], shown["\ud800"], shown["层"]) == ("\\n", "\\ud800", "\\u5c42")
    assert shown["W" * 5000] == f"{29 * 'W'}…{29 * 'W'}"


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
    assert set(history[1]) == {"0", "2", "4"}
    assert len(logged_in(tmp_path).Tensors("custom_scalars__config__")) == 1
