"""The step equals autograd and SGD, in place, without temporaries."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manual_bp import (
    Cost,
    LeakyReLU,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step._layer import fresh_buffers
from manual_bp.training_step._plan import MOST_PASSES
from tests.helpers import LAYOUTS, Operations, only_new_objects
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
    COSTS,
    Autograd,
    Doubled,
    Reference,
    assert_follows,
    batch,
    every_activation,
    every_cost,
    every_descent,
    follow,
    network,
    values,
)


@pytest.mark.parametrize(("reduction", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_step_equals_the_hand_worked_one(reduction: Any, weight: float) -> None:
    net = hand_worked_net()
    before = values(net)
    cost = TrainingStep(net, QuadraticCost(reduction), 0.3)(tensor(X), tensor(Y))
    torch.testing.assert_close(cost, tensor(weight * sum(LOSSES)), rtol=1e-14, atol=0)
    gradients = [GRAD_W1, DELTA1, GRAD_W2, DELTA2]
    for parameter, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        expected = old - 0.3 * weight * tensor(gradient).sum(0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=1e-16)


@every_descent
@every_cost
@every_activation
def test_ten_steps_equal_autograd_and_sgd(
    activation: nn.Module, cost: Cost, descent: dict[str, Any], device: torch.device
) -> None:
    follow(network(activation, device=device), cost, 10, **descent)


@every_descent
@every_activation
def test_a_hundred_steps_equal_autograd_and_sgd(
    activation: nn.Module, descent: dict[str, Any], device: torch.device
) -> None:
    follow(network(activation, device=device), QuadraticCost(), 100, **descent)


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
def test_other_kinds_of_networks_equal_autograd_and_sgd(
    modules: Callable[[], list[nn.Module]], descent: dict[str, Any], device: torch.device
) -> None:
    net = nn.Sequential(*modules()).double().to(device)
    follow(net, QuadraticCost(), 10, **descent)


def test_layers_with_similar_names_do_not_share_buffers() -> None:
    net = nn.Sequential()
    for name, module in {
        "a": Linear(3, 4),
        "sigmoid": Sigmoid(),
        "tanh": Tanh(),
        "a 1": Linear(4, 4),
        "b": Sigmoid(),
    }.items():
        net.add_module(name, module)
    follow(net.double(), QuadraticCost(), 3)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(COSTS),
    st.booleans(),
)
def test_any_shape_and_layout_equals_autograd_and_sgd(
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
def test_weights_keep_their_strides(layout: str) -> None:
    net = network()
    for p in net.parameters():
        p.data = LAYOUTS[layout](p.data)
    strides = [p.stride() for p in net.parameters()]
    follow(net, QuadraticCost(), 5, momentum=0.5)
    assert [p.stride() for p in net.parameters()] == strides


@every_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_is_as_accurate_as_autograd(
    dtype: torch.dtype, cost: Cost, device: torch.device
) -> None:
    """Compared with float64, the error is at most twice that of PyTorch, plus one rounding.

    That rounding is of w: a product that is added to it may be added in more than one part.
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
def test_updates_are_as_accurate_as_autograd(
    dtype: torch.dtype, lr: float, samples: int, descent: dict[str, Any], device: torch.device
) -> None:
    """Two steps from parameters that are 0, so that only the updates are rounded.

    A product sums very many samples less accurately than PyTorch's sum, in float32 to 6e-7.
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
def test_sum_of_many_float16_losses_does_not_overflow(samples: int, device: torch.device) -> None:
    net = network(sizes=(2, 100), dtype=torch.float16, device=device)
    x = torch.zeros(samples, 2, dtype=torch.float16, device=device)
    y = torch.full((samples, 100), 2.0, dtype=torch.float16, device=device)
    expected = (net(x) - y).double().square().sum(-1).mean() / 2
    found = TrainingStep(net, QuadraticCost(), 0.0)(x, y)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-3, atol=0)


def products(operations: Operations) -> int:
    return sum(name in {"mm", "addmm", "addmm_"} for name in operations.names)


def test_step_runs_the_products_in_place_and_no_derivative_kernel(device: torch.device) -> None:
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
    assert made == {"addmm", "mm", "mv", "sub", "dot"}  # into buffers, except for the cost


def test_frozen_parameters_are_unchanged_and_need_no_products(device: torch.device) -> None:
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


def test_freezing_between_steps_is_noticed() -> None:
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


def test_parameters_keep_identity_memory_and_grad(device: torch.device) -> None:
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
def test_target_that_requires_grad_makes_no_graph(cost: Cost) -> None:
    net = network()
    x, y = batch(net, cost, 4)
    assert not TrainingStep(net, cost, 0.1)(x, y.requires_grad_()).requires_grad


def test_each_step_returns_a_new_cost_tensor() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.5)
    x, y = batch(net, cost, 4)
    first = step(x, y)
    value = first.item()
    assert step(x, y).item() < value == first.item()


class Itself(Cost):
    """The cost is the one output itself."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return output.reshape(())

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return torch.ones_like(output)


def test_cost_that_is_a_view_of_the_output_is_copied() -> None:
    net = network(sizes=(3, 1))
    step = TrainingStep(net, Itself(), 0.5)
    x, y = batch(net, step.cost, 1)
    first = step(x, y)
    value = first.item()
    assert step(x, y).item() < value == first.item()


def test_autograd_notices_changed_weights() -> None:
    net, cost = network(), QuadraticCost()
    x, y = batch(net, cost, 4)
    held = cost(net(x), y)
    TrainingStep(net, cost, 0.1)(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_step_is_the_same_in_every_grad_mode() -> None:
    net, cost = network(), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x, y = batch(net, cost, 4)
            step(x, y)
        reference(x.clone(), y.clone())
    assert_follows(net, reference.net)


def test_velocities_made_in_inference_mode_can_be_updated_outside() -> None:
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
def test_layer_without_inputs_equals_autograd_and_sgd(shape: tuple[int, ...]) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(Linear(0, 3, dtype=torch.float64), Sigmoid())
    cost = QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1), Reference(net, cost, 0.1)
    x, y = batch(net, cost, *shape[:-1])
    torch.testing.assert_close(step(x, y), reference(x, y))
    assert_follows(net, reference.net)


def test_cost_of_very_many_samples_is_accurate() -> None:
    net = network(sizes=(2, 4), dtype=torch.float32)
    x, y = batch(net, QuadraticCost(), 200_000)
    exact = QuadraticCost()(copy.deepcopy(net).double()(x.double()), y.double())
    found = TrainingStep(net, QuadraticCost(), 0.0)(x, y)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=5e-7, atol=0)


def test_buffers_are_allocated_once_for_the_largest_batch() -> None:
    """A smaller batch uses the memory of the largest so far; a larger one allocates again."""
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    addresses = []
    for samples in (8, 8, 3, 5, 8, 9, 8):
        step(*batch(net, cost, samples))
        addresses.append({name: memory.data_ptr() for name, memory in step._plan._buffers.items()})
    assert all(a == addresses[0] for a in addresses[:5])
    assert addresses[5] == addresses[6]
    assert sum(m.numel() for m in step._plan._buffers.values()) == 9 * (5 + 6 + 3 + 2 * 6)
    batches = [batch(net, cost, samples) for samples in (8, 3)]
    step(*batches[1])
    operations = Operations()
    with operations:
        for x, y in batches:
            step(x, y)
    assert not {"empty", "new_empty", "zeros", "ones"} & set(operations.names)


def test_number_of_kept_passes_is_limited() -> None:
    net, cost = network(sizes=(2, 3)), QuadraticCost()
    step = TrainingStep(net, cost, 0.1)
    for samples in range(MOST_PASSES + 20, 0, -1):
        step(*batch(net, cost, samples))
        assert len(step._plan._passes) <= MOST_PASSES


def test_steps_leave_no_objects_behind() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, momentum=0.9)
    x, y = batch(net, cost, 4)
    step(x, y)
    with only_new_objects():
        for _ in range(1000):
            step(x, y)
        gc.collect()
        assert len(gc.get_objects()) <= 5


def test_subclass_that_overrides_a_cost_of_ours_is_used() -> None:
    follow(network(), Doubled(), 5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_user_cost_equals_autograd_and_sgd(reduction: Any) -> None:
    follow(network(), Autograd(reduction), 5)


def test_step_works_without_the_private_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "manual_bp.training_step._plan"
    monkeypatch.setattr(f"{module}.below_autograd", torch.no_grad)
    follow(network(), QuadraticCost(), 5, momentum=0.5)


@every_descent
@every_cost
def test_learning_rate_in_a_tensor_equals_autograd_and_sgd(
    cost: Cost, descent: dict[str, Any], device: torch.device
) -> None:
    """As in a CUDA graph and an exported program, which could not change a number."""
    net = network(device=device)
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    x, y = batch(net, cost, 4)
    run = step._plan.new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
    rate = torch.tensor(0.0, dtype=x.dtype, device=device)
    for lr in (0.1, 0.3, 0.3, 0.05):
        x, y = batch(net, cost, 4)
        reference.set_lr(lr)
        rate.fill_(lr)  # the same tensor, as in a graph
        with torch.no_grad():
            found = run(x, y, rate)
        torch.testing.assert_close(found, reference(x, y))
    assert_follows(net, reference.net)


def test_learning_rate_follows_a_pytorch_schedule() -> None:
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


def test_repr_shows_the_arguments() -> None:
    found = repr(TrainingStep(nn.Sequential(Linear(2, 1)), QuadraticCost(), 0.1, momentum=0.9))
    assert found.startswith("TrainingStep(net=Sequential(")
    assert found.endswith("cost=QuadraticCost(), lr=0.1, momentum=0.9, weight_decay=0.0)")


def on_one_buffer(net: nn.Sequential) -> None:
    """Put all parameters into one flat buffer, as libraries do."""
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    for p, part in zip(net.parameters(), flat.split([p.numel() for p in net.parameters()])):  # noqa: B905
        p.data = part.view_as(p)


def interleaved(net: nn.Sequential) -> None:
    """Put the weights into alternate columns of one matrix, and the biases into its last two."""
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
def test_parameters_in_one_buffer_or_frozen_and_tied_are_trained(
    change: Any, descent: dict[str, Any]
) -> None:
    net = network(sizes=(5, 5, 5, 5))
    change(net)
    follow(net, QuadraticCost(), 5, **descent)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight", "0.bias", "4.bias"])
@every_descent
def test_batch_that_is_part_of_a_parameter_is_read_before_the_update(
    name: str, descent: dict[str, Any]
) -> None:
    """All of the step sees the values before it."""
    net, cost = network(sizes=(5, 5, 5, 5)), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.5, **descent), Reference(net, cost, 0.5, **descent)
    rows = net.get_parameter(name).detach().view(-1, 5)
    others = torch.rand_like(rows)
    for x, y in [(rows, others), (others, rows)] * 2:
        expected = reference(x.clone(), y.clone())
        torch.testing.assert_close(step(x, y), expected)
    assert_follows(net, reference.net)


def test_batch_that_overlaps_a_parameter_in_another_storage_is_read_before_the_update() -> None:
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


# PyTorch 2.11 warns of a method of its own, in code that it need not have compiled.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
@pytest.mark.parametrize("cost", [QuadraticCost(), Autograd()], ids=repr)
def test_step_in_a_compiled_loop_equals_the_eager_step(cost: Cost) -> None:
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
