"""What exists only on CUDA devices."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from manual_bp import QuadraticCost, convert
from tests.compatibility.subjects import Subject, every_subject

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.ReLU(), nn.Tanh())


# PyTorch captures the leaves on a stream of its own, and warns that they are from another.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@every_subject
def test_make_graphed_callables(subject: Subject) -> None:
    """A call captured in CUDA graphs, forward and backward, then replayed with other values."""
    arguments = tuple(
        t.requires_grad_() if t.is_floating_point() else t
        for t in subject.arguments(device="cuda", dtype=torch.float32)
    )
    wanted = [t for t in arguments if t.requires_grad]
    call: Any = torch.cuda.make_graphed_callables(subject.ours, arguments)
    for _ in range(3):
        with torch.no_grad():
            for t in wanted:
                t.copy_(torch.rand_like(t))
        output = call(*arguments)
        expected = subject.theirs(*arguments)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(output, expected)
        found = torch.autograd.grad(output, wanted, upstream)
        right = torch.autograd.grad(expected, wanted, upstream)
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_captured_training_step_matches_pytorchs(fuse: bool) -> None:
    net = network().cuda()
    theirs = copy.deepcopy(net)
    convert(net, fuse=fuse)
    cost = QuadraticCost()
    x, y = torch.randn(6, 8, device="cuda"), torch.rand(6, 16, device="cuda")
    steps: dict[nn.Module, Any] = {
        model: torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, theirs)
    }

    def step(model: nn.Module) -> None:
        steps[model].zero_grad(set_to_none=True)
        cost(model(x), y).backward()
        steps[model].step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(net)
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        step(theirs)
    for one, two in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_call_waits_for_the_device() -> None:
    net = network().cuda()
    convert(net)
    x, y = torch.randn(6, 8, device="cuda"), torch.rand(6, 16, device="cuda")
    cost = QuadraticCost()
    cost(net(x), y).backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        cost(net(x), y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
