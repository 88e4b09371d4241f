"""A step notices what has changed since the last: networks, options, parameters, costs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from manual_bp import (
    Cost,
    LeakyReLU,
    Linear,
    QuadraticCost,
    Tanh,
    TrainingStep,
)
from manual_bp.layers._activation import ACTIVATIONS, Activation
from tests.training_step.networks import (
    Autograd,
    Counting,
    Doubled,
    Reference,
    assert_follows,
    batch,
    both,
    network,
    values,
)


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
def test_changed_structure_or_option_is_noticed(change: Any, samples: int) -> None:
    net, cost = network(LeakyReLU(0.2), (7, 5, 6, 6), bias=False), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    step(*batch(net, cost, 4))
    change(net)
    reference = Reference(net, cost, 0.1)
    x, y = batch(net, cost, samples)
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_changed_reduction_is_noticed() -> None:
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


def test_forward_and_gradient_set_on_a_cost_are_noticed() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    x, y = batch(net, cost, 4)
    step(x, y)
    other: Any = cost
    other.forward, other.gradient = Doubled().forward, Doubled().gradient
    reference = Reference(net, Doubled(), 0.1)
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_velocities_of_removed_layers_are_removed() -> None:
    net, cost = network(sizes=(7, 5, 5, 5)), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    step(*batch(net, cost, 4))
    del net[4:]
    step(*batch(net, cost, 4))
    assert list(step.state_dict()["velocities"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    step.load_state_dict(step.state_dict())


def test_net_cost_momentum_and_weight_decay_are_read_only() -> None:
    step: Any = TrainingStep(network(), QuadraticCost(), 0.1)
    for name in ("net", "cost", "momentum", "weight_decay"):
        with pytest.raises(AttributeError):
            setattr(step, name, None)


def swapped(net: nn.Sequential) -> nn.Sequential:
    """Move the parameters as `module.to` does where it cannot set them in place."""
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
def test_swapped_parameters_are_noticed(change: Any, cost: Cost) -> None:
    """A step holds no reference that would prevent it."""
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
    # A velocity that was cast to float32 and back is only as accurate as float32.
    exact = change is not swapped
    assert_follows(net, reference.net, rtol=1e-11 if exact else 1e-5, atol=1e-13 if exact else 1e-7)


@pytest.mark.parametrize("change", [moved, loaded, replaced])
def test_moved_or_replaced_parameters_are_noticed(change: Any) -> None:
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


def test_parameter_as_input_is_read_before_its_update_in_shared_memory_too() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = both(net, cost, 0.1)
    x, y = batch(net, cost, 5)
    torch.testing.assert_close(step(x, y), reference(x, y))
    net.share_memory()
    w = net.get_parameter("0.weight").detach()
    expected = reference(w.clone(), y)
    torch.testing.assert_close(step(w, y), expected)
    assert_follows(net, reference.net)


def test_cast_network_is_noticed() -> None:
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


def test_layer_pruned_later_is_refused() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    x, y = batch(net, cost, 4)
    step(x, y)
    prune.random_unstructured(net[2], "weight", amount=0.5)
    before = values(net)
    with pytest.raises(TypeError, match=r"net\['2'\].* must have no hooks|must be a parameter"):
        step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(values(net), before, strict=True))


def elu(z: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(z, alpha)


@pytest.fixture
def elu_class() -> Iterator[type[Activation]]:
    """An activation registered outside the package, with an option that no other has."""

    class ELU(Activation, nn.ELU, function=elu):
        def bind(self, a: Tensor) -> Any:
            alpha = self.alpha

            def times_sigma_prime_(grad_a: Tensor) -> None:
                grad_a.mul_(torch.where(a > 0, 1, a + alpha))

            return partial(F.elu_, a, alpha), times_sigma_prime_

    yield ELU
    ACTIVATIONS.remove(ELU)


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "of PyTorch"])
def test_changed_option_of_a_newly_registered_activation_is_noticed(
    elu_class: Any, is_ours: bool
) -> None:
    net, cost = network(elu_class(0.5) if is_ours else nn.ELU(0.5)), QuadraticCost()
    step = TrainingStep(net, cost, 0.5)
    for alpha in (0.5, 2.0, 0.1):
        activation: Any = net[3]
        activation.alpha = alpha
        reference = Reference(net, cost, 0.5)
        x, y = batch(net, cost, 4)
        torch.testing.assert_close(step(x, y), reference(x, y))
        assert_follows(net, reference.net)


class Huber(Cost):
    """A cost whose bind captures options: a number or tensor, a buffer, a module's attribute."""

    scale: Tensor
    inner: Any

    def __init__(self, limit: Any) -> None:
        super().__init__("sum")
        self.limit = limit
        self.register_buffer("scale", torch.ones(3).double())
        self.inner = nn.Module()
        self.inner.factor = 1.0

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        difference = output - y
        size = difference.abs()
        outside = self.limit * (size - self.limit / 2)
        losses = torch.where(size < self.limit, difference.square() / 2, outside)
        cost: Tensor = (self.inner.factor * self.scale * losses).sum()
        return cost

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:
        weights: Tensor = self.inner.factor * self.scale
        return weights * (output - y).clamp(-self.limit, self.limit)

    def bind(self, output: Tensor, delta: Tensor) -> Any:
        limit, weights = self.limit, self.inner.factor * self.scale

        def error_(y: Tensor) -> Tensor:
            delta.copy_((output - y).clamp(-limit, limit) * weights)
            return self.forward(output, y)

        return error_, 1.0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limit", (0.1, 0.5, 0.5, 0.2)),
        ("limit", (torch.full((3,), 0.1).double(), torch.tensor([0.1, 0.5, 0.2]).double())),
        ("scale", (torch.ones(3).double(), torch.tensor([1, 2, 3]).double())),
        ("inner.factor", (1.0, 2.0)),
    ],
    ids=["number", "tensor", "buffer", "of a module inside"],
)
def test_changed_attribute_of_a_user_cost_is_noticed(name: str, values: Any) -> None:
    net, cost = network(), Huber(0.1)
    step = TrainingStep(net, cost, 0.1)
    *inside, attribute = name.split(".")
    for value in values:
        setattr(cost.get_submodule(".".join(inside)), attribute, value)
        reference = Reference(net, cost, 0.1)
        x, y = batch(net, cost, 4)
        torch.testing.assert_close(step(x, y), reference(x, y))
        assert_follows(net, reference.net)


@pytest.mark.parametrize(
    "cost", [QuadraticCost(), Huber(0.1), Huber(torch.ones(3)), Counting()], ids=repr
)
def test_plan_is_kept_while_nothing_changes(cost: Cost) -> None:
    net = network(LeakyReLU(0.2))
    step = TrainingStep(net, cost, 0.1, momentum=0.5)
    plan = step._plan
    for lr in (0.1, 0.2):
        step.lr = lr
        step(*batch(net, cost, 4))
    assert step._plan is plan
    assert getattr(cost, "calls", 2) == 2


def test_learning_rate_beyond_the_old_dtype_is_accepted_after_a_cast() -> None:
    step = TrainingStep(network(dtype=torch.float16), QuadraticCost(), 0.1)
    step.net.float()
    step.lr = 1e5
    step(*batch(step.net, step.cost, 4))
    assert step.lr == 1e5


def test_learning_rate_beyond_the_new_dtype_is_refused_by_the_next_step() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    step.net.half()
    step.lr = 1e5
    with pytest.raises(ValueError, match=r"lr must be at most 65504\.0"):
        step(*batch(step.net, step.cost, 4))
    step.lr = 0.1
    step(*batch(step.net, step.cost, 4))
