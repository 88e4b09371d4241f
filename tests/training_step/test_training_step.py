import copy
import gc
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from manual_bp import (
    Cost,
    LeakyReLU,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    ReLU,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step._pass import fresh_buffers
from manual_bp.training_step._training_step import MOST_PASSES
from tests.helpers import LAYOUTS, Operations
from tests.test_backprop import (
    DELTA1,
    DELTA2,
    GRAD_W1,
    GRAD_W2,
    LOSSES,
    X,
    Y,
    hand_worked_net,
    tensor,
)
from tests.training_step.networks import (
    ACTIVATIONS,
    COSTS,
    Reference,
    assert_follows,
    batch,
    network,
    values,
)

DESCENTS: list[dict[str, float]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.05},
]


class Autograd(Cost):
    """A cost of somebody's own: ours does not know it, and it asks autograd for its gradient."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        losses = (output - y).abs().pow(3).sum(-1)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    @torch.enable_grad()
    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        return torch.autograd.grad(self(output, y), output)[0]


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
every_cost = pytest.mark.parametrize("cost", COSTS, ids=repr)
every_descent = pytest.mark.parametrize(
    "descent", DESCENTS, ids=lambda d: "+".join(d) if d else "plain"
)


@pytest.mark.parametrize(("reduction", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_hand_worked_step(reduction: Any, weight: float) -> None:
    net = hand_worked_net()
    before = values(net)
    cost = TrainingStep(net, QuadraticCost(reduction), 0.3)(tensor(X), tensor(Y))
    torch.testing.assert_close(cost, tensor(weight * sum(LOSSES)), rtol=1e-14, atol=0)
    gradients = [GRAD_W1, DELTA1, GRAD_W2, DELTA2]
    for parameter, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        expected = old - 0.3 * weight * tensor(gradient).sum(0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=1e-16)


def follow(net: nn.Sequential, cost: Cost, steps: int, **descent: float) -> None:
    """Train beside autograd and SGD, with batches of several sizes, and two learning rates."""
    # A rounding error grows from step to step, but a wrong gradient is wrong by far more.
    tolerances: Any = {"rtol": 1e-11, "atol": 1e-13}
    if steps > 10:
        tolerances = {"rtol": 1e-8, "atol": 1e-10}
    step, reference = (
        TrainingStep(net, cost, 0.05, **descent),
        Reference(net, cost, 0.05, **descent),
    )
    takes_indices = isinstance(cost, SoftmaxCrossEntropyCost)
    for number in range(steps):
        if number == steps // 2:
            step.lr = 0.02
            reference.set_lr(0.02)
        samples = (8, 8, 3, 11, 1)[number % 5]
        x, y = batch(net, cost, samples, indices=takes_indices and number % 2 == 1)
        torch.testing.assert_close(step(x, y), reference(x, y), **tolerances)
    assert_follows(net, reference.net, **tolerances)


@every_descent
@every_cost
@every_activation
def test_a_hundred_steps_as_autograd_and_sgd(
    activation: nn.Module, cost: Cost, descent: dict[str, float], device: torch.device
) -> None:
    follow(network(activation, device=device), cost, 100, **descent)


@every_descent
@pytest.mark.parametrize(
    "modules",
    [
        lambda: [LinearSigmoid(4, 6), LinearSigmoid(6, 2, bias=False)],
        lambda: [nn.Linear(4, 6, bias=False), nn.Linear(6, 5), nn.Tanh(), Linear(5, 2)],
        lambda: [Linear(4, 6), Tanh(), Sigmoid(), ReLU(), nn.Identity(), Linear(6, 2), Sigmoid()],
        lambda: [nn.ReLU(inplace=True), Sigmoid(), Linear(4, 2), LeakyReLU(0.3, True)],
        lambda: [Linear(4, 2)],
        lambda: [Linear(4, 1), Sigmoid(), Linear(1, 1), Sigmoid(), Linear(1, 2), Softplus()],
    ],
)
def test_networks_of_other_kinds(
    modules: Callable[[], list[nn.Module]], descent: dict[str, float], device: torch.device
) -> None:
    net = nn.Sequential(*modules()).double().to(device)
    follow(net, QuadraticCost(), 10, **descent)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(COSTS),
    st.booleans(),
)
def test_any_shape_and_layout(
    sizes: list[int], samples: list[int], layout: str, cost: Cost, bias: bool
) -> None:
    net = network(sizes=sizes, bias=bias)
    x, y = batch(net, cost, *samples)
    x, y = LAYOUTS[layout](x), LAYOUTS[layout](y)
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    for _ in range(2):
        torch.testing.assert_close(step(x, y), reference(x, y), equal_nan=True)
    assert_follows(net, reference.net)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_weights_of_any_strides(layout: str) -> None:
    net = network()
    for p in net.parameters():
        p.data = LAYOUTS[layout](p.data)
    strides = [p.stride() for p in net.parameters()]
    follow(net, QuadraticCost(), 5, momentum=0.5)
    assert [p.stride() for p in net.parameters()] == strides


@every_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_is_as_exact_as_autograds(
    dtype: torch.dtype, cost: Cost, device: torch.device
) -> None:
    """Against float64, the error is at most twice that of PyTorch's own, and one rounding.

    That one is of w: a product that is added to it as it is made may add in more than one go.
    """
    net = network(Tanh(), (20, 30, 10), dtype=dtype, device=device)
    if not isinstance(cost, QuadraticCost):
        net = nn.Sequential(*list(net)[:-1])
    x, y = batch(net, cost, 64)
    exact = Reference(copy.deepcopy(net).double(), cost, 0.1)
    theirs = Reference(net, cost, 0.1)
    exact_cost, their_cost = exact(x.double(), y.double()), theirs(x, y)
    cost_found = TrainingStep(net, cost, 0.1)(x, y)
    least = torch.finfo(dtype).eps
    assert error(cost_found, exact_cost) <= 2 * error(their_cost, exact_cost) + least
    pairs = zip(net.parameters(), theirs.net.parameters(), exact.net.parameters(), strict=True)
    for found, their, right in pairs:
        assert found.dtype is dtype
        assert error(found, right) <= 2 * error(their, right) + least


@pytest.mark.parametrize("descent", [{}, {"momentum": 0.9}, {"weight_decay": 0.01}], ids=str)
@pytest.mark.parametrize(("lr", "samples"), [(1e-3, 1024), (0.1, 8192), (0.1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_updates_are_as_exact_as_autograds(
    dtype: torch.dtype, lr: float, samples: int, descent: dict[str, float], device: torch.device
) -> None:
    """Of parameters that are 0, so that what is rounded is the update; two steps of it.

    A product adds very many samples up less exactly than PyTorch's sum, in float32 to 6e-7.
    """
    net = network(Tanh(), (16, 8, 4), dtype=dtype, device=device)
    with torch.no_grad():
        for name in ("2.weight", "2.bias"):
            net.get_parameter(name).zero_()
    cost = QuadraticCost()
    x, y = batch(net, cost, samples)
    exact = Reference(copy.deepcopy(net).double(), cost, lr, **descent)
    theirs, ours = Reference(net, cost, lr, **descent), TrainingStep(net, cost, lr, **descent)
    for _ in range(2):
        exact(x.double(), y.double() + 5)
        theirs(x, y + 5)
        ours(x, y + 5)
    for name in ("2.weight", "2.bias"):
        found, their, right = (n.get_parameter(name) for n in (net, theirs.net, exact.net))
        assert error(found, right) <= 2 * error(their, right) + 5 * torch.finfo(dtype).eps


def error(found: Tensor, right: Tensor) -> float:
    difference: float = ((found.double() - right).norm() / right.norm()).item()
    return difference


@pytest.mark.parametrize("samples", [600, 3000])
def test_many_losses_in_half_precision_do_not_overflow(samples: int, device: torch.device) -> None:
    net = network(sizes=(2, 100), dtype=torch.float16, device=device)
    x = torch.zeros(samples, 2, dtype=torch.float16, device=device)
    y = torch.full((samples, 100), 2.0, dtype=torch.float16, device=device)
    expected = (net(x) - y).double().square().sum(-1).mean() / 2
    found = TrainingStep(net, QuadraticCost(), 0.0)(x, y)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-3, atol=0)


def products(operations: Operations) -> int:
    return sum(name in {"mm", "addmm", "addmm_"} for name in operations.names)


def test_the_kernels_of_a_step(device: torch.device) -> None:
    """3 L − 1 matrix products, everything in place, no derivative kernel."""
    net = network(device=device)
    step = TrainingStep(net, QuadraticCost(), 0.1)
    x, y = batch(net, step.cost, 4)
    step(x, y)
    operations = Operations()
    with operations:
        step(x, y)
    assert products(operations) == 3 * 3 - 1
    assert operations.names.count("mv") == 3
    assert not [name for name in operations.names if "backward" in name]
    made = {name for name in operations.names if not name.endswith("_")} - {"is_set_to"}
    assert made == {"addmm", "mm", "mv", "sub", "dot"}  # written into a buffer, but for the cost


def test_what_is_frozen_stays_and_costs_nothing(device: torch.device) -> None:
    for frozen in ([], [0], [0, 1], [0, 1, 2, 3], [4], [5], [1, 2], [0, 1, 2, 3, 4, 5]):
        net = network(device=device)
        parameters = list(net.parameters())
        for index in frozen:
            parameters[index].requires_grad_(False)
        before = values(net)
        cost = QuadraticCost()
        step = TrainingStep(net, cost, 0.5, momentum=0.5, weight_decay=0.1)
        x, y = batch(net, cost, 4)
        if len(frozen) < 6:
            reference = Reference(net, cost, 0.5, momentum=0.5, weight_decay=0.1)
            for _ in range(3):
                torch.testing.assert_close(step(x, y), reference(x, y))
            assert_follows(net, reference.net)
        operations = Operations()
        with operations:
            step(x, y)
        lowest = next((i // 2 for i in range(6) if i not in frozen), 3)
        learned = sum(i not in frozen for i in (0, 2, 4))
        assert products(operations) == 3 + max(0, 2 - lowest) + learned
        for index, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
            assert torch.equal(parameter, old) == (index in frozen)


def test_freezing_between_steps() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    for frozen in (0, 2, 5):
        for index, pair in enumerate(
            zip(net.parameters(), reference.net.parameters(), strict=True)
        ):
            for parameter in pair:
                parameter.requires_grad_(index != frozen)
        x, y = batch(net, cost, 4)
        step(x, y)
        reference(x, y)
        assert_follows(net, reference.net)


def test_the_net_stays_what_it_was(device: torch.device) -> None:
    net = network(device=device)
    x, y = batch(net, QuadraticCost(), 4)
    objects = [(id(p), p.data_ptr()) for p in net.parameters()]
    QuadraticCost()(net(x), y).backward()
    grads = [p.grad for p in net.parameters()]
    held = [g.clone() for g in grads if g is not None]
    x.requires_grad_()
    y.requires_grad_()
    cost = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)(x, y)
    assert (cost.shape, cost.requires_grad, cost.grad_fn) == ((), False, None)
    assert [(id(p), p.data_ptr()) for p in net.parameters()] == objects
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in net.parameters())
    for parameter, grad, old in zip(net.parameters(), grads, held, strict=True):
        assert parameter.grad is grad
        assert torch.equal(old, grad if grad is not None else old)
    assert x.grad is y.grad is None


@every_cost
def test_targets_that_want_gradients_make_no_graph(cost: Cost) -> None:
    net = network()
    x, y = batch(net, cost, 4)
    assert not TrainingStep(net, cost, 0.1)(x, y.requires_grad_()).requires_grad


def test_each_cost_is_a_tensor_of_its_own() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.5)
    x, y = batch(net, cost, 4)
    first = step(x, y)
    value = first.item()
    assert step(x, y).item() < value == first.item()


class Itself(Cost):
    """One output is the cost."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return output.reshape(())

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return torch.ones_like(output)


def test_a_cost_that_is_a_view_of_the_output_is_one_as_well() -> None:
    net = network(sizes=(3, 1))
    step = TrainingStep(net, Itself(), 0.5)
    x, y = batch(net, step.cost, 1)
    first = step(x, y)
    value = first.item()
    assert step(x, y).item() < value == first.item()


def test_autograd_notices_that_weights_have_changed() -> None:
    net, cost = network(), QuadraticCost()
    x, y = batch(net, cost, 4)
    held = cost(net(x), y)
    TrainingStep(net, cost, 0.1)(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_it_works_within_every_mode_of_autograd() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x, y = batch(net, cost, 4)
            step(x, y)
        reference(x.clone(), y.clone())
    assert_follows(net, reference.net)


def test_velocities_made_in_inference_mode_are_ordinary_ones() -> None:
    net, cost = network(), QuadraticCost()
    net.get_parameter("0.weight").requires_grad_(False)
    with torch.inference_mode():
        step = TrainingStep(net, cost, 0.1, momentum=0.9)
    step(*batch(net, cost, 4))
    net.get_parameter("0.weight").requires_grad_(True)
    with torch.inference_mode():
        step(*batch(net, cost, 4))
        step.load_state_dict(step.state_dict())
    step(*batch(net, cost, 4))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 2, 0)], ids=str)
def test_no_inputs_at_all(shape: tuple[int, ...]) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(Linear(0, 3, dtype=torch.float64), Sigmoid())
    cost = QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    x, y = batch(net, cost, *shape[:-1])
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_the_cost_of_very_many_samples_is_as_exact() -> None:
    net = network(sizes=(2, 4), dtype=torch.float32)
    x, y = batch(net, QuadraticCost(), 200_000)
    exact = QuadraticCost()(copy.deepcopy(net).double()(x.double()), y.double())
    found = TrainingStep(net, QuadraticCost(), 0.0)(x, y)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=5e-7, atol=0)


def test_buffers_are_made_once() -> None:
    """A smaller batch uses the memory of the larger; a larger one makes its own."""
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    addresses = []
    for samples in (8, 8, 3, 5, 8, 9, 8):
        step(*batch(net, cost, samples))
        addresses.append({name: memory.data_ptr() for name, memory in step._memory.items()})
    assert all(a == addresses[0] for a in addresses[:5])
    assert addresses[5] == addresses[6]
    assert sum(m.numel() for m in step._memory.values()) == 9 * (5 + 6 + 3 + 2 * 6)
    batches = [batch(net, cost, samples) for samples in (8, 3)]
    step(*batches[1])
    operations = Operations()
    with operations:
        for x, y in batches:
            step(x, y)
    assert not {"empty", "new_empty", "zeros", "ones"} & set(operations.names)


def test_there_are_never_more_passes_than_a_few() -> None:
    net, cost = network(sizes=(2, 3)), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    for samples in range(MOST_PASSES + 20, 0, -1):
        step(*batch(net, cost, samples))
        assert len(step._passes) <= MOST_PASSES


def test_nothing_is_left_behind() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    x, y = batch(net, cost, 4)
    step(x, y)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        step(x, y)
    gc.collect()
    assert len(gc.get_objects()) <= before + 5


def moved(net: nn.Sequential) -> nn.Sequential:
    for p in net.parameters():
        p.data = p.data.clone()
    return net


def loaded(net: nn.Sequential) -> nn.Sequential:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    return net


def replaced(net: nn.Sequential) -> nn.Sequential:
    net[2].weight = nn.Parameter(net.get_parameter("2.weight").detach().clone())
    return net


def with_another_layer(net: nn.Sequential) -> nn.Sequential:
    net[2] = Linear(5, 6, dtype=torch.float64)
    return net


def longer(net: nn.Sequential) -> nn.Sequential:
    return net.append(Tanh())


def with_a_bias(net: nn.Sequential) -> nn.Sequential:
    net[0].bias = nn.Parameter(torch.ones(5).double())
    return net


def transposed(net: nn.Sequential) -> nn.Sequential:
    w = net.get_parameter("4.weight")
    w.data = w.data.t()
    return net


def narrower(net: nn.Sequential) -> nn.Sequential:
    for name, part in (("0.weight", (slice(3),)), ("2.weight", (slice(None), slice(3)))):
        w = net.get_parameter(name)
        w.data = w.data[part]
    return net


def steeper(net: nn.Sequential) -> nn.Sequential:
    activation: Any = net[1]
    activation.negative_slope = 0.9
    return net


@pytest.mark.parametrize("samples", [4, 3], ids=["seen shape", "another"])
@pytest.mark.parametrize(
    "change", [with_another_layer, longer, with_a_bias, transposed, narrower, steeper]
)
def test_a_changed_structure_is_seen(change: Any, samples: int) -> None:
    net, cost = network(LeakyReLU(0.2), (7, 5, 6, 6), bias=False), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    step(*batch(net, cost, 4))
    change(net)
    reference = Reference(net, cost, 0.1)
    x, y = batch(net, cost, samples)
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_a_changed_reduction_is_seen() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    step(*batch(net, cost, 4))
    cost.reduction = "sum"
    reference = Reference(net, cost, 0.1)
    x, y = batch(net, cost, 4)
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)
    cost.reduction = "none"
    with pytest.raises(ValueError, match="cost must be reduced"):
        step(x, y)


def test_a_cost_changed_by_hand_is_seen() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    x, y = batch(net, cost, 4)
    step(x, y)
    other: Any = cost
    other.forward, other.gradient = Doubled().forward, Doubled().gradient
    reference = Reference(net, Doubled(), 0.1)
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_velocities_of_layers_that_are_gone_are_gone() -> None:
    net, cost = network(sizes=(7, 5, 5, 5)), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    step(*batch(net, cost, 4))
    del net[4:]
    step(*batch(net, cost, 4))
    assert list(step.state_dict()["velocities"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    step.load_state_dict(step.state_dict())


def test_net_and_cost_cannot_be_exchanged() -> None:
    step: Any = TrainingStep(network(), QuadraticCost(), 0.1)
    for name in ("net", "cost", "momentum", "weight_decay"):
        with pytest.raises(AttributeError):
            setattr(step, name, None)


def swapped(net: nn.Sequential) -> nn.Sequential:
    """As `module.to` moves parameters that cannot be set in place."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return net.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped_one_by_one(net: nn.Sequential) -> nn.Sequential:
    for p in net.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    return net


def swapped_loaded(net: nn.Sequential) -> nn.Sequential:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
        return net
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("cost", [QuadraticCost(), Autograd()], ids=repr)
@pytest.mark.parametrize("change", [swapped, swapped_one_by_one, swapped_loaded])
def test_parameters_can_be_swapped(change: Any, cost: Cost) -> None:
    """A step that has run holds on to none of them."""
    net = network()
    step, reference = (
        TrainingStep(net, cost, 0.1, momentum=0.9),
        Reference(net, cost, 0.1, momentum=0.9),
    )
    for samples in (4, 3, 4):
        x, y = batch(net, cost, samples)
        step(x, y)
        reference(x, y)
        change(net)
        for p in reference.net.parameters():
            p.data = p.data.float().double() if change is swapped else p.data
    # A velocity that went through float32 is as exact as that.
    exact = change is not swapped
    assert_follows(net, reference.net, rtol=1e-11 if exact else 1e-5, atol=1e-13 if exact else 1e-7)


@pytest.mark.parametrize("change", [moved, loaded, replaced])
def test_parameters_that_are_elsewhere_now_are_found(change: Any) -> None:
    net, cost = network(), QuadraticCost()
    step, reference = (
        TrainingStep(net, cost, 0.1, momentum=0.9),
        Reference(net, cost, 0.1, momentum=0.9),
    )
    for _ in range(3):
        x, y = batch(net, cost, 4)
        step(x, y)
        reference(x, y)
        change(net)
    assert_follows(net, reference.net)


def test_a_net_that_is_cast() -> None:
    net, cost = network(dtype=torch.float32), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    x, y = batch(net, cost, 4)
    step(x, y)
    net.double()
    with pytest.raises(TypeError, match=r"x must have the dtype of net\['0'\].weight"):
        step(x, y)
    other = network()
    other.load_state_dict(net.state_dict())
    went_on = TrainingStep(other, cost, 0.1)
    went_on.load_state_dict(step.state_dict())  # velocities in float32
    for each in (step, went_on):
        each(x.double(), y.double())
    assert not torch.equal(step.state_dict()["velocities"]["0.bias"], torch.zeros(5).double())
    assert all(torch.equal(*pair) for pair in zip(values(net), values(other), strict=True))


def test_a_layer_that_is_pruned_later_is_refused() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    x, y = batch(net, cost, 4)
    step(x, y)
    prune.random_unstructured(net[2], "weight", amount=0.5)
    before = values(net)
    with pytest.raises(TypeError, match=r"net\['2'\].* must have no hooks|must be a parameter"):
        step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))


class Doubled(QuadraticCost):
    """Ours, changed in what a cost is asked to define."""

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        return 2 * super().forward(a, y)

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        return 2 * super().gradient(a, y)


class Misshapen(Autograd):
    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        return super().gradient(output, y)[0]


def test_a_cost_that_changes_one_of_ours() -> None:
    follow(network(), Doubled(), 5)


def test_a_gradient_of_another_shape_is_refused() -> None:
    net = network()
    before = values(net)
    step = TrainingStep(net, Misshapen(), 0.1)
    with pytest.raises(
        ValueError, match=r"Misshapen.gradient\(output, y\) must have shape \(4, 3\)"
    ):
        step(*batch(net, step.cost, 4))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_cost_of_ones_own(reduction: Any) -> None:
    follow(network(), Autograd(reduction), 5)


def test_without_the_private_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "manual_bp.training_step._training_step"
    monkeypatch.setattr(f"{module}.below_autograd", torch.no_grad)
    follow(network(), QuadraticCost(), 5, momentum=0.5)


@every_descent
@every_cost
def test_a_learning_rate_in_a_tensor(
    cost: Cost, descent: dict[str, float], device: torch.device
) -> None:
    """What a CUDA graph and an exported program run, where a number could not change."""
    net = network(device=device)
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    x, y = batch(net, cost, 4)
    run = step._new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
    rate = torch.tensor(0.0, dtype=x.dtype, device=device)
    for lr in (0.1, 0.3, 0.3, 0.05):
        x, y = batch(net, cost, 4)
        reference.set_lr(lr)
        rate.fill_(lr)  # one tensor, as a graph has it
        with torch.no_grad():
            found = run(x, y, rate)
        torch.testing.assert_close(found, reference(x, y))
    assert_follows(net, reference.net)


def test_a_schedule_of_pytorchs() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(reference.optimizer, 0.7)
    for _ in range(5):
        x, y = batch(net, cost, 4)
        step.lr = float(schedule.get_last_lr()[0])
        step(x, y)
        reference(x, y)
        schedule.step()
    assert step.lr == pytest.approx(0.1 * 0.7**4)
    assert_follows(net, reference.net)


@every_descent
def test_going_on_from_a_saved_state(descent: dict[str, float], tmp_path: Any) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, **descent)
    for _ in range(3):
        step(*batch(net, cost, 4))
    step.lr = 0.2
    torch.save({"net": net.state_dict(), "step": step.state_dict()}, tmp_path / "saved.pt")
    x, y = batch(net, cost, 4)
    saved = torch.load(tmp_path / "saved.pt")
    other = network()
    other.load_state_dict(saved["net"])
    resumed = TrainingStep(other, cost, 1.0, momentum=0.1)
    resumed(x, y)  # has buffers and velocities already
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["step"])
    assert (resumed.lr, resumed.momentum, resumed.weight_decay) == (
        0.2,
        descent.get("momentum", 0),
        descent.get("weight_decay", 0),
    )
    for _ in range(3):
        step(x, y)
        resumed(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), values(other), strict=True))


ZEROS = torch.zeros(5, 7)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": 10**400}, ValueError, "lr must be a number that fits into a float"),
        ({"momentum": "no"}, TypeError, "momentum must be a number; got str"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number; got NoneType"),
        ({"velocities": {"9.weight": ZEROS}}, KeyError, "net has no parameter '9.weight'"),
        ({"velocities": {0: ZEROS}}, KeyError, "net has no parameter 0"),
        (
            {"velocities": {"0.weight": torch.zeros(2)}},
            ValueError,
            r"velocities\['0.weight'\] must have shape \(5, 7\), its parameter's; got \(2,\)",
        ),
        (
            {"velocities": {"0.bias": torch.ones(5), "0.weight": ZEROS.to("meta")}},
            ValueError,
            r"velocities\['0.weight'\] must have values; got a meta tensor",
        ),
        (
            {"velocities": {"0.bias": torch.ones(5), "0.weight": ZEROS.tolist()}},
            TypeError,
            r"velocities\['0.weight'\] must be a torch.Tensor; got list",
        ),
        (
            {"velocities": {"0.weight": ZEROS.long()}},
            TypeError,
            r"velocities\['0.weight'\] must have a real floating-point dtype",
        ),
        ({"velocities": [ZEROS]}, TypeError, "velocities must be a mapping, .* got list"),
        ({"nesterov": True}, KeyError, "state must have the keys lr, .*; got lr, .*, nesterov"),
        (None, TypeError, r"state must be a mapping, as state_dict\(\) gives it; got NoneType"),
        ([("lr", 0.1)], TypeError, "state must be a mapping, .* got list"),
        ({}, KeyError, "state must have the keys lr, .* got none"),
        (
            torch.optim.SGD([torch.zeros(1)], 0.1).state_dict(),
            KeyError,
            "state must have the keys .* got state, param_groups",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    wrong: Any, error: type[Exception], message: str
) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step(*batch(step.net, step.cost, 4))
    before = step.state_dict()
    if wrong and not isinstance(wrong, list) and "state" not in wrong:
        wrong = before | {"lr": 0.5, "momentum": 0.1} | wrong
    with pytest.raises(error, match=message):
        step.load_state_dict(wrong)
    assert_same_state(step.state_dict(), before)


def test_a_state_is_not_half_loaded_into_a_net_that_cannot_be_trained() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    before = step.state_dict()
    step.net[2] = nn.Dropout()
    with pytest.raises(TypeError, match=r"net\['2'\] must be a Linear"):
        step.load_state_dict(before | {"lr": 0.5})
    assert_same_state(step.state_dict(), before)


def test_a_state_is_loaded_into_what_the_net_is_now() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step.net.append(Linear(3, 2, dtype=torch.float64))
    other = TrainingStep(copy.deepcopy(step.net), QuadraticCost(), 0.2, momentum=0.9)
    x, y = batch(other.net, other.cost, 4)
    other(x, y)
    step.load_state_dict(other.state_dict())
    assert_same_state(step.state_dict(), other.state_dict())


def test_a_parameter_without_a_saved_velocity_starts_anew() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    step(*batch(step.net, step.cost, 4))
    state = step.state_dict()
    del state["velocities"]["2.bias"]
    step.load_state_dict(state)
    found = step.state_dict()["velocities"]
    assert not found["2.bias"].any()
    assert torch.equal(found["2.weight"], state["velocities"]["2.weight"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_trains_its_own_network(copied: Any) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    x, y = batch(net, cost, 4)
    step(x, y)
    twin = copied(step)
    before = values(net)
    twin(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    step(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), values(twin.net), strict=True))


def test_a_copy_of_ones_own_kind_keeps_what_it_has() -> None:
    class Named(TrainingStep):
        name = "none"

    step = Named(network(), QuadraticCost(), 0.1)
    step.name = "mine"
    assert copy.deepcopy(step).name == "mine"


def test_a_loaded_velocity_is_part_of_no_graph() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    state = step.state_dict()
    state["velocities"] = {n: v.requires_grad_() for n, v in state["velocities"].items()}
    step.load_state_dict(state)
    assert not any(v.requires_grad for v in copy.deepcopy(step).state_dict()["velocities"].values())


def test_repr_says_what_it_does() -> None:
    found = repr(TrainingStep(nn.Sequential(Linear(2, 1)), QuadraticCost(), 0.1, momentum=0.9))
    assert found.startswith("TrainingStep(net=Sequential(")
    assert found.endswith("cost=QuadraticCost(), lr=0.1, momentum=0.9, weight_decay=0.0)")


def sequential(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def tied() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def shared_memory() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net.get_parameter("2.weight").data = net.get_parameter("0.weight").data
    return net


def twice() -> nn.Sequential:
    layer = Linear(3, 3)
    return sequential(layer, Sigmoid(), layer)


def expanded() -> nn.Sequential:
    net = sequential(Linear(3, 2))
    net.get_parameter("0.weight").data = torch.ones(1, 3).expand(2, 3)
    return net


def with_memory(*views: Tensor) -> nn.Sequential:
    """Layers of 3 by 3 without biases, whose weights are these."""
    net = nn.Sequential(*(Linear(3, 3, bias=False, dtype=v.dtype) for v in views))
    for layer, view in zip(net, views, strict=True):
        layer.weight = nn.Parameter(view)
    return net


def overlapping_in_part() -> nn.Sequential:
    memory = torch.randn(20)
    return with_memory(memory[:9].view(3, 3), memory[8:17].view(3, 3))


def transposed_tie() -> nn.Sequential:
    w = torch.randn(3, 3)
    return with_memory(w, w.t())


def overlapping_itself() -> nn.Sequential:
    return with_memory(torch.randn(20).as_strided((3, 3), (2, 1)))


def a_bias_within_a_weight() -> nn.Sequential:
    net = sequential(Linear(3, 3), Sigmoid(), Linear(3, 3))
    net[2].bias = nn.Parameter(net.get_parameter("0.weight").detach()[1])
    return net


def frozen_overlapped_by_learning() -> nn.Sequential:
    net = overlapping_in_part()
    net[0].requires_grad_(False)
    return net


def made_in_inference_mode() -> nn.Sequential:
    with torch.inference_mode():
        return sequential(Linear(3, 2))


NET: Any = sequential(Linear(3, 2))
NO_NET: Any = Linear(3, 2)
NO_COST: Any = nn.MSELoss()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TrainingStep(NO_NET, QuadraticCost(), 0.1),
            TypeError,
            "net must be an nn.S",
        ),
        (lambda: TrainingStep(NET, NO_COST, 0.1), TypeError, "cost must be a manual_bp.Cost"),
        (
            lambda: TrainingStep(NET, QuadraticCost("none"), 0.1),
            ValueError,
            "cost must be reduced by 'mean' or 'sum'; got reduction='none'",
        ),
        (lambda: TrainingStep(NET, QuadraticCost(), -1), ValueError, "lr must be at least 0; got"),
        (
            lambda: TrainingStep(NET, QuadraticCost(), float("nan")),
            ValueError,
            "lr must be at least 0; got nan",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), float("inf")),
            ValueError,
            "lr must be finite; got inf",
        ),
        (
            lambda: TrainingStep(
                sequential(Linear(3, 2), nn.LeakyReLU(-0.5)), QuadraticCost(), 0.1
            ),
            ValueError,
            "negative_slope must be at least 0; got -0.5",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), nn.Softplus(0.0)), QuadraticCost(), 0.1),
            ValueError,
            "beta must not be 0; got 0.0",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2, device="meta")), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have values to train; got a meta tensor",
        ),
        (
            lambda: TrainingStep(expanded(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have memory for each of its elements; got an expanded tensor",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), "0.1"),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got str",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=-0.1),
            ValueError,
            "momentum must be at least 0; got -0.1",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=-0.1),
            ValueError,
            "weight_decay must be at least 0; got -0.1",
        ),
        (
            lambda: TrainingStep(tied(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must be in no other place, .* got the parameter that is 0.weight",
        ),
        (
            lambda: TrainingStep(shared_memory(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must be in no other place",
        ),
        (
            lambda: TrainingStep(twice(), QuadraticCost(), 0.1),
            ValueError,
            "2.weight of net must be in no other place",
        ),
        (
            lambda: TrainingStep(overlapping_in_part(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must be in no other place, .* got a part of the parameter that is 0.w",
        ),
        (
            lambda: TrainingStep(transposed_tie(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must be in no other place, .* got the parameter that is 0.weight",
        ),
        (
            lambda: TrainingStep(a_bias_within_a_weight(), QuadraticCost(), 0.1),
            ValueError,
            "2.bias of net must be in no other place, .* got a part of the parameter that is 0.w",
        ),
        (
            lambda: TrainingStep(frozen_overlapped_by_learning(), QuadraticCost(), 0.1),
            ValueError,
            "1.weight of net must be in no other place",
        ),
        (
            lambda: TrainingStep(overlapping_itself(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must have memory for each .* got one that overlaps itself, strides",
        ),
        (
            lambda: TrainingStep(made_in_inference_mode(), QuadraticCost(), 0.1),
            ValueError,
            "0.weight of net must be made outside of inference mode",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 10**400),
            ValueError,
            "lr must be a number that fits into a float; got one beyond",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=10**5000),
            ValueError,
            "momentum must be a number that fits",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=Fraction(10**400)),  # type: ignore[arg-type]
            ValueError,
            "weight_decay must be a number that fits",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1e39),
            ValueError,
            r"lr must be at most 3\.40.*e\+38, all that torch.float32 holds; got 1e\+39",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, momentum=1e39),
            ValueError,
            "momentum must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 0.1, weight_decay=1e39),
            ValueError,
            "weight_decay must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1e20, weight_decay=1e20),
            ValueError,
            r"lr \* weight_decay must be at most 3.40",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), torch.tensor(0.1)),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got Tensor",
        ),
        (
            lambda: TrainingStep(NET, QuadraticCost(), 1j),  # type: ignore[arg-type]
            TypeError,
            "lr must be a number; got complex",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), Softplus(1, 5)), QuadraticCost(), 0.1),
            ValueError,
            "threshold must be at least 20",
        ),
        (
            lambda: TrainingStep(
                sequential(Linear(3, 2, dtype=torch.cfloat)), QuadraticCost(), 0.1
            ),
            TypeError,
            "0.weight of net must be of float16, bfloat16, float32 or float64; got torch.complex64",
        ),
        (
            lambda: TrainingStep(sequential(nn.LazyLinear(2)), QuadraticCost(), 0.1),
            TypeError,
            r"net\['0'\].weight must be initialised",
        ),
        (
            lambda: TrainingStep(sequential(Linear(3, 2), nn.Dropout()), QuadraticCost(), 0.1),
            TypeError,
            r"net\['1'\] must be a Linear",
        ),
    ],
)
def test_what_is_refused_when_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def on_one_buffer(net: nn.Sequential) -> None:
    """All parameters side by side in one, as libraries flatten them."""
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    for p, part in zip(net.parameters(), flat.split([p.numel() for p in net.parameters()])):  # noqa: B905
        p.data = part.view_as(p)


def interleaved(net: nn.Sequential) -> None:
    """Two weights in turns in one memory, and both biases, which share no element."""
    memory = torch.randn(5, 12).double()
    net[0].weight = nn.Parameter(memory[:, 0:10:2])
    net[2].weight = nn.Parameter(memory[:, 1:11:2])
    net[0].bias, net[2].bias = nn.Parameter(memory[:, 10]), nn.Parameter(memory[:, 11])


def frozen_and_tied(net: nn.Sequential) -> None:
    net[4].weight = net[2].weight
    net[2].bias = nn.Parameter(torch.ones(1).double().expand(5))
    net[2].requires_grad_(False)


@every_descent
@pytest.mark.parametrize("change", [on_one_buffer, interleaved, frozen_and_tied])
def test_memory_that_is_shared_without_harm(change: Any, descent: dict[str, float]) -> None:
    net = network(sizes=(5, 5, 5, 5))
    change(net)
    follow(net, QuadraticCost(), 5, **descent)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight", "0.bias", "4.bias"])
@every_descent
def test_a_batch_that_is_a_part_of_a_parameter(name: str, descent: dict[str, float]) -> None:
    """It is as it was before the step, for the whole of it."""
    net, cost = network(sizes=(5, 5, 5, 5)), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.5, **descent), Reference(net, cost, 0.5, **descent)
    rows = net.get_parameter(name).detach().view(-1, 5)
    others = torch.rand_like(rows)
    for x, y in [(rows, others), (others, rows)] * 2:
        expected = reference(x.clone(), y.clone())
        torch.testing.assert_close(step(x, y), expected)
    assert_follows(net, reference.net)


def test_a_batch_that_overlaps_a_parameter_of_another_storage() -> None:
    """As slices of one NumPy array do."""
    numbers = torch.randn(60, dtype=torch.float64).numpy()
    net, cost = network(sizes=(5, 5, 5)), QuadraticCost()
    net[0].weight = nn.Parameter(torch.from_numpy(numbers[:25]).view(5, 5))
    x = torch.from_numpy(numbers[10:35]).view(5, 5)
    assert x.untyped_storage().data_ptr() != net[0].weight.untyped_storage().data_ptr()
    step, reference = TrainingStep(net, cost, 0.5), Reference(net, cost, 0.5)
    for _ in range(3):
        y = torch.rand(5, 5, dtype=torch.float64)
        expected = reference(x.clone(), y)
        torch.testing.assert_close(step(x, y), expected)
    assert_follows(net, reference.net)


GOOD_X, GOOD_Y = torch.zeros(4, 7).double(), torch.zeros(4, 3).double()
NESTED = torch.nested.nested_tensor([torch.zeros(3).double()], layout=torch.jagged)


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            GOOD_X.float(),
            GOOD_Y,
            TypeError,
            r"x must have the dtype of net\['0'\].weight, .*64; got",
        ),
        (GOOD_X.numpy(), GOOD_Y, TypeError, "x must be a torch.Tensor; got ndarray"),
        (GOOD_X.tolist(), GOOD_Y, TypeError, "x must be a torch.Tensor; got list"),
        (GOOD_X.long(), GOOD_Y, TypeError, "x must have a real floating-point dtype; got"),
        (GOOD_X.to_sparse(), GOOD_Y, TypeError, "x must be a dense tensor; got layout"),
        (GOOD_X[:, :5], GOOD_Y, ValueError, r"x must have last dimension 7, the in_features of"),
        (GOOD_X[0, 0], GOOD_Y, ValueError, "x must have at least one dimension"),
        (GOOD_X.to("meta"), GOOD_Y, ValueError, "x must be on the device of"),
        (
            GOOD_X,
            GOOD_Y.float(),
            TypeError,
            "y must have the dtype of the output, torch.float64; got",
        ),
        (
            GOOD_X,
            GOOD_Y[:3],
            ValueError,
            r"y must have shape \(4, 3\), that of the output; got \(3, 3\)",
        ),
        (
            GOOD_X,
            GOOD_Y[:, :1],
            ValueError,
            r"y must have shape \(4, 3\), that of the output; got \(4, 1\)",
        ),
        (GOOD_X, GOOD_Y.numpy(), TypeError, "y must be a torch.Tensor; got ndarray"),
        (GOOD_X, GOOD_Y.tolist(), TypeError, "y must be a torch.Tensor; got list"),
        (GOOD_X, GOOD_Y.to_sparse(), TypeError, "y must be a dense tensor; got layout"),
        (GOOD_X, GOOD_Y.to("meta"), ValueError, "y must be on the device of the output"),
        (GOOD_X, NESTED, TypeError, "y must be a dense tensor; got a nested tensor"),
        (NESTED, GOOD_Y, TypeError, "x must be a dense tensor; got a nested tensor"),
    ],
)
def test_a_batch_that_does_not_fit_changes_nothing(
    x: Any, y: Any, error: type[Exception], message: str, is_warm: bool
) -> None:
    net = network()
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)
    if is_warm:
        step(GOOD_X, GOOD_Y)
    before = values(net)
    with pytest.raises(error, match=message):
        step(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def with_short_bias(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(torch.ones(1))


def with_bias_matrix(step: TrainingStep) -> None:
    step.net[2].bias = nn.Parameter(torch.ones(1, 6))


def with_weight_vector(step: TrainingStep) -> None:
    step.net[2].weight = nn.Parameter(torch.ones(5))


def with_weights_stacked(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.ones(2, 5, 7))


def with_another_width(step: TrainingStep) -> None:
    step.net[0] = Linear(7, 4)


def with_another_dtype(step: TrainingStep) -> None:
    step.net[0].double()


def partly_on_meta(step: TrainingStep) -> None:
    step.net[0].to("meta")


def partly_inference(step: TrainingStep) -> None:
    with torch.inference_mode():
        step.net[0] = Linear(7, 5)


def partly_expanded(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(torch.ones(1).expand(5))


def partly_overlapping_itself(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.randn(40).as_strided((5, 7), (2, 1)))


def partly_overlapping(step: TrainingStep) -> None:
    step.net[0].bias = nn.Parameter(step.net.get_parameter("4.weight").detach()[1, :5])


def partly_sparse(step: TrainingStep) -> None:
    step.net[0].weight = nn.Parameter(torch.eye(5, 7).to_sparse())


def with_half_the_range(step: TrainingStep) -> None:
    step.lr = 1e5
    step.net.half()


def with_a_slope_beyond_all(step: TrainingStep) -> None:
    step.net[1] = nn.LeakyReLU(1e39)


def with_a_low_threshold(step: TrainingStep) -> None:
    step.net[1] = nn.Softplus(1.0, 5.0)


def pruned(step: TrainingStep) -> None:
    prune.random_unstructured(step.net[0], "weight", amount=0.5)


def unreduced(step: TrainingStep) -> None:
    step.cost.reduction = "none"


def fail(*_: Any) -> Any:
    raise ArithmeticError("no cost today")


def whose_forward_fails(step: TrainingStep) -> None:
    step.cost.forward = fail  # type: ignore[assignment, method-assign]


def whose_gradient_fails(step: TrainingStep) -> None:
    step.cost.gradient = fail  # type: ignore[assignment, method-assign]


class InPlaceFails(QuadraticCost):
    def bind(self, a: Tensor, delta: Tensor) -> Any:
        error_, share = super().bind(a, delta)
        return lambda y: fail(error_(y)), share


def whose_in_place_fails(step: TrainingStep) -> None:
    step.cost.__class__ = InPlaceFails
    step.net[1] = Tanh()  # what is seen, and all made anew


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    "change",
    [
        with_short_bias,
        with_bias_matrix,
        with_weight_vector,
        with_weights_stacked,
        with_another_width,
        with_another_dtype,
        partly_on_meta,
        partly_inference,
        partly_expanded,
        partly_overlapping_itself,
        partly_overlapping,
        partly_sparse,
        with_half_the_range,
        with_a_slope_beyond_all,
        with_a_low_threshold,
        pruned,
        unreduced,
        whose_forward_fails,
        whose_gradient_fails,
        whose_in_place_fails,
    ],
)
def test_after_an_error_all_is_as_it_was(change: Any, is_warm: bool) -> None:
    """Every step is whole or not at all: parameters, velocities, numbers."""
    net = network(dtype=torch.float32)
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9, weight_decay=0.1)
    x, y = batch(net, step.cost, 4)
    if is_warm:
        step(x, y)
    change(step)
    parameters = [p.detach() for p in net.parameters()]
    before = [p.clone() for p in parameters]
    state = step.state_dict()
    for _ in range(2):  # nor does the second try go on from half of the first
        with pytest.raises((TypeError, ValueError, RuntimeError, ArithmeticError)):
            step(x.to(net[4].weight.dtype), y.to(net[4].weight.dtype))
        for found, value in zip(net.parameters(), before, strict=True):
            assert found.is_meta or torch.equal(found.to_dense(), value.to_dense())
        assert_same_state(step.state_dict(), state)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    velocities, others = found.pop("velocities"), dict(expected)
    assert velocities.keys() == others["velocities"].keys()
    for name, velocity in others.pop("velocities").items():
        assert torch.equal(velocities[name], velocity)
    assert found == others


@pytest.mark.parametrize(
    ("cost", "y", "message"),
    [
        (SoftmaxCrossEntropyCost(), torch.tensor([0, 1, 2, 3]), "class indices from 0 to 2; got 0"),
        (SoftmaxCrossEntropyCost(), GOOD_Y[:2], "y must have shape"),
        (SigmoidCrossEntropyCost(), GOOD_Y[:, 0], "y must have shape"),
    ],
)
def test_targets_that_do_not_fit_change_nothing(cost: Cost, y: Tensor, message: str) -> None:
    net = network()
    before = values(net)
    with pytest.raises(ValueError, match=message):
        TrainingStep(net, cost, 0.1)(GOOD_X, y)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


def test_autocast_is_refused(device: torch.device) -> None:
    net = network(dtype=torch.float32, device=device)
    step = TrainingStep(net, QuadraticCost(), 0.1)
    x, y = batch(net, step.cost, 4)
    message = re.escape("a TrainingStep must be called outside of autocast")
    with (
        torch.autocast(device.type, torch.bfloat16),
        pytest.raises(RuntimeError, match=message),
    ):
        step(x, y)


IN_TRANSFORMS: list[Callable[[TrainingStep, Tensor, Tensor], object]] = [
    lambda step, x, y: torch.vmap(step)(x.expand(2, -1, -1), y.expand(2, -1, -1)),
    lambda step, x, y: torch.vmap(step, (None, 0))(x, y.expand(2, -1, -1)),
    lambda step, x, y: torch.vmap(lambda z: step(x, y) + z)(torch.zeros(2)),
    lambda step, x, y: torch.func.grad(step)(x, y),
    lambda step, x, y: torch.func.grad(lambda y: step(x, y))(y),
    lambda step, x, y: torch.func.jvp(step, (x, y), (x, y)),
    lambda step, x, y: torch.func.functionalize(step)(x, y),
]


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("call", IN_TRANSFORMS)
def test_transforms_are_refused(call: Any, is_warm: bool) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    x, y = batch(step.net, step.cost, 4)
    if is_warm:
        step(x, y)
    before = values(step.net)
    with pytest.raises(RuntimeError, match=r"must be called outside of torch\.func's transforms"):
        call(step, x, y)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


@pytest.mark.parametrize("cost", [QuadraticCost(), Autograd()], ids=repr)
def test_in_a_compiled_loop_it_is_the_step_that_it_is_outside(cost: Cost) -> None:
    net = network()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    step(*(pair := batch(net, cost, 4)))
    reference(*pair)

    def loop(x: Tensor, y: Tensor, each: Any) -> Tensor:
        total = x.new_zeros(())
        for part, target in zip(x.split(2), y.split(2), strict=True):
            total = total + 2 * each(2 * part, target)
        return total

    compiled = torch.compile(loop, backend="eager")
    for _ in range(2):
        x, y = batch(net, cost, 4)
        torch.testing.assert_close(compiled(x, y, step), loop(x, y, reference))
    assert_follows(net, reference.net)


def test_in_code_that_must_be_one_graph_nothing_is_updated() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    x, y = batch(step.net, step.cost, 4)
    before = values(step.net)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x, y: step(x, y), backend="eager", fullgraph=True)(x, y)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_being_exported_is_refused() -> None:
    class Calling(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return step(x, y)

    step = TrainingStep(network(), QuadraticCost(), 0.1)
    before = values(step.net)
    with pytest.raises(RuntimeError, match=r"its own export\(\) and export_onnx\(\) write it"):
        torch.export.export(Calling(), batch(step.net, step.cost, 4), strict=False)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_the_learning_rate_is_checked_when_set_anew() -> None:
    step = TrainingStep(NET, QuadraticCost(), 0.1)
    for wrong, error, message in (
        (1e39, ValueError, "lr must be at most 3.4"),
        (10**400, ValueError, "lr must be a number that fits into a float"),
        (None, TypeError, "lr must be a number; got NoneType"),
    ):
        with pytest.raises(error, match=message):
            step.lr = wrong  # type: ignore[assignment]
        assert step.lr == 0.1
    with pytest.raises(ValueError, match="lr must be at least 0; got -2"):
        step.lr = -2
    assert step.lr == 0.1
