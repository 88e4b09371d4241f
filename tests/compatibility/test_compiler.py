"""torch.compile with inductor, changing shapes and autocast; and what it refuses."""

import copy
import shutil
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.utils import parametrizations, prune

from manual_bp import Linear, LinearSigmoid, Sigmoid, convert
from tests.compatibility.subjects import LAYERS, Subject, every_subject
from tests.helpers import assert_same, differs_on_the_oldest, is_differentiable, leaf

pytestmark = [
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler"
    ),
    # Warnings of inductor about itself and the machine.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning"),
    pytest.mark.filterwarnings("ignore:Not enough SMs:UserWarning"),
    # The compiler reads .grad of every tensor.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def run(call: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    given = [leaf(t) if is_differentiable(t) else t for t in arguments]
    output = call(*given)
    (output.float() if output.dtype is torch.bfloat16 else output).pow(2).sum().backward()
    return [output.detach(), *[t.grad for t in given if t.grad is not None]]


@every_subject
def test_inductor_with_dynamic_shapes(subject: Subject, device: torch.device) -> None:
    compiled = torch.compile(subject.ours, fullgraph=True, dynamic=True)
    for leading in ((5,), (7,), (2,)):
        inputs = subject.inputs(*leading, device=device)
        arguments = (*inputs, *subject.arguments(device=device)[len(inputs) :])
        assert_same(run(compiled, arguments), run(subject.theirs, arguments))


@every_subject
def test_inductor_under_autocast(subject: Subject, device: torch.device) -> None:
    arguments = tuple(
        t.float() if t.is_floating_point() else t for t in subject.arguments(device=device)
    )

    def under_autocast(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def within(*arguments: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return call(*arguments)

        return within

    found = run(torch.compile(under_autocast(subject.ours), fullgraph=True), arguments)
    expected = run(under_autocast(subject.theirs), arguments)
    for one, two in zip(found, expected, strict=True):
        if subject in LAYERS:
            assert one.dtype is two.dtype
        torch.testing.assert_close(one, two.to(one.dtype), rtol=2e-2, atol=2e-2)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.Sigmoid(),
        nn.Linear(4, 4),
        nn.ReLU(True),
        nn.Linear(4, 2),
        nn.Softplus(),
    ).double()


def steps(model: Any, net: nn.Module) -> list[Tensor]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for rows in (5, 5, 7, 3):
        optimizer.zero_grad()
        loss = model(torch.randn(rows, 3).double()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("fuse", [True, False])
def test_inductor_trains_a_converted_model(fuse: bool) -> None:
    net, theirs = network(), network()
    convert(net, fuse=fuse)
    assert_same(steps(torch.compile(net, fullgraph=True, dynamic=True), net), steps(theirs, theirs))


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_compiled_layer_follows_its_options(dynamic: bool | None) -> None:
    """The compiler may make a variable of a float, also within a Function."""

    theirs = nn.Sequential(
        nn.Softplus(0.3),
        nn.LeakyReLU(0.3),
        nn.Softplus(2.5, 31.0),
        nn.Softplus(1.0, 0.7),
        nn.LeakyReLU(1.7),
        nn.Softplus(),
    ).double()
    ours = copy.deepcopy(theirs)
    convert(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, change in ((5, 1.0), (7, 1.5), (2, 0.4)):
        for net in (ours, theirs):
            softplus, leaky_relu = cast("nn.Softplus", net[0]), cast("nn.LeakyReLU", net[1])
            softplus.beta *= change
            leaky_relu.negative_slope *= change
        x = torch.randn(rows, 3, dtype=torch.float64)
        assert_same(run(compiled, (x,)), run(theirs, (x,)))


@differs_on_the_oldest  # keeps using PyTorch's layers
def test_conversion_after_compilation_is_noticed() -> None:
    net, theirs = network(), network()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(2, 3).double()
    before = compiled(x).grad_fn
    convert(net)
    assert type(compiled(x).grad_fn) is not type(before)
    assert_same(steps(compiled, net), steps(theirs, theirs))


def test_parametrised_and_pruned_models_can_be_compiled() -> None:
    for change in (
        lambda m: parametrizations.weight_norm(m),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ):
        net, theirs = network(), network()
        convert(net)
        for model in (net, theirs):
            change(model[0])
        compiled = torch.compile(net, backend="aot_eager")
        assert_same(steps(compiled, net), steps(theirs, theirs))


# What is refused, with the messages that docs/compatibility.md quotes.


@differs_on_the_oldest  # gives the right result there
def test_forward_mode_within_a_compiled_region_is_refused() -> None:
    net = nn.Sequential(Linear(3, 4), Sigmoid())

    def tangent(x: Tensor, t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            found: Any = forward_ad.unpack_dual(net(forward_ad.make_dual(x, t))).tangent
            return found  # type: ignore[no-any-return]

    x, t = torch.randn(5, 3), torch.randn(5, 3)
    with pytest.raises(Exception, match="You must implement the jvp function"):
        torch.compile(tangent, backend="aot_eager")(x, t)


def test_second_derivatives_of_a_compiled_region_are_refused_as_for_pytorchs_layers() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    for net in (nn.Sequential(Linear(3, 4), Sigmoid()), nn.Sequential(nn.Linear(3, 4), nn.Tanh())):
        torch._dynamo.reset()
        output = torch.compile(net, backend="aot_eager")(x)
        (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            grad.sum().backward()


def test_compiled_autograd() -> None:
    """The backward can be compiled too, except that of the fused layer, which is refused."""
    from torch._dynamo import compiled_autograd

    def backward_compiled(net: nn.Module) -> list[Tensor]:
        loss = net(torch.ones(5, 3).double()).square().mean()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    net, theirs = network(), network()
    convert(net)
    assert_same(backward_compiled(net), backward_compiled(theirs))
    if hasattr(Function, "boxed_grads_call"):  # 2.13 and later
        message = "boxed_grads_call=True on LinearSigmoidFunction is not"
        with pytest.raises(RuntimeError, match=message):
            backward_compiled(LinearSigmoid(3, 4).double())
    else:
        fused = LinearSigmoid(3, 4).double()
        pair = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()).double()
        pair[0].load_state_dict(fused.state_dict())
        assert_same(backward_compiled(fused), backward_compiled(pair))
