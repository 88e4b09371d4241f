import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from manual_bp import Linear, QuadraticCost, Sigmoid, Trace, backprop, record


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(Linear(5, 4), Sigmoid(), Linear(4, 2), Sigmoid())


@pytest.fixture
def trace(net: nn.Sequential) -> Trace:
    return backprop(net, torch.randn(6, 5), torch.rand(6, 2), QuadraticCost())


def test_layers_are_in_forward_order_and_found_by_name(net: nn.Sequential, trace: Trace) -> None:
    assert [layer.name for layer in trace.layers] == ["0", "2"]
    first, second = trace.layers
    assert trace["2"] is second
    assert first.w is net[0].weight
    assert second.b is net[2].bias
    shapes = [(6, 5), (6, 4), (6, 4), (6, 4), (4, 5), (4,)]
    fields = (first.a_prev, first.z, first.a, first.delta, first.grad_w, first.grad_b)
    assert [None if t is None else tuple(t.shape) for t in fields] == shapes
    assert torch.equal(first.a, second.a_prev)
    assert trace.output is second.a


def test_an_unknown_layer_raises_a_key_error_with_the_names(trace: Trace) -> None:
    with pytest.raises(KeyError, match="no layer '1' in this trace, which has '0', '2'"):
        trace["1"]


def test_assign_grads_adds_to_grad(net: nn.Sequential, trace: Trace) -> None:
    trace.assign_grads()
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert len(once) == 4
    assert torch.equal(once[0], trace.layers[0].grad_w)  # type: ignore[arg-type]
    trace.assign_grads()
    for parameter, grad in zip(net.parameters(), once, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * grad)


def test_changes_to_grad_do_not_affect_the_trace(net: nn.Sequential, trace: Trace) -> None:
    kept = trace["0"].grad_w
    assert kept is not None
    before = kept.clone()
    trace.assign_grads()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-6)
    trace.assign_grads()
    assert torch.equal(kept, before)


def test_an_optimizer_can_step_with_assigned_gradients(net: nn.Sequential) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    x, y, cost = torch.randn(6, 5), torch.rand(6, 2), QuadraticCost()
    costs = []
    for _ in range(30):
        optimizer.zero_grad()
        trace = backprop(net, x, y, cost)
        trace.assign_grads()
        optimizer.step()
        costs.append(trace.cost.item())
    assert costs[-1] < costs[0] / 2


def test_gradients_made_in_inference_mode_can_be_added_to(net: nn.Sequential) -> None:
    x, y, cost = torch.randn(6, 5), torch.rand(6, 2), QuadraticCost()
    with torch.inference_mode():
        backprop(net, x, y, cost).assign_grads()
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    cost(net(x), y).backward()
    for parameter, grad in zip(net.parameters(), once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_repr_is_short(trace: Trace) -> None:
    assert repr(trace["0"]) == "LayerTrace('0', 5 to 4)"
    assert repr(trace) == (
        f"Trace(cost={trace.cost.item():.6g}, "
        "layers=[LayerTrace('0', 5 to 4), LayerTrace('2', 4 to 2)])"
    )


@pytest.mark.parametrize(
    ("cost", "shown"),
    [
        (torch.tensor(0.25), "0.25"),
        (torch.tensor(0.25, requires_grad=True), "0.25"),
        (torch.tensor(torch.nan, dtype=torch.bfloat16), "nan"),
        (torch.tensor(1 + 2j), "1+2j"),
        (torch.tensor(3), "3"),
        (torch.tensor(0.0, device="meta"), "tensor(..., device='meta', size=())"),
        (torch.tensor([0.5, 0.25]), "tensor([0.5000, 0.2500])"),
        (torch.zeros(0), "tensor([])"),
    ],
)
def test_repr_shows_any_cost(cost: torch.Tensor, shown: str) -> None:
    assert repr(Trace(cost, None, (), {})) == f"Trace(cost={shown}, layers=[])"


def test_repr_works_without_values(device: torch.device) -> None:
    """On the meta device, for fake tensors and under a transform; elsewhere it shows the number."""
    net = nn.Sequential(Linear(5, 4)).to(device)
    x, y = torch.randn(6, 5, device=device), torch.rand(6, 4, device=device)
    trace = backprop(net, x, y, QuadraticCost())
    assert repr(trace).startswith(f"Trace(cost={trace.cost.item():.6g}, layers=[")

    def shown(x: torch.Tensor) -> torch.Tensor:
        text = repr(Trace(x, None, (), {}))
        assert text.startswith("Trace(cost=")
        assert "Tensor(" in text
        return x

    torch.func.vmap(shown)(torch.randn(3, device=device))
    with FakeTensorMode():
        fake = torch.zeros((), device=device)
    shown(fake)
    with record(net.to("meta")) as recorded:
        net(x.to("meta")).square().sum(-1).mean().backward()
    text = "Trace(cost=tensor(..., device='meta', size=()), layers=[LayerTrace('0', 5 to 4)])"
    assert repr(recorded) == text
