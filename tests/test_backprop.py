import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from manual_bp import (
    Cost,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Tanh,
    Trace,
    backprop,
    convert,
)
from tests.activations import IN_PLACE, TABLE
from tests.helpers import Operations, assert_same, error

# A network of 2-2-1 neurons, worked out by hand (with a calculator, to 16 digits) for two samples.
W1, B1 = [[0.1, 0.2], [-0.3, 0.4]], [0.05, -0.1]
W2, B2 = [[0.6, -0.5]], [0.2]
X = [[0.5, -1.0], [2.0, 1.5]]
Y = [[1.0], [0.0]]
Z1 = [[-0.1, -0.65], [0.55, -0.1]]
A1 = [[0.47502081252106, 0.3429895373265012], [0.6341355910108007, 0.47502081252106]]
Z2 = [[0.3135177188493854], [0.3429709483459504]]
A2 = [[0.5777436633510889], [0.5849120208129934]]
LOSSES = [0.08915020692007928, 0.1710610360457698]
# For each sample's own loss: ∇_a C_x; then BP1, BP2, and BP4 of the second and of the first layer.
GRAD_A = [[-0.4222563366489111], [0.5849120208129934]]
DELTA2 = [[-0.1030119342690284], [0.1420107595397486]]
DELTA1 = [[-0.01541322495637246, 0.01160675198259482], [0.01976854897997596, -0.01770704043940373]]
GRAD_W2 = [
    [[-0.0489328127158399, -0.03533201567404201]],
    [[0.09005407693063117, 0.06745806638330424]],
]
GRAD_W1 = [
    [[-0.007706612478186231, 0.01541322495637246], [0.005803375991297412, -0.01160675198259482]],
    [[0.03953709795995191, 0.02965282346996393], [-0.03541408087880746, -0.02656056065910559]],
]


def tensor(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def hand_worked_net() -> nn.Sequential:
    net = nn.Sequential(Linear(2, 2), Sigmoid(), Linear(2, 1), Sigmoid()).double()
    net.load_state_dict(
        {
            "0.weight": tensor(W1),
            "0.bias": tensor(B1),
            "2.weight": tensor(W2),
            "2.bias": tensor(B2),
        }
    )
    return net


def assert_is(found: Tensor | None, numbers: Any) -> None:
    assert found is not None
    torch.testing.assert_close(found, tensor(numbers), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_worked_out_by_hand(sample: int) -> None:
    trace = backprop(hand_worked_net(), tensor(X)[sample], tensor(Y)[sample], QuadraticCost())
    first, second = trace.layers
    assert_is(trace.cost, LOSSES[sample])
    assert_is(trace.output, A2[sample])
    assert_is(first.a_prev, X[sample])
    assert_is(first.z, Z1[sample])
    assert_is(first.a, A1[sample])
    assert_is(second.a_prev, A1[sample])
    assert_is(second.z, Z2[sample])
    assert_is(second.a, A2[sample])
    assert_is(QuadraticCost().gradient(trace.output, tensor(Y)[sample]), GRAD_A[sample])
    assert_is(second.delta, DELTA2[sample])
    assert_is(second.grad_b, DELTA2[sample])
    assert_is(second.grad_w, GRAD_W2[sample])
    assert_is(first.delta, DELTA1[sample])
    assert_is(first.grad_b, DELTA1[sample])
    assert_is(first.grad_w, GRAD_W1[sample])


@pytest.mark.parametrize(("reduction", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_batch_worked_out_by_hand(reduction: Any, weight: float) -> None:
    trace = backprop(hand_worked_net(), tensor(X), tensor(Y), QuadraticCost(reduction))
    first, second = trace.layers
    assert_is(trace.cost, weight * sum(LOSSES))
    assert_is(first.z, Z1)
    assert_is(second.a, A2)
    assert_is(second.delta / weight, DELTA2)
    assert_is(first.delta / weight, DELTA1)
    for layer, grad_w, delta in ((first, GRAD_W1, DELTA1), (second, GRAD_W2, DELTA2)):
        assert_is(layer.grad_w, (weight * tensor(grad_w).sum(0)).tolist())
        assert_is(layer.grad_b, (weight * tensor(delta).sum(0)).tolist())


def test_the_functions_agree_with_the_batch_worked_out_by_hand() -> None:
    net = hand_worked_net()
    QuadraticCost("sum")(net(tensor(X)), tensor(Y)).backward()
    for name, numbers in (("0", GRAD_W1), ("2", GRAD_W2)):
        assert_is(net.get_parameter(f"{name}.weight").grad, tensor(numbers).sum(0).tolist())


def build(
    sizes: Sequence[int],
    cost: Cost,
    linear: type[nn.Linear] = Linear,
    sigmoid: type[nn.Sigmoid] = Sigmoid,
    **options: Any,
) -> nn.Sequential:
    modules: list[nn.Module] = []
    for in_features, out_features in pairwise(sizes):
        modules += [linear(in_features, out_features, **options), sigmoid()]
    return nn.Sequential(*(modules if isinstance(cost, QuadraticCost) else modules[:-1]))


def targets(cost: Cost, leading: Sequence[int], classes: int, like: Tensor) -> Tensor:
    if isinstance(cost, SoftmaxCrossEntropyCost):
        return torch.randint(classes, tuple(leading), device=like.device)
    return torch.rand(*leading, classes, dtype=like.dtype, device=like.device)


COSTS = [
    make(reduction)
    for make in (QuadraticCost, SigmoidCrossEntropyCost, SoftmaxCrossEntropyCost)
    for reduction in ("mean", "sum")
]
every_cost = pytest.mark.parametrize("cost", COSTS, ids=repr)


@pytest.mark.parametrize(
    "activation",
    [a.make() for a in TABLE] + [a.make(inplace=True) for a in IN_PLACE],
    ids=repr,
)
def test_every_activation_agrees_with_its_function(
    activation: nn.Module, device: torch.device
) -> None:
    net = nn.Sequential(Linear(5, 4), activation, Linear(4, 3), activation, Sigmoid())
    net = net.double().to(device)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    y = torch.rand(6, 3, dtype=torch.float64, device=device)
    trace = backprop(net, x, y, QuadraticCost())
    QuadraticCost()(net(x), y).backward()
    for layer in trace.layers:
        for found, parameter in ((layer.grad_w, layer.w), (layer.grad_b, layer.b)):
            assert found is not None
            assert parameter is not None
            assert parameter.grad is not None
            assert_same([found], [parameter.grad])
    assert_same([trace["0"].z, trace.output], [F.linear(x, *net[0].parameters()), net(x)])


def test_linear_sigmoid_counts_as_a_layer_with_its_activation(device: torch.device) -> None:
    net = nn.Sequential(LinearSigmoid(5, 4), Tanh(), LinearSigmoid(4, 3)).double().to(device)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    y = torch.rand(6, 3, dtype=torch.float64, device=device)
    trace = backprop(net, x, y, QuadraticCost())
    QuadraticCost()(net(x), y).backward()
    assert [layer.name for layer in trace.layers] == ["0", "2"]
    for layer in trace.layers:
        assert layer.grad_w is not None
        assert layer.w.grad is not None
        assert_same([layer.grad_w], [layer.w.grad])


def test_a_net_fused_by_convert_gets_the_same_gradients() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Sigmoid())
    x, y = torch.randn(6, 5), torch.rand(6, 3)
    before = backprop(net, x, y, QuadraticCost())
    convert(net, fuse=True)
    after = backprop(net, x, y, QuadraticCost())
    assert [layer.name for layer in after.layers] == ["0", "2"]
    assert_same(parameter_gradients(after), parameter_gradients(before), rtol=0, atol=0)


def test_a_softplus_with_a_low_threshold_is_refused() -> None:
    net = nn.Sequential(Linear(5, 4), nn.Softplus(threshold=1))
    with pytest.raises(ValueError, match=r"threshold must be at least 20\.0; got 1"):
        backprop(net, torch.randn(6, 5), torch.rand(6, 4), QuadraticCost())


def parameter_gradients(trace: Trace) -> list[Tensor]:
    found = []
    for layer in trace.layers:
        found += [grad for grad in (layer.grad_w, layer.grad_b) if grad is not None]
    return found


def autograd_gradients(net: nn.Module, x: Tensor, y: Tensor, cost: Callable[..., Tensor]) -> Any:
    value = cost(net(x), y)
    return value, torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad])


@every_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(6,), (1,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_functions_bit_for_bit(
    cost: Cost, dtype: torch.dtype, leading: tuple[int, ...], bias: bool, device: torch.device
) -> None:
    options: Any = {"dtype": dtype, "device": device}
    net = build((5, 4, 3, 2), cost, bias=bias, **options)
    x = torch.randn(*leading, 5, **options)
    y = targets(cost, leading, 2, x)
    trace = backprop(net, x, y, cost)
    value, expected = autograd_gradients(net, x, y, cost)
    assert torch.equal(trace.cost, value)
    assert torch.equal(trace.output, net(x))
    found = parameter_gradients(trace)
    assert len(found) == len(expected) == 3 * (1 + bias)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@every_cost
def test_agrees_with_pytorchs_own_layers(cost: Cost, device: torch.device) -> None:
    options: Any = {"dtype": torch.float64, "device": device}
    net = build((5, 4, 3, 2), cost, nn.Linear, nn.Sigmoid, **options)
    x = torch.randn(6, 5, **options)
    y = targets(cost, (6,), 2, x)
    value, expected = autograd_gradients(net, x, y, cost)
    trace = backprop(net, x, y, cost)
    assert_same([trace.cost, *parameter_gradients(trace)], [value, *expected])
    # δ^l is the derivative with respect to z^l.
    for place, layer in zip((0, 2, 4), trace.layers, strict=True):
        rest = net[place + 1 :]
        z = layer.z.detach().requires_grad_()
        (delta,) = torch.autograd.grad(cost(rest(z), y), z)
        assert_same([layer.delta], [delta])
        assert torch.equal(rest(layer.z), trace.output)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    samples=st.integers(0, 5),
    cost=st.sampled_from(COSTS),
    bias=st.booleans(),
)
def test_nets_of_any_sizes_agree_with_the_functions(
    sizes: list[int], samples: int, cost: Cost, bias: bool
) -> None:
    net = build(sizes, cost, bias=bias, dtype=torch.float64)
    x = torch.randn(samples, sizes[0], dtype=torch.float64)
    y = targets(cost, (samples,), sizes[-1], x)
    _, expected = autograd_gradients(net, x, y, cost)
    assert_same(parameter_gradients(backprop(net, x, y, cost)), expected)


def test_matrix_products_are_as_few_as_the_notes_claim() -> None:
    net = build((5, 4, 3, 2), QuadraticCost())
    with Operations() as operations:
        backprop(net, torch.randn(6, 5), torch.rand(6, 2), QuadraticCost())
    # Forward 3, BP4 3, and BP2 for every layer but the last.
    assert operations.matrix_products == 3 + 3 + 2


def test_frozen_parameters_get_no_gradient_and_cost_no_product() -> None:
    cost = QuadraticCost()
    net = build((5, 4, 2), cost)
    net.get_parameter("0.weight").requires_grad_(False)
    net.get_parameter("2.bias").requires_grad_(False)
    with Operations() as operations:
        trace = backprop(net, torch.randn(6, 5), torch.rand(6, 2), cost)
    assert operations.matrix_products == 2 + 1 + 1
    assert trace["0"].grad_w is None
    assert trace["0"].grad_b is not None
    assert trace["2"].grad_w is not None
    assert trace["2"].grad_b is None


@pytest.mark.parametrize(
    "modules",
    [
        lambda: [Linear(5, 4), Linear(4, 2)],
        lambda: [
            Linear(5, 4),
            Sigmoid(),
            nn.Sigmoid(),
            Sigmoid(),
            Linear(4, 2),
            Sigmoid(),
            Sigmoid(),
        ],
        lambda: [Sigmoid(), Linear(5, 4), Sigmoid(), Linear(4, 2)],
        lambda: [nn.modules.linear.NonDynamicallyQuantizableLinear(5, 2)],
    ],
    ids=["no activation", "several activations", "one before the first layer", "a subclass"],
)
def test_other_orders_of_layers_and_activations_agree_with_the_functions(
    modules: Callable[[], list[nn.Module]],
) -> None:
    net = nn.Sequential(*modules()).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    trace = backprop(net, x, y, QuadraticCost())
    value, expected = autograd_gradients(net, x, y, QuadraticCost())
    assert_same([trace.cost, *parameter_gradients(trace)], [value, *expected])


def test_one_layer_used_twice_gets_both_gradients() -> None:
    tied, cost = Linear(4, 4), QuadraticCost()
    net = nn.Sequential(Linear(5, 4), Sigmoid(), tied, Sigmoid(), tied, Sigmoid()).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    trace = backprop(net, x, y, cost)
    assert [layer.name for layer in trace.layers] == ["0", "2", "4"]
    _, expected = autograd_gradients(net, x, y, cost)
    trace.assign_grads()
    assert_same([p.grad for p in net.parameters() if p.grad is not None], expected)


def test_ten_training_steps_agree_with_pytorchs_own_layers(device: torch.device) -> None:
    """Three ways to train: our Functions, `backprop`, and PyTorch's layers with its own loss."""
    options: Any = {"dtype": torch.float64, "device": device}
    cost = QuadraticCost()
    nets = [build((5, 4, 3), cost, **options), build((5, 4, 3), cost, **options)]
    nets.append(build((5, 4, 3), cost, nn.Linear, nn.Sigmoid, **options))
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), lr=3.0, momentum=0.9) for net in nets]
    start = nets[0].get_parameter("0.weight").detach().clone()
    for _ in range(10):
        x, y = torch.randn(8, 5, **options), torch.rand(8, 3, **options)
        for optimizer in optimizers:
            optimizer.zero_grad()
        cost(nets[0](x), y).backward()
        backprop(nets[1], x, y, cost).assign_grads()
        (((nets[2](x) - y) ** 2).sum(1) / 2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    weights = [list(net.parameters()) for net in nets]
    assert not torch.allclose(weights[0][0], start, rtol=0.1)
    assert all(torch.equal(one, two) for one, two in zip(weights[0], weights[1], strict=True))
    assert_same(weights[0], weights[2])


def test_equals_the_functions_under_autocast(device: torch.device) -> None:
    cost = QuadraticCost()
    net = build((5, 4, 2), cost, device=device)
    x, y = torch.randn(6, 5, device=device), torch.rand(6, 2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        trace = backprop(net, x, y, cost)
        value = cost(net(x), y)
    value.backward()
    assert torch.equal(trace.cost, value)
    for layer in trace.layers:
        assert layer.w.grad is not None
        assert layer.grad_w is not None
        assert layer.grad_w.dtype is torch.float32
        assert torch.equal(layer.grad_w, layer.w.grad)
        assert layer.b is not None
        assert layer.b.grad is not None
        assert layer.grad_b is not None
        assert layer.grad_b.dtype is torch.float32
        if device.type == "cpu":  # elsewhere a sum may depend on the layout of its input
            assert torch.equal(layer.grad_b, layer.b.grad)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(backprop(net, x.bfloat16(), y, cost).output, trace.output)


def test_is_as_exact_as_pytorchs_own_layers_under_autocast(device: torch.device) -> None:
    cost = QuadraticCost()
    net = build((50, 40, 20), cost, device=device)
    theirs = build((50, 40, 20), cost, nn.Linear, nn.Sigmoid, device=device)
    theirs.load_state_dict(net.state_dict())
    x, y = torch.randn(60, 50, device=device), torch.rand(60, 20, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        trace = backprop(net, x, y, cost)
        (((theirs(x) - y) ** 2).sum(1) / 2).mean().backward()
    exact = backprop(copy.deepcopy(net).double(), x.double(), y.double(), cost)
    pairs = zip(parameter_gradients(trace), theirs.parameters(), strict=True)
    for (found, their), right in zip(pairs, parameter_gradients(exact), strict=True):
        assert their.grad is not None
        assert error(found, right) <= 2 * error(their.grad, right)


def test_leaves_the_network_as_it_was() -> None:
    net = build((5, 4, 2), QuadraticCost())
    before = [p.detach().clone() for p in net.parameters()]
    trace = backprop(net, torch.randn(6, 5), torch.rand(6, 2), QuadraticCost())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
    assert not trace.cost.requires_grad
    assert not trace.output.requires_grad


X5, Y2 = torch.ones(6, 5), torch.ones(6, 2)
GOOD = nn.Sequential(Linear(5, 2), Sigmoid())


def hooked(register: str, place: str) -> nn.Sequential:
    net = nn.Sequential(Linear(5, 2), Sigmoid())
    getattr(net.get_submodule(place), register)(lambda *_: None)
    return net


def hooked_weight(register: str) -> nn.Sequential:
    net = nn.Sequential(Linear(5, 2), Sigmoid())
    getattr(net.get_parameter("0.weight"), register)(lambda _: None)
    return net


def pruned() -> nn.Sequential:
    layer = nn.Linear(5, 2)
    prune.l1_unstructured(layer, "weight", 1)
    layer._forward_pre_hooks.clear()
    return nn.Sequential(layer)


def patched() -> nn.Sequential:
    net = nn.Sequential(Linear(5, 2))
    net[0].forward = lambda a: 2 * a
    return net


class Doubled(nn.Linear):
    def forward(self, a: Tensor) -> Tensor:
        return 2 * super().forward(a)


class Residual(nn.Sequential):
    def forward(self, a: Tensor) -> Tensor:
        return a + super().forward(a)  # type: ignore[no-any-return]


class Logged(nn.Linear):
    def __call__(self, a: Tensor) -> Tensor:
        return 2 * super().__call__(a)  # type: ignore[no-any-return]


def patched_net() -> nn.Sequential:
    net = nn.Sequential(Linear(5, 2))
    net.forward = lambda a: 2 * a  # type: ignore[method-assign]
    return net


def with_parameter(name: str, *shape: int) -> nn.Sequential:
    net = nn.Sequential(Linear(5, 4), Sigmoid(), nn.Linear(4, 2))
    index, kind = name.split(".")
    setattr(net[int(index)], kind, nn.Parameter(torch.zeros(shape)))
    return net


def sparse() -> nn.Sequential:
    net = nn.Sequential(Linear(5, 2))
    net[0].weight = nn.Parameter(torch.eye(2, 5).to_sparse())
    return net


def weight_normed() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)))


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (Linear(5, 2), TypeError, "net must be an nn.Sequential of .* got Linear"),
        (Residual(Linear(5, 5)), TypeError, "net must be an nn.Sequential of .* got Residual"),
        (nn.Sequential(), ValueError, "net must hold at least one linear layer; got 0 modules"),
        (nn.Sequential(Sigmoid()), ValueError, "net must hold at least one linear layer"),
        (
            nn.Sequential(Linear(5, 4), nn.Dropout(), Linear(4, 2)),
            TypeError,
            r"net\['1'\] must be a Linear, LinearSigmoid or an activation \(.*\), .* Dropout",
        ),
        (nn.Sequential(GOOD), TypeError, r"net\['0'\] must be a Linear,.* got Sequential"),
        (nn.Sequential(Doubled(5, 2)), TypeError, r"net\['0'\] must be a Linear,.* got Doubled"),
        (patched(), TypeError, r"net\['0'\] must be a Linear,.* got Linear"),
        (nn.Sequential(Logged(5, 2)), TypeError, r"net\['0'\] must be a Linear,.* got Logged"),
        (patched_net(), TypeError, "net must be an nn.Sequential of .* got Sequential"),
        (hooked("register_forward_hook", "1"), TypeError, r"net\['1'\] must have no hooks"),
        (hooked("register_forward_pre_hook", "1"), TypeError, r"net\['1'\] must have no hooks"),
        (hooked("register_full_backward_hook", "0"), TypeError, r"net\['0'\] must have no hooks"),
        (hooked("register_full_backward_pre_hook", "0"), TypeError, "must have no hooks"),
        (hooked("register_forward_hook", ""), TypeError, "net must have no hooks"),
        (hooked_weight("register_hook"), TypeError, r"net\['0'\].weight must have no hooks"),
        (
            hooked_weight("register_post_accumulate_grad_hook"),
            TypeError,
            r"net\['0'\].weight must have no hooks",
        ),
        (pruned(), TypeError, r"net\['0'\].weight must be a parameter; got a tensor"),
        (
            weight_normed(),
            TypeError,
            r"net\['0'\].weight must be a parameter; got a tensor",
        ),
        (
            nn.Sequential(nn.LazyLinear(2)),
            TypeError,
            r"net\['0'\].weight must be initialised; got a lazy one",
        ),
        (
            nn.Sequential(Linear(5, 4), Linear(4, 2).double()),
            TypeError,
            r"net\['1'\].weight must have the dtype of net\['0'\].weight, torch.float32; got",
        ),
        (
            nn.Sequential(Linear(5, 4), Linear(4, 2, device="meta")),
            ValueError,
            r"net\['1'\].weight must be on the device of net\['0'\].weight, cpu; got meta",
        ),
        (
            nn.Sequential(Linear(5, 4), Sigmoid(), Linear(3, 2)),
            ValueError,
            r"net\['2'\] must take the 4 outputs of net\['0'\]; got in_features=3",
        ),
        (
            with_parameter("2.bias", 1),  # PyTorch broadcasts it over the outputs
            ValueError,
            r"net\['2'\].bias must have shape \(2,\), the first size of .*weight; got \(1,\)",
        ),
        (with_parameter("0.bias", 1, 4), ValueError, r"net\['0'\].bias .* \(4,\), .* got \(1, 4\)"),
        (with_parameter("2.bias", 3), ValueError, r"net\['2'\].bias .* \(2,\), .* got \(3,\)"),
        (
            with_parameter("0.weight", 5),
            ValueError,
            r"net\['0'\].weight must have shape \(out, in\); got \(5,\)",
        ),
        (
            with_parameter("2.weight", 3, 2, 4),
            ValueError,
            r"net\['2'\].weight must have shape \(out, in\); got \(3, 2, 4\)",
        ),
        (sparse(), TypeError, r"net\['0'\].weight must be a dense tensor; got layout"),
    ],
)
def test_unsuitable_nets_are_refused(net: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        backprop(net, X5, Y2, QuadraticCost())


@pytest.mark.parametrize(
    ("x", "y", "cost", "error", "message"),
    [
        ([1.0], Y2, QuadraticCost(), TypeError, "x must be a torch.Tensor; got list"),
        (
            X5.double(),
            Y2,
            QuadraticCost(),
            TypeError,
            r"x must have the dtype of net\['0'\].weight, torch.float32; got torch.float64",
        ),
        (X5.long(), Y2, QuadraticCost(), TypeError, "x must have a real floating-point dtype"),
        (X5 + 1j, Y2, QuadraticCost(), TypeError, "x must have a real floating-point dtype"),
        (X5.to("meta"), Y2, QuadraticCost(), ValueError, "x must be on the device of"),
        (
            X5[:, :4],
            Y2,
            QuadraticCost(),
            ValueError,
            r"x must have last dimension 5, the in_features of net\['0'\]; got \(6, 4\)",
        ),
        (X5, [1.0], QuadraticCost(), TypeError, "y must be a torch.Tensor; got list"),
        (X5, Y2[:, :1], QuadraticCost(), ValueError, r"y must have shape \(6, 2\), that of a"),
        (X5, Y2, nn.MSELoss(), TypeError, "cost must be a manual_bp.Cost, .* got MSELoss"),
        (X5, Y2, QuadraticCost("none"), ValueError, "cost must be reduced by 'mean' or 'sum'"),
    ],
)
def test_unsuitable_arguments_are_refused(
    x: Any, y: Any, cost: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backprop(GOOD, x, y, cost)


def test_a_cost_with_hooks_is_refused() -> None:
    cost = QuadraticCost()
    cost.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="cost must have no hooks"):
        backprop(GOOD, X5, Y2, cost)


class CustomCost(Cost):
    """C = Σ a³ y, with a gradient that can be made wrong."""

    wrong: Any = None

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        return (a**3 * y).sum()

    def gradient(self, a: Tensor, y: Tensor) -> Tensor:
        gradient: Tensor = 3 * a**2 * y
        return self.wrong(gradient) if self.wrong else gradient


def test_a_custom_cost_agrees_with_autograd() -> None:
    net, x, y = GOOD, torch.randn(6, 5), torch.rand(6, 2)
    trace = backprop(net, x, y, CustomCost())
    value, expected = autograd_gradients(net, x, y, CustomCost())
    assert_same([trace.cost, *parameter_gradients(trace)], [value, *expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda gradient: gradient[:, :1],
            ValueError,
            r"CustomCost.gradient\(output, y\) must have shape \(6, 2\), that of the output",
        ),
        (lambda _: 1.0, TypeError, r"CustomCost.gradient\(output, y\) must be a torch.Tensor"),
    ],
)
def test_a_wrong_gradient_of_a_custom_cost_is_refused(
    wrong: Any, error: type[Exception], message: str
) -> None:
    cost = CustomCost()
    cost.wrong = wrong
    with pytest.raises(error, match=message):
        backprop(GOOD, X5, Y2, cost)


def test_the_trace_is_no_part_of_a_graph() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    trace = backprop(GOOD, x, torch.rand(6, 2, requires_grad=True), QuadraticCost())
    first = trace.layers[0]
    for t in (trace.cost, trace.output, first.a_prev, first.z, first.a, first.delta):
        assert not t.requires_grad
