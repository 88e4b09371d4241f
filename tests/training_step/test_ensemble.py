"""An ensemble does what a TrainingStep of each network does, and notices what it notices."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.benchmark.measure import peak_bytes
from manual_bp import (
    Adam,
    AdamW,
    Cost,
    EnsembleStep,
    LeakyReLU,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step import _learn
from tests.helpers import Operations, only_new_objects
from tests.training_step.networks import (
    COSTS,
    GROUPS,
    RULES,
    Autograd,
    Counting,
    Doubled,
    assert_follows,
    batch,
    every_activation,
    network,
    values,
)

OF_EACH = ("lr", "momentum", "weight_decay", "dampening", "max_norm")


def each(options: dict[str, Any], k: int) -> dict[str, Any]:
    """The options of one network."""
    return {n: v[k] if isinstance(v, list) else v for n, v in options.items()}


class Singles:
    """A TrainingStep for a copy of each network."""

    def __init__(self, nets: Sequence[nn.Sequential], cost: Cost, **options: Any) -> None:
        self.nets = copy.deepcopy(nets)
        self.steps = [TrainingStep(n, cost, **each(options, k)) for k, n in enumerate(self.nets)]

    def __call__(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """x and y are those of all networks, or stacked ones."""
        of_each = x.ndim == 3
        pairs = zip(x, y, strict=True) if of_each else [(x, y)] * len(self.steps)
        return torch.stack([s(*p, **options) for s, p in zip(self.steps, pairs, strict=True)])

    @property
    def grad_norm(self) -> Tensor | None:
        norms = [step.grad_norm for step in self.steps]
        return None if norms[0] is None else torch.stack([n for n in norms if n is not None])


def assert_all_follow(nets: Any, others: Any, **tolerances: float) -> None:
    for net, other in zip(nets, others, strict=True):
        assert_follows(net, other, **tolerances)


def batch_of(nets: Sequence[nn.Sequential], cost: Cost, samples: int, own: bool, **o: Any) -> Any:
    """A batch for all networks, or one for each."""
    if not own:
        return batch(nets[0], cost, samples, **o)
    pairs = [batch(net, cost, samples, **o) for net in nets]
    return tuple(torch.stack(each) for each in zip(*pairs, strict=True))


def follow(
    nets: Sequence[nn.Sequential],
    cost: Cost,
    steps: int = 5,
    *,
    own: bool = False,
    micro_batch: int | None = None,
    tolerances: dict[str, float] | None = None,
    **options: Any,
) -> None:
    """Compare an ensemble with single steps, for batches of several sizes and two rates."""
    close: Any = tolerances or {"rtol": 1e-10, "atol": 1e-12}
    options = {"lr": [0.05 / (k + 1) for k in range(len(nets))]} | options
    singles = Singles(nets, cost, **options)
    ensemble = EnsembleStep(nets, cost, **options)
    takes_indices = isinstance(cost, SoftmaxCrossEntropyCost)
    for number in range(steps):
        if number == steps // 2:
            ensemble.lr = 0.5 * ensemble.lr
            for step in singles.steps:
                step.lr = 0.5 * step.lr
        samples, indices = (8, 8, 3, 11, 1)[number % 5], takes_indices and number % 2 == 1
        x, y = batch_of(nets, cost, samples, own, indices=indices)
        found = ensemble(x, y, micro_batch=micro_batch)
        torch.testing.assert_close(found, singles(x, y, micro_batch=micro_batch), **close)
        torch.testing.assert_close(ensemble.grad_norm, singles.grad_norm, **close)
    assert_all_follow(nets, singles.nets, **close)


def networks(count: int = 3, *arguments: Any, **options: Any) -> list[nn.Sequential]:
    return [network(*arguments, **options) for _ in range(count)]


every_own = pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
# A rule, and numbers of three networks.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": [0.0, 0.1, 0.3]},
    "momentum": {"momentum": [0.9, 0.0, 0.5], "weight_decay": [0.1, 0.0, 0.2]},
    "dampening of each": {
        "momentum": [0.9, 0.0, 0.5],
        "dampening": [0.1, 0.4, 0.0],
        "weight_decay": 0.1,
    },
    "clipping": {"max_norm": [0.05, math.inf, 0.3], "momentum": 0.5},
}
SETTINGS |= {name: rule | {"weight_decay": [0.1, 0.0, 0.3]} for name, rule in RULES.items()}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@every_own
@every_setting
def test_many_steps_equal_single_runs(setting: dict[str, Any], own: bool) -> None:
    nets, close = networks(activation=Softplus()), {"rtol": 1e-8, "atol": 1e-10}
    steps = 20 if own else 100
    follow(nets, QuadraticCost(), steps, own=own, tolerances=close, **setting)


@every_own
@pytest.mark.parametrize(
    "cost", [*COSTS, Autograd(), Autograd("sum"), Doubled(), Counting()], ids=repr
)
def test_every_cost_equals_single_runs(cost: Cost, own: bool) -> None:
    follow(networks(), cost, own=own)


@every_own
@every_activation
def test_every_activation_equals_single_runs(activation: nn.Module, own: bool) -> None:
    follow(networks(2, activation), QuadraticCost(), own=own, max_norm=[0.01, 0.1])


@every_own
@every_setting
def test_other_kinds_of_networks_equal_single_runs(setting: dict[str, Any], own: bool) -> None:
    kinds: list[Callable[[], list[nn.Module]]] = [
        lambda: [LinearSigmoid(4, 6), LinearSigmoid(6, 2, bias=False)],
        lambda: [Linear(4, 6, bias=False), Tanh(), Sigmoid(), nn.ReLU(), Linear(6, 2), Sigmoid()],
        lambda: [nn.ReLU(inplace=True), Sigmoid(), nn.Linear(4, 2), LeakyReLU(0.3, True)],
        lambda: [Linear(4, 2)],
        lambda: [Linear(4, 1), Sigmoid(), Linear(1, 1), Sigmoid(), Linear(1, 2)],
    ]
    setting = setting | {"groups": {}}
    for modules in kinds:
        nets = [nn.Sequential(*modules()).double() for _ in range(3)]
        follow(nets, QuadraticCost(), 2, own=own, **setting)


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from(COSTS),
    st.sampled_from([{}, {"rule": Adam()}, {"max_norm": 0.1}, {"momentum": 0.5}]),
    st.booleans(),
    st.booleans(),
)
def test_any_number_and_shape_of_networks_equals_single_runs(
    count: int, sizes: list[int], cost: Cost, rule: dict[str, Any], bias: bool, own: bool
) -> None:
    follow(networks(count, sizes=sizes, bias=bias), cost, 2, own=own, **rule)


@every_own
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (4, 0, 3), (4, 3, 0)], ids=str)
def test_layers_of_no_neurons_equal_single_runs(sizes: tuple[int, ...], own: bool) -> None:
    for rule in ({}, {"rule": Adam()}, {"max_norm": 0.1}):
        follow(networks(sizes=sizes), QuadraticCost(), 2, own=own, **rule)


@every_own
@pytest.mark.parametrize("rule", [{}, {"rule": AdamW()}, {"max_norm": [0.1, 1.0, 9.0]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ensemble_is_as_accurate_as_single_runs(
    dtype: torch.dtype, rule: dict[str, Any], own: bool
) -> None:
    """Compared with float64, the error is at most twice theirs, plus one rounding."""
    nets, cost = networks(3, Tanh(), (20, 30, 10), dtype=dtype), QuadraticCost()
    options: Any = {"lr": [0.003, 0.01, 0.1], "weight_decay": [0.1, 0.0, 0.01]} | rule
    exact = Singles([copy.deepcopy(net).double() for net in nets], cost, **options)
    singles = Singles(nets, cost, **options)
    ensemble = EnsembleStep(nets, cost, **options)
    for _ in range(100):
        x, y = batch_of(nets, cost, 16, own)
        exact(x.double(), y.double())
        singles(x, y)
        ensemble(x, y)
    for net, single, right in zip(nets, singles.nets, exact.nets, strict=True):
        found, theirs, expected = (
            torch.cat([v.double().flatten() for v in values(n)]) for n in (net, single, right)
        )
        allowed = 2 * (theirs - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (found - expected).norm() <= allowed


@every_own
@every_setting
def test_frozen_parameters_equal_single_runs(setting: dict[str, Any], own: bool) -> None:
    nets = networks()
    for frozen in (["0.weight"], ["0.bias", "2.weight"], ["0.weight", "0.bias", "4.bias"]):
        for net in nets:
            net.requires_grad_(True)
            for name in frozen:
                net.get_parameter(name).requires_grad_(False)
        before = [net.get_parameter(name).clone() for net in nets for name in frozen]
        follow(nets, QuadraticCost(), 3, own=own, **setting)
        after = [net.get_parameter(name) for net in nets for name in frozen]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("setting", [{}, *RULES.values(), SETTINGS["clipping"]], ids=str)
def test_micro_batches_equal_single_runs(setting: dict[str, Any]) -> None:
    follow(networks(), QuadraticCost(), micro_batch=3, **setting)


@every_own
def test_gradients_in_blocks_of_networks_equal_single_runs(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learn, "BLOCK", 70)  # blocks of two networks or one, and of none together
    rule = SETTINGS["adamw"] | {"max_norm": [0.1, 0.2, 0.05, 1.0, 0.1], "groups": GROUPS}
    rule["weight_decay"] = [0.1, 0.0, 0.3, 0.2, 0.1]
    follow(networks(5), QuadraticCost(), own=own, **rule)
    momentum: dict[str, Any] = {"momentum": [0.9, 0.5, 0.8, 0.1, 0.2], "nesterov": True}
    follow(networks(5), QuadraticCost(), own=own, **momentum)


@every_own
@pytest.mark.parametrize(
    "rule", [{}, {"momentum": 0.9}, {"rule": Adam()}, {"max_norm": 0.1}], ids=str
)
@pytest.mark.parametrize("cost", [QuadraticCost(), SigmoidCrossEntropyCost(), Autograd()], ids=repr)
def test_network_that_becomes_nan_does_not_affect_the_others(
    cost: Cost, rule: dict[str, Any], own: bool
) -> None:
    nets = networks(4, dtype=torch.float32)
    with torch.no_grad():
        nets[1].get_parameter("2.weight").fill_(math.nan)
        nets[2].get_parameter("0.weight")[0, 0] = math.inf
    singles = Singles(nets, cost, lr=0.1, **rule)
    ensemble = EnsembleStep(nets, cost, 0.1, **rule)
    for _ in range(3):
        x, y = batch_of(nets, cost, 4, own)
        found, expected = ensemble(x, y), singles(x, y)
    assert found.isfinite().tolist() == expected.isfinite().tolist()
    assert found.isfinite().tolist()[::3] == [True, True]
    assert_all_follow(nets[::3], singles.nets[::3], rtol=1e-5, atol=1e-6)
    for k in (1, 2):
        assert not all(bool(v.isfinite().all()) for v in values(nets[k]))


@every_own
def test_epoch_equals_single_steps(own: bool) -> None:
    nets, cost = networks(), QuadraticCost()
    singles = Singles(nets, cost, lr=[0.1, 0.2, 0.3])
    step = EnsembleStep(nets, cost, [0.1, 0.2, 0.3])
    (x, y), order = batch(nets[0], cost, 20), torch.randperm(20)
    if own:
        with pytest.raises(ValueError, match=r"x must have shape \(M, in\); got \(3, 20, 7\)"):
            step.epoch(x.expand(3, 20, 7), y.expand(3, 20, 3), order[:3] % 3, 3)
    costs = step.epoch(x, y, order, 6)
    expected = [singles(x[part], y[part]) for part in torch.split(order, 6)]
    torch.testing.assert_close(costs, torch.stack(expected))
    assert_all_follow(nets, singles.nets)
    assert step.epoch(x, y, order[:0], 6).shape == (0, 3)


def test_batched_products_are_as_many_as_those_of_one_network() -> None:
    """The first layers, which read the same x, are multiplied as one matrix."""
    for own, names in ((False, ["addmm", "addmm_"]), (True, ["baddbmm", "baddbmm_"])):
        nets, cost = networks(), QuadraticCost()
        step = EnsembleStep(nets, cost, [0.1, 0.2, 0.3])
        x, y = batch_of(nets, cost, 4, own)
        step(x, y)
        operations = Operations()
        with operations:
            step(x, y)
        made = [
            n
            for n in operations.names
            if n in {"addmm", "addmm_", "mm", "baddbmm", "baddbmm_", "bmm"}
        ]
        assert made == [
            names[0],
            "baddbmm",
            "baddbmm",
            "bmm",
            "bmm",
            "baddbmm_",
            "bmm",
            "baddbmm_",
            names[1],
        ]
        assert not [name for name in operations.names if "backward" in name]


def test_parameters_remain_those_of_the_networks() -> None:
    nets, cost = networks(), QuadraticCost()
    before = [list(net.parameters()) for net in nets]
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    for p in nets[1].parameters():
        p.grad = torch.ones_like(p)
    step = EnsembleStep(nets, cost, 0.1, momentum=0.9)
    x, y = batch(nets[0], cost, 4)
    held = cost(nets[2](x), y)
    costs = step(x, y)
    assert (costs.shape, costs.requires_grad) == ((3,), False)
    for net, old in zip(nets, before, strict=True):
        assert all(p is q for p, q in zip(net.parameters(), old, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()
    optimizer.step()  # changes them in place: the next step goes on from there
    expected = torch.stack([cost(net(x), y).detach() for net in nets])
    torch.testing.assert_close(step(x, y), expected)


def test_state_dict_of_a_network_is_as_large_as_before() -> None:
    """A view of the common memory would be saved with all of it."""
    nets = networks(8, dtype=torch.float32, sizes=(50, 40))
    step = EnsembleStep(nets, QuadraticCost(), 0.1)
    step(*batch(nets[0], step.cost, 4))
    file, alone = io.BytesIO(), io.BytesIO()
    state = dict(nets[3].state_dict())
    torch.save(state, file)
    torch.save({name: t.clone() for name, t in state.items()}, alone)
    assert len(file.getvalue()) == len(alone.getvalue())
    file.seek(0)
    for name, value in torch.load(file).items():
        assert torch.equal(value, nets[3].get_parameter(name))


def addresses(nets: Sequence[nn.Module]) -> dict[int, int]:
    """Those of the memories of all parameters, with their sizes in bytes."""
    memories = [p.untyped_storage() for net in nets for p in net.parameters()]
    return {memory.data_ptr(): memory.nbytes() for memory in memories}


def moved(nets: Sequence[nn.Sequential]) -> None:
    nets[1].get_parameter("0.weight").data = nets[1].get_parameter("0.weight").data.clone()


def loaded(nets: Sequence[nn.Sequential]) -> None:
    nets[0].load_state_dict({n: v.clone() for n, v in nets[2].state_dict().items()}, assign=True)


def loaded_in_place(nets: Sequence[nn.Sequential]) -> None:
    nets[0].load_state_dict({n: v.clone() for n, v in nets[2].state_dict().items()})


def transposed(nets: Sequence[nn.Sequential]) -> None:
    w = nets[1].get_parameter("2.weight")
    w.data = w.data.mT


def cast(nets: Sequence[nn.Sequential]) -> None:
    for net in nets:
        net.float()


def frozen(nets: Sequence[nn.Sequential]) -> None:
    for net in nets:
        net[0].requires_grad_(False)


def longer(nets: Sequence[nn.Sequential]) -> None:
    for net in nets:
        net.append(Tanh())


def steeper(nets: Sequence[nn.Sequential]) -> None:
    for net in nets:
        activation: Any = net[1]
        activation.negative_slope = 0.9


@pytest.mark.parametrize(
    "change", [moved, loaded, loaded_in_place, transposed, cast, frozen, longer, steeper]
)
def test_changed_networks_are_noticed(change: Callable[[Any], None]) -> None:
    """And what momentum has kept goes on."""
    nets, cost = networks(3, LeakyReLU(0.2), (6, 5, 5)), QuadraticCost()
    options: dict[str, Any] = {"lr": [0.1, 0.2, 0.3], "momentum": 0.9}
    singles, step = Singles(nets, cost, **options), EnsembleStep(nets, cost, **options)
    x, y = batch(nets[0], cost, 4)
    step(x, y)
    singles(x, y)
    change(nets)
    change(singles.nets)
    dtype = nets[0].get_parameter("0.weight").dtype
    for _ in range(2):
        torch.testing.assert_close(
            step(x.to(dtype), y.to(dtype)), singles(x.to(dtype), y.to(dtype))
        )
    close = {"rtol": 1e-5, "atol": 1e-6} if change is cast else {}
    assert_all_follow(nets, singles.nets, **close)


def test_changed_reduction_is_noticed() -> None:
    nets, cost = networks(), QuadraticCost()
    step, singles = EnsembleStep(nets, cost, 0.1), Singles(nets, cost, lr=0.1)
    x, y = batch(nets[0], cost, 4)
    cost.reduction = "sum"
    torch.testing.assert_close(step(x, y), singles(x, y))
    assert_all_follow(nets, singles.nets)


def reshaped(nets: Sequence[nn.Sequential]) -> None:
    nets[1][2] = Linear(5, 8, dtype=torch.float64)
    nets[1][4] = Linear(8, 3, dtype=torch.float64)


def cast_one(nets: Sequence[nn.Sequential]) -> None:
    nets[1].float()


def freeze_one(nets: Sequence[nn.Sequential]) -> None:
    nets[1].get_parameter("2.bias").requires_grad_(False)


def lengthen_one(nets: Sequence[nn.Sequential]) -> None:
    nets[1].append(Tanh())


def other_slope(nets: Sequence[nn.Sequential]) -> None:
    activation: Any = nets[1][1]
    activation.negative_slope = 0.7


def hook_one(nets: Sequence[nn.Sequential]) -> None:
    nets[1][0] = nets[1][0].to(torch.float64)
    nets[1][0].register_forward_hook(lambda *_: None)
    moved(nets)


def tie_to_another(nets: Sequence[nn.Sequential]) -> None:
    nets[1][0].weight = nets[0][0].weight


def share_memory(nets: Sequence[nn.Sequential]) -> None:
    nets[1].share_memory()


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "shape": (reshaped, r"nets\[1\] must be like nets\[0\].* 2.weight of shape \(8, 5\)"),
    "dtype": (
        cast_one,
        r"nets\[1\] must be like nets\[0\] in all but values; got 0.weight of .*float32",
    ),
    "frozen": (
        freeze_one,
        r"nets\[1\] must be like nets\[0\].*got 2.bias .*frozen instead of .*learned",
    ),
    "modules": (
        lengthen_one,
        r"nets\[1\] must be like nets\[0\].*got Tanh\(\) after 4 instead of nothing more",
    ),
    "option": (
        other_slope,
        r"nets\[1\] must be like nets\[0\].*LeakyReLU\(.*0.7\) after 0 instead",
    ),
    "hooks": (hook_one, r"nets\[1\]: net\['0'\] must have no hooks"),
    "tied": (
        tie_to_another,
        r"0.weight of nets\[1\] must share no memory .* with 0.weight of nets\[0\]",
    ),
    "shared memory": (share_memory, r"nets\[1\]: 0.weight of net must not be in shared memory"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_networks_that_do_not_go_together_are_refused_and_nothing_changes(
    change: Callable[[Any], None], message: str
) -> None:
    nets, cost = networks(3, LeakyReLU(0.2), bias=True), QuadraticCost()
    step = EnsembleStep(nets, cost, 0.1)
    x, y = batch(nets[0], cost, 4)
    step(x, y)
    change(nets)
    before = [(p, p.data_ptr(), p.detach().clone()) for net in nets for p in net.parameters()]
    for call in (lambda: step(x, y), lambda: EnsembleStep(nets, cost, 0.1)):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert all(p.data_ptr() == a and torch.equal(p, old) for p, a, old in before)


NETS = networks(2)
X, Y = torch.zeros(4, 7).double(), torch.zeros(4, 3).double()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"nets": network()}, TypeError, "nets must be a sequence of networks; got Sequential"),
        ({"nets": 3}, TypeError, "nets must be a sequence of networks; got int"),
        ({"nets": []}, ValueError, "nets must hold at least one network; got none"),
        ({"nets": set(NETS)}, TypeError, "nets must be a sequence of networks; got set"),
        (
            {"nets": [networks(1, bias=False)[0], NETS[0]]},
            ValueError,
            r"nets\[1\] must be like nets\[0\].*got 0.bias of .* instead of Sigmoid",
        ),
        ({"nets": [NETS[0], NETS[0]]}, ValueError, r"0.weight of nets\[1\] must share no memory"),
        ({"nets": [NETS[0], Linear(2, 3)]}, TypeError, r"nets\[1\]: net must be an nn.Sequential"),
        ({"lr": [0.1]}, ValueError, "lr must be a number, or one for each of 2 networks; got 1"),
        ({"lr": torch.ones(3)}, ValueError, "lr must be a number, or one for each of 2 .*; got 3"),
        ({"lr": [0.1, -1]}, ValueError, r"nets\[1\]: lr must be at least 0; got -1"),
        ({"lr": "0.1"}, TypeError, r"nets\[0\]: lr must be a number; got str"),
        ({"lr": {0.1, 0.2}}, TypeError, r"nets\[0\]: lr must be a number; got set"),
        ({"lr": b"ab"}, TypeError, r"nets\[0\]: lr must be a number; got bytes"),
        ({"momentum": [0.1, math.nan]}, ValueError, r"nets\[1\]: momentum must be at least 0"),
        (
            {"momentum": [0.1, 0.0], "nesterov": True},
            ValueError,
            r"nets\[1\]: nesterov must be used",
        ),
        ({"weight_decay": [[1], [2]]}, TypeError, r"nets\[0\]: weight_decay must be a number"),
        (
            {"max_norm": [None, 1.0]},
            ValueError,
            "max_norm must be None for all networks or for none",
        ),
        ({"max_norm": [1.0, 0.0]}, ValueError, r"nets\[1\]: max_norm must be above 0; got 0.0"),
        (
            {"rule": [Adam(), Adam()]},
            TypeError,
            r"nets\[0\]: rule must be an Adam, an AdamW or None",
        ),
        ({"groups": {"x": {}}}, ValueError, r"nets\[0\]: groups\['x'\] must fit the name of a"),
        ({"cost": nn.MSELoss()}, TypeError, "cost must be a manual_bp.Cost"),
        ({"nets": networks(2, dtype=torch.float16)}, TypeError, "float16"),
    ],
    ids=str,
)
def test_invalid_argument_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EnsembleStep(**{"nets": NETS, "cost": QuadraticCost(), "lr": 0.1, **arguments})


@pytest.mark.parametrize(
    ("x", "y", "micro_batch", "error", "message"),
    [
        (
            X[0],
            Y[0],
            None,
            ValueError,
            r"x must have shape \(N, in\), or \(K, N, in\) for K = 2 .*\(7,\)",
        ),
        (X.expand(3, 4, 7), Y, None, ValueError, r"for K = 2 networks; got \(3, 4, 7\)"),
        (X, Y[:3], None, ValueError, r"y must have the first sizes of x, \(4,\); got \(3, 3\)"),
        (
            X.expand(2, 4, 7),
            Y,
            None,
            ValueError,
            r"y must have the first sizes of x, \(2, 4\); got",
        ),
        (X, Y[:, :2], None, ValueError, "y must have shape"),
        (X[:, :6], Y, None, ValueError, "x must have last dimension 7"),
        (X.float(), Y, None, TypeError, "x must have the dtype of"),
        (X, Y.float(), None, TypeError, "y must have the dtype of the output"),
        (X.tolist(), Y, None, TypeError, "x must be a torch.Tensor; got list"),
        (X, Y.tolist(), None, TypeError, "y must be a torch.Tensor; got list"),
        (
            X.expand(2, 4, 7),
            Y.expand(2, 4, 3),
            2,
            ValueError,
            "micro_batch must be None with a batch for",
        ),
        (X, Y, 0, ValueError, "micro_batch must be at least 1; got 0"),
    ],
    ids=str,
)
def test_refused_batch_changes_nothing(
    x: Any, y: Any, micro_batch: Any, error: type[Exception], message: str
) -> None:
    step = EnsembleStep(NETS, QuadraticCost(), 0.1, momentum=0.9)
    before = [v for net in NETS for v in values(net)]
    with pytest.raises(error, match=message):
        step(x, y, micro_batch=micro_batch)
    after = [v for net in NETS for v in values(net)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_rates_can_be_set_between_steps() -> None:
    step = EnsembleStep(networks(), QuadraticCost(), [0.1, 0.2, 0.3])
    assert (step.lr.dtype, step.lr.tolist()) == (torch.float64, [0.1, 0.2, 0.3])
    cases: list[tuple[Any, list[float]]] = [
        (0.5, [0.5] * 3),
        ((1, 2, 3), [1, 2, 3]),
        (np.array(0.25), [0.25] * 3),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        (0.5 * step.lr, [0.05, 0.1, 0.15]),
    ]
    for value, expected in cases:
        step.lr = value
        assert step.lr.tolist() == expected
    refused: list[tuple[Any, str]] = [
        ([1, 2], "lr must be a number, or one for each of 3 networks; got 2"),
        ([1, 2, -3], r"nets\[2\]: lr must be at least 0; got -3"),
        (1e400, r"nets\[0\]: lr must be finite; got inf"),
    ]
    for value, message in refused:
        with pytest.raises(ValueError, match=message):
            step.lr = value
    with pytest.raises(TypeError, match=r"nets\[0\]: lr must be a number; got NoneType"):
        step.lr = None  # type: ignore[assignment]
    assert step.lr.tolist() == [0.05, 0.1, 0.15]


def test_rates_can_be_changed_in_place() -> None:
    nets, cost, rates = networks(), QuadraticCost(), [0.1, 0.2, 0.3]
    step, singles = EnsembleStep(nets, cost, 0.1), Singles(nets, cost, lr=0.1)
    base = step.lr
    step.lr = rates
    assert base.tolist() == [0.1] * 3  # a schedule may start from it
    for change in (lambda _: None, moved, lambda _: None):  # a new plan in between, too
        change(nets)
        step.lr[1] *= 2
        step.lr *= 0.5
        for single, rate in zip(singles.steps, step.lr.tolist(), strict=True):
            single.lr = rate
        assert [state["lr"] for state in step.state_dicts()] == step.lr.tolist()
        x, y = batch(nets[0], cost, 4)
        torch.testing.assert_close(step(x, y), singles(x, y))
    assert_all_follow(nets, singles.nets)
    assert step.lr.tolist() == [0.0125, 0.2, 0.0375]
    before = [v for net in nets for v in values(net)]
    step.lr[2] = math.nan
    for call in (lambda: step(x, y), lambda: step.epoch(x, y, torch.arange(4), 2)):
        with pytest.raises(ValueError, match=r"nets\[2\]: lr must be at least 0; got nan"):
            call()
    assert all(
        torch.equal(*p) for p in zip(before, (v for n in nets for v in values(n)), strict=True)
    )
    step.lr = 0.1
    step(x, y)


@pytest.mark.parametrize(
    "setting",
    [SETTINGS["momentum"], SETTINGS["adamw"], SETTINGS["dampening"], SETTINGS["clipping"]],
    ids=str,
)
def test_training_goes_on_from_the_states_of_all_or_of_one_network(setting: dict[str, Any]) -> None:
    nets, cost = networks(), QuadraticCost()
    step = EnsembleStep(nets, cost, [0.1, 0.2, 0.3], **setting)
    x, y = batch(nets[0], cost, 4)
    step(x, y)
    file = io.BytesIO()
    torch.save(step.state_dicts(), file)
    file.seek(0)
    states, others = torch.load(file), copy.deepcopy(nets)
    other = EnsembleStep(others, cost, 0.0)
    other.load_state_dicts(states)
    alone = copy.deepcopy(nets[1])
    single = TrainingStep(alone, cost, 0.0)
    single.load_state_dict(states[1])
    copied, pickled = copy.deepcopy(step), pickle.loads(pickle.dumps(step))
    for _ in range(3):
        expected = step(x, y)
        torch.testing.assert_close(single(x, y), expected[1])
        for each in (other, copied, pickled):
            torch.testing.assert_close(each(x, y), expected)
    assert_follows(alone, nets[1])
    for each in (other, copied, pickled):
        assert_all_follow(each.nets, nets)
        assert not addresses(each.nets).keys() & addresses(nets).keys()


def test_states_that_do_not_go_together_are_refused() -> None:
    nets = networks(2)
    plain = EnsembleStep(nets, QuadraticCost(), 0.1).state_dicts()
    adam = EnsembleStep(nets, QuadraticCost(), 0.1, rule=Adam()).state_dicts()
    step = EnsembleStep(nets, QuadraticCost(), 0.3, rule=Adam())
    step(*batch(nets[0], step.cost, 4))
    once = step.state_dicts()
    cases: list[tuple[Any, str]] = [
        (None, "states must be a sequence, as state_dicts.. gives it; got NoneType"),
        (plain[0], "states must be a sequence, as state_dicts.. gives it; got dict"),
        (plain[:1], "states must be one for each of 2 networks; got 1"),
        ([plain[0], adam[1]], r"must be"),
        ([adam[0], once[1]], r"nets\[1\] must have taken as many steps as nets\[0\]"),
        ([plain[0], {}], r"nets\[1\]: state must have the keys"),
    ]
    for states, message in cases:
        with pytest.raises((KeyError, TypeError, ValueError), match=message):
            step.load_state_dicts(states)
    assert step.lr.tolist() == [0.3, 0.3]


def test_step_is_the_same_in_every_grad_mode_and_in_compiled_code() -> None:
    nets, cost = networks(), QuadraticCost()
    step, singles = EnsembleStep(nets, cost, 0.1), Singles(nets, cost, lr=0.1)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x, y = batch(nets[0], cost, 4)
            step(x, y)
        singles(x.clone(), y.clone())
    assert_all_follow(nets, singles.nets)
    with pytest.raises(RuntimeError, match=r"^EnsembleStep must be called outside of torch.func"):
        torch.func.vmap(step)(x.clone()[None], y.clone()[None])
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of autocast"):
        step(x, y)


def test_batch_that_is_part_of_a_parameter_is_read_before_the_update() -> None:
    nets, cost = networks(2, sizes=(5, 5, 5)), QuadraticCost()
    step, singles = EnsembleStep(nets, cost, 0.5), Singles(nets, cost, lr=0.5)
    for _ in range(3):
        x, y = (
            nets[0].get_parameter("2.weight").detach(),
            nets[1].get_parameter("0.weight").detach(),
        )
        expected = singles(x.clone(), y.clone())
        torch.testing.assert_close(step(x, y), expected)
    assert_all_follow(nets, singles.nets)


@pytest.mark.parametrize(
    ("rule", "own", "numbers"),
    [
        ({}, False, 40 + 3 + 2 * 40),
        ({}, True, 40 + 3 + 2 * 40),
        ({"max_norm": 1.0}, False, 40 + 3 + 40 + 3 + 40 + 40),
        ({"max_norm": 1.0}, True, 40 + 3 + 40 + 3 + 40),
    ],
    ids=str,
)
def test_memory_is_that_of_so_many_networks(rule: dict[str, Any], own: bool, numbers: int) -> None:
    """Activations, two δ or all of them, and for clipping a copy of a, and one gradient."""
    nets, cost = networks(4, sizes=(50, 40, 3)), QuadraticCost()
    step = EnsembleStep(nets, cost, 0.1, **rule)
    x, y = batch_of(nets, cost, 6, own)
    step(x, y)
    gradient = 4 * 50 * 40 if rule else 0
    assert sum(m.numel() for m in step._plan._buffers.values()) == 4 * 6 * numbers + gradient
    assert peak_bytes(lambda: step(x, y), "cpu") <= 8 * (4 * 6 + 20 * 4)  # losses; numbers of each


def test_ensemble_of_new_parameters_holds_them_once() -> None:
    """The common memory replaces that of the networks."""
    nets = networks(4, sizes=(50, 40, 3))
    size = 8 * 4 * sum(p.numel() for p in nets[0].parameters())
    step: list[EnsembleStep] = []
    peak = peak_bytes(lambda: step.append(EnsembleStep(nets, QuadraticCost(), 0.1)), "cpu")
    assert size <= peak <= size + 1000
    assert sum(addresses(nets).values()) == size


def test_steps_leave_no_objects_behind() -> None:
    nets, cost = networks(), QuadraticCost()
    step = EnsembleStep(nets, cost, [0.1, 0.2, 0.3], momentum=0.9)
    x, y = batch(nets[0], cost, 4)
    step(x, y)
    with only_new_objects():
        for _ in range(200):
            step(x, y)
        gc.collect()
        assert len(gc.get_objects()) <= 5


def test_memory_of_a_replaced_plan_is_freed_at_once() -> None:
    nets, cost = networks(), QuadraticCost()
    step = EnsembleStep(nets, cost, 0.1, momentum=0.9, max_norm=1.0)
    x, y = batch(nets[0], cost, 4)
    step(x, y)
    old = weakref.ref(step._plan)
    gc.disable()
    try:
        frozen(nets)
        step(x, y)
        assert old() is None
    finally:
        gc.enable()


def test_repr_names_networks_and_rates() -> None:
    text = repr(EnsembleStep(networks(2, sizes=(2, 3)), QuadraticCost(), [0.1, 0.2]))
    assert text.startswith("EnsembleStep(2 times Sequential(")
    assert text.endswith("cost=QuadraticCost(), lr=[0.1, 0.2])")
