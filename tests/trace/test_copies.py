"""A Trace that was copied, pickled or saved gives the same results as the original."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from manual_bp import Linear, LinearSigmoid, QuadraticCost, Sigmoid, Trace, backprop, record
from manual_bp.trace import LayerTrace
from tests.helpers import assert_same


def saved(trace: Any) -> Any:
    file = io.BytesIO()
    torch.save(trace, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent(trace: Any) -> Any:
    """As if to another process."""
    return pickle.loads(ForkingPickler.dumps(trace))


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda trace: pickle.loads(pickle.dumps(trace)),
    "save": saved,
    "send": sent,
    "twice": lambda trace: copy.deepcopy(pickle.loads(pickle.dumps(trace))),
}
# A trace that is sent to another process shares its memory with the original.
ways_that_copy_memory = pytest.mark.parametrize("way", ["deepcopy", "pickle"])
every_way_but_copy = pytest.mark.parametrize("way", [way for way in WAYS if way != "copy"])


class Attention(nn.Module):
    """Several layers that read the same input, and one that reads a view."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).mT, -1)
        h = weights @ torch.relu(self.v(x))
        return torch.sigmoid(self.last(h.flatten(1)))


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).flatten(1))[:, :, None]  # type: ignore[no-any-return]


def weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(normed, nn.Sigmoid(), nn.Linear(5, 2))


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.ReLU(inplace=True), nn.Linear(4, 2))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 5), nn.Sigmoid())
    return net.append(nn.Linear(5, 2)).requires_grad_(False).append(LinearSigmoid(2, 2))


def recorded(net: nn.Module, rows: int = 2) -> Trace:
    dtype = next(net.parameters()).dtype
    x = torch.randn(9, rows, 4).to(dtype).requires_grad_()
    with record(net) as trace:
        z = net(x)
        QuadraticCost()(z, torch.rand(z.shape).to(dtype)).backward()
    return trace


def explicit() -> Trace:
    net = nn.Sequential(Linear(4, 5), Sigmoid(), Linear(5, 3), Linear(3, 2))
    return backprop(net, torch.randn(9, 4), torch.rand(9, 2), QuadraticCost())


TRACES: dict[str, Callable[[], Trace]] = {
    "backprop": explicit,
    "record": lambda: recorded(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))),
    "fused": lambda: recorded(nn.Sequential(LinearSigmoid(4, 5), nn.Linear(5, 2))),
    "attention": lambda: recorded(Attention()),
    "views": lambda: recorded(Views()),
    "weight norm": lambda: recorded(weight_norm()),
    "twice": lambda: recorded(twice()),
    "frozen": lambda: recorded(frozen()),
    "half": lambda: recorded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()),
    "part": lambda: next(recorded(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).split(4)),
}
traces = pytest.mark.parametrize("make", TRACES.values(), ids=TRACES)


OF_LAYERS: list[Callable[[LayerTrace], Any]] = [
    lambda layer: (layer.grad_w, layer.grad_b, layer.w, layer.b),
    lambda layer: (layer.per_sample_grad_w(), layer.per_sample_grad_b()),
    lambda layer: [[call.a_prev, call.z, call.a, call.delta] for call in layer.calls],
]


def answers(trace: Trace) -> list[Any]:
    """The result of everything that a trace can be asked for, or the error."""
    asked: list[Callable[[], Any]] = [
        lambda: str(trace.diagnostics(0.1)),
        lambda: trace.diagnostics(0.1).layers,
        lambda: trace.per_sample_norms(),
        lambda: trace.per_sample_grads(),
        lambda: trace.clipped_grads(0.1),
        lambda: [part.per_sample_norms() for part in trace.split(4)],
        lambda: repr(trace),
        lambda: (trace.cost, trace.output, trace.missed, trace.elsewhere),
    ]
    for layer in trace.layers:
        asked += [partial(ask, layer) for ask in OF_LAYERS]
    found = []
    for ask in asked:
        try:
            found.append(ask())
        except (RuntimeError, ValueError) as refusal:
            found.append(str(refusal))
    return found


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and is_same(list(one.values()), list(other.values()))
    return bool(one == other)


@traces
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_gives_the_same_results(make: Callable[[], Trace], way: str) -> None:
    trace = make()
    expected = answers(trace)
    found = WAYS[way](trace)
    assert not [answer for answer in expected[:4] if "still be those" in str(answer)]
    assert is_same(answers(found), expected)
    assert is_same(answers(trace), expected)


@pytest.mark.parametrize("name", ["backprop", "record", "fused", "attention", "twice"])
@ways_that_copy_memory
def test_only_the_copy_detects_writes_to_its_tensors(name: str, way: str) -> None:
    """In the same layers as the original would, where tensors share memory."""
    torch.manual_seed(0)
    trace = TRACES[name]()
    expected = answers(trace)
    for i, layer in enumerate(trace.layers):
        for j in range(len(layer.calls)):
            for tensor in ("a_prev", "z", "a", "delta"):
                torch.manual_seed(0)
                found, original = WAYS[way](trace), TRACES[name]()
                assert is_same(answers(original), expected)
                for written in (found, original):
                    getattr(written.layers[i].calls[j], tensor).add_(1)
                assert tensor in found.layers[i].calls[j].changed
                assert is_same(answers(found), answers(original))
    assert is_same(answers(trace), expected)


@pytest.mark.parametrize("make", [TRACES["record"], TRACES["backprop"], TRACES["attention"]])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_knows_of_writes_before_the_copy(make: Callable[[], Trace], way: str) -> None:
    for name in ("a_prev", "z", "a", "delta", "w"):
        trace = make()
        with torch.no_grad():
            getattr(trace.layers[-1], name).add_(1)
        expected = answers(trace)
        assert "still be those" in str(expected[0]) + str(expected[2])
        assert is_same(answers(WAYS[way](trace)), expected)


@every_way_but_copy
def test_a_copy_detects_updates_of_its_own_weights_only(way: str) -> None:
    trace = TRACES["record"]()
    found = WAYS[way](trace)
    torch.optim.SGD([trace.layers[0].w], 0.1).step()
    assert isinstance(answers(found)[1], tuple)
    with torch.no_grad():
        found.layers[0].w.add_(1)
    with pytest.raises(RuntimeError, match="the weights of layer '0' must still be those"):
        found.diagnostics()


@ways_that_copy_memory
def test_views_do_not_share_memory_in_a_copy(way: str) -> None:
    """Otherwise a write to a would change the a_prev that is a view of it, undetected."""
    trace = TRACES["views"]()
    found = WAYS[way](trace)
    found["first"].a.zero_()
    found.output.zero_()
    assert torch.equal(found["last"].a_prev, trace["last"].a_prev)
    assert torch.equal(found["last"].a, trace["last"].a)
    assert found["first"].calls[0].changed == {"z", "a"}
    assert found["last"].calls[0].changed == set()
    assert torch.equal(found.per_sample_norms(), trace.per_sample_norms())


@every_way_but_copy
def test_the_output_of_a_copy_is_its_last_a(way: str) -> None:
    found = WAYS[way](TRACES["record"]())
    found.output.zero_()
    assert found.layers[-1].calls[0].changed == {"z", "a"}


def test_shallow_copies_share_tensors_and_detect_writes() -> None:
    trace = TRACES["record"]()
    found = copy.copy(trace)
    assert found.layers is trace.layers
    for part in (trace.layers[0], trace.layers[0].calls[0]):
        assert copy.copy(part).a_prev is part.a_prev
        assert vars(copy.copy(part)) == vars(part)
    trace.layers[0].delta.zero_()
    assert is_same(answers(found), answers(trace))
    assert copy.copy(trace.layers[0]).calls[0].changed == {"delta"}


@every_way_but_copy
def test_split_of_a_copy_gives_the_same_results(way: str) -> None:
    trace = TRACES["record"]()
    for part, expected in zip(WAYS[way](trace).split(4), trace.split(4), strict=True):
        assert is_same(answers(part), answers(expected))
    found = WAYS[way](trace)
    first, *_ = found.split(4)
    found.layers[0].a_prev[8].zero_()
    with pytest.raises(RuntimeError, match="a_prev and delta must still be those of the pass"):
        first.per_sample_norms()


@every_way_but_copy
def test_a_layer_can_be_copied_alone_and_with_its_model(way: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))
    trace = recorded(net)
    layer = WAYS[way](trace["0"])
    assert_same([layer.per_sample_grad_w()], [trace["0"].per_sample_grad_w()], rtol=0)  # type: ignore[list-item]
    if way != "send":  # a parameter is sent as another object each time
        net_copy, found = WAYS[way]((net, trace))
        assert found["0"].w is net_copy[0].weight


def test_an_unfilled_trace_can_be_copied() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    with record(net) as trace:
        for way in (copy.copy, copy.deepcopy, saved):
            assert repr(way(trace)) == "Trace(not filled yet)"
        net(torch.randn(3, 4)).sum().mul(1).backward()
    assert "layers" in vars(trace)


def test_a_trace_made_in_inference_mode_can_be_copied() -> None:
    net = nn.Sequential(Linear(4, 5), Sigmoid(), Linear(5, 2))
    with torch.inference_mode():
        trace = backprop(net, torch.randn(9, 4), torch.rand(9, 2), QuadraticCost())
    for way in ("copy", "pickle", "save"):
        assert is_same(answers(WAYS[way](trace)), answers(trace))


def test_a_trace_on_the_meta_device_can_be_copied() -> None:
    net = nn.Sequential(Linear(4, 5), Sigmoid(), Linear(5, 2)).to("meta")
    x, y = torch.randn(9, 4, device="meta"), torch.rand(9, 2, device="meta")
    trace = backprop(net, x, y, QuadraticCost())
    assert copy.deepcopy(trace)["2"].per_sample_grad_w().shape == (9, 2, 5)  # type: ignore[union-attr]
