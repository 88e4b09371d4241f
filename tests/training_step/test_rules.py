"""Nesterov, dampening, Adam, AdamW and groups equal `torch.optim`."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark.measure import peak_bytes
from manual_bp import (
    Adam,
    AdamW,
    Cost,
    Linear,
    QuadraticCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step import _learn
from manual_bp.training_step._layer import fresh_buffers
from tests.helpers import Operations
from tests.training_step.networks import (
    GROUPS,
    RULES,
    Autograd,
    Reference,
    assert_follows,
    batch,
    both,
    every_rule,
    follow,
    network,
    values,
)


@every_rule
@pytest.mark.parametrize("cost", [QuadraticCost(), SoftmaxCrossEntropyCost("sum")], ids=repr)
def test_a_hundred_steps_equal_torch_optim(
    rule: dict[str, Any], cost: Cost, device: torch.device
) -> None:
    follow(network(Softplus(), device=device), cost, 100, **rule)


@every_rule
def test_rule_with_a_user_cost_equals_torch_optim(rule: dict[str, Any]) -> None:
    follow(network(Tanh()), Autograd(), 5, **rule)


@every_rule
def test_gradient_in_blocks_of_rows_equals_torch_optim(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row, of some, with fewer in the last, and of all rows."""
    monkeypatch.setattr(_learn, "BLOCK", 20)
    follow(network(sizes=(30, 5, 6, 3)), QuadraticCost(), 5, **rule)


@every_rule
def test_rate_in_a_tensor_equals_torch_optim(rule: dict[str, Any], device: torch.device) -> None:
    """As in a CUDA graph and an exported program, which read no values."""
    net, cost = network(device=device), QuadraticCost()
    step, reference = TrainingStep(net, cost, 0.1, **rule), Reference(net, cost, 0.1, **rule)
    x, y = batch(net, cost, 4)
    run = step._plan.new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
    for lr in (0.1, 0.3, 0.3, 0.05):
        x, y = batch(net, cost, 4)
        reference.set_lr(lr)
        with torch.no_grad():
            found = run(x, y, torch.tensor(lr, dtype=x.dtype, device=device))
        torch.testing.assert_close(found, reference(x, y))
    assert_follows(net, reference.net)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in RULES),
        *((name, torch.bfloat16) for name in ("nesterov", "adam", "groups")),
    ],
)
def test_a_hundred_steps_are_as_accurate_as_torch_optim(name: str, dtype: torch.dtype) -> None:
    """Compared with float64, the error is at most twice that of PyTorch, plus one rounding."""
    net, cost, rule = network(Tanh(), (20, 30, 10), dtype=dtype), QuadraticCost(), RULES[name]
    exact = Reference(copy.deepcopy(net).double(), cost, 0.01, **rule)
    theirs, ours = Reference(net, cost, 0.01, **rule), TrainingStep(net, cost, 0.01, **rule)
    for _ in range(100):
        x, y = batch(net, cost, 32)
        exact(x.double(), y.double())
        theirs(x, y)
        ours(x, y)
    errors = [distance(each, exact.net) for each in (net, theirs.net)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


def distance(net: nn.Module, exact: nn.Module) -> float:
    found, right = (torch.cat([v.flatten().double() for v in values(n)]) for n in (net, exact))
    return float((found - right).norm() / right.norm())


@every_rule
def test_parameters_that_learn_later_start_then(rule: dict[str, Any]) -> None:
    """Each parameter counts its own steps, as in `torch.optim`."""
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, **rule)
    reference = Reference(net, cost, 0.1, **rule)
    for number in range(9):
        for each in (net, reference.net):
            each.get_parameter("2.weight").requires_grad_(3 <= number < 6)
            each.get_parameter("4.bias").requires_grad_(number % 2 == 0)
        x, y = batch(net, cost, 4)
        torch.testing.assert_close(step(x, y), reference(x, y))
        assert_follows(net, reference.net)


def test_last_fitting_pattern_counts() -> None:
    groups = {"*": {"lr_scale": 0.5}, "0.*": {"lr_scale": 2, "weight_decay": 0.3}}
    follow(network(), QuadraticCost(), 3, groups=groups)
    with pytest.raises(AssertionError):
        follow_reordered(groups)


def follow_reordered(groups: dict[str, Any]) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, groups=dict(reversed(groups.items())))
    reference = Reference(net, cost, 0.1, groups=groups)
    x, y = batch(net, cost, 4)
    step(x, y)
    reference(x, y)
    assert_follows(net, reference.net)


def test_rule_runs_no_derivative_kernel_and_allocates_nothing() -> None:
    net = network()
    step = TrainingStep(net, QuadraticCost(), 0.1, **RULES["adamw"])
    x, y = batch(net, step.cost, 4)
    step(x, y)
    operations = Operations()
    with operations:
        step(x, y)
    made = {name for name in operations.names if not name.endswith("_")} - {"is_set_to", "item"}
    # Into buffers, except for the cost; and what `item` calls.
    assert made - {"_local_scalar_dense"} == {"addmm", "mm", "mv", "sub", "dot", "sqrt"}


@pytest.mark.parametrize("rule", [{"momentum": 0.9, "nesterov": True}, {"rule": AdamW()}], ids=str)
def test_a_step_holds_one_block_of_a_gradient(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides activations and two δ: a block of the most rows, and nothing as large as a weight."""
    net, cost = network(sizes=(50, 40, 3)), QuadraticCost()
    for block, numbers in ((2**18, 50 * 40), (500, 500), (30, 50)):
        monkeypatch.setattr(_learn, "BLOCK", block)
        step = TrainingStep(net, cost, 0.1, **rule)
        x, y = batch(net, cost, 6)
        step(x, y)
        buffers = 6 * (40 + 3 + 2 * 40) + numbers
        assert sum(m.numel() for m in step._plan._buffers.values()) == buffers
        assert peak_bytes(lambda s=step, a=x, b=y: s(a, b), "cpu") < 200  # type: ignore[misc]


@pytest.mark.parametrize("options", [{}, {"rule": AdamW()}, {"max_norm": 1.0}], ids=str)
def test_a_replaced_pass_is_freed_at_once(options: dict[str, Any]) -> None:
    """Without waiting for the garbage collector, because its buffers may be large."""
    step = TrainingStep(network(), QuadraticCost(), 0.1, **options)
    step(*batch(step.net, step.cost, 4))
    (run,) = map(weakref.ref, step._plan._passes.values())
    gc.disable()
    try:
        step(*batch(step.net, step.cost, 5))
        assert run() is None
    finally:
        gc.enable()


@every_rule
def test_training_resumes_from_a_saved_state(rule: dict[str, Any], tmp_path: Any) -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, max_norm=0.5, **rule)
    for _ in range(3):
        step(*batch(net, cost, 4))
    torch.save({"net": net.state_dict(), "step": step.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt")
    other = network()
    other.load_state_dict(saved["net"])
    resumed = TrainingStep(other, cost, 1.0)
    resumed.load_state_dict(saved["step"])
    twins = [step, resumed, copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
    x, y = batch(net, cost, 4)
    for _ in range(3):
        for each in twins:
            each(x, y)
    for twin in twins[1:]:
        assert all(torch.equal(*pair) for pair in zip(values(net), values(twin.net), strict=True))
        assert repr(twin).split("cost=")[1] == repr(step).split("cost=")[1]


def test_state_of_a_rule_is_checked() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, rule=AdamW())
    step(*batch(step.net, step.cost, 4))
    before = step.state_dict()
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"rule": {"name": "Lion", "betas": (0.9, 0.99), "eps": 0}}, KeyError, "a name of Adam"),
        ({"rule": "AdamW"}, TypeError, "rule must be a mapping"),
        ({"rule": {"name": "Adam", "betas": (0.9, 1.0), "eps": 0}}, ValueError, "betas must be b"),
        ({"steps": {"0.bias": torch.zeros(5)}}, ValueError, r"steps\['0.bias'\] must have shape"),
        ({"exp_avg": {"0.bias": torch.zeros(())}}, ValueError, r"exp_avg\['0.bias'\] must have"),
        ({"exp_avg_sq": [1.0]}, TypeError, "exp_avg_sq must be a mapping"),
        ({"groups": {"9.*": {}}}, ValueError, r"groups\['9.\*'\] must fit the name of a parameter"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            step.load_state_dict(before | change)
        assert str(step.state_dict()) == str(before)


NET = nn.Sequential(Linear(3, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nesterov": True}, ValueError, "nesterov must be used with momentum and without damp"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "without dampening"),
        ({"nesterov": 1, "momentum": 0.9}, TypeError, "nesterov must be True or False; got 1"),
        ({"dampening": -0.1}, ValueError, "dampening must be at least 0; got -0.1"),
        ({"rule": "adam"}, TypeError, "rule must be an Adam, an AdamW or None; got str"),
        ({"rule": AdamW}, TypeError, "rule must be an Adam, an AdamW or None; got type"),
        ({"rule": Adam(), "momentum": 0.9}, ValueError, "must be 0 with a rule, .* got 0.9 and 0"),
        ({"rule": Adam((0.9, 1.0))}, ValueError, r"betas must be below 1; got \(0.9, 1.0\)"),
        ({"rule": Adam((-0.1, 0.9))}, ValueError, "betas must be at least 0; got -0.1"),
        ({"rule": Adam(0.9)}, TypeError, "betas must be two numbers; got 0.9"),  # type: ignore[arg-type]
        ({"rule": Adam(eps=-1.0)}, ValueError, "eps must be at least 0; got -1.0"),
        ({"rule": Adam(eps=1e39)}, ValueError, "eps must be at most 3.40"),
        ({"groups": ["*.bias"]}, TypeError, "groups must be a mapping of patterns to options"),
        ({"groups": {0: {}}}, TypeError, "groups must have strings as keys; got int"),
        ({"groups": {"bias": {}}}, ValueError, r"groups\['bias'\] must fit .* got 0.weight, 0.b"),
        ({"groups": {"*": 0.1}}, TypeError, r"groups\['\*'\] must be a mapping; got float"),
        ({"groups": {"*": {"lr": 1}}}, ValueError, r"a key of groups\['\*'\] must be one of 'lr_s"),
        ({"groups": {"*": {"lr_scale": -1}}}, ValueError, r"\['lr_scale'\] must be at least 0"),
        ({"groups": {"*": {"lr_scale": 1e39}}}, ValueError, "lr_scale of .* at most 3.40"),
        ({"groups": {"*": {"weight_decay": 1e39}}}, ValueError, "weight_decay of groups.* at most"),
        ({"max_norm": 0}, ValueError, "max_norm must be above 0; got 0"),
        ({"max_norm": float("nan")}, ValueError, "max_norm must be above 0; got nan"),
        ({"max_norm": "1"}, TypeError, "max_norm must be a number; got str"),
    ],
    ids=str,
)
def test_constructor_refuses(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainingStep(NET, QuadraticCost(), 0.1, **options)


@pytest.mark.parametrize("options", [{"rule": Adam()}, {"rule": AdamW()}, {"max_norm": 1.0}])
def test_float16_is_refused_where_its_range_is_too_small(options: Any) -> None:
    net = network(dtype=torch.float16)
    with pytest.raises(TypeError, match="must be None for parameters of float16, "):
        TrainingStep(net, QuadraticCost(), 0.1, **options)


def test_groups_follow_a_pytorch_schedule() -> None:
    """One `lr`, by which all groups are scaled, as PyTorch's schedules scale theirs."""
    net, cost = network(), QuadraticCost()
    step, reference = both(net, cost, 0.1, groups=GROUPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(reference.optimizer, lambda n: 1 / (1 + n))
    for number in range(4):
        step.lr = 0.1 / (1 + number)
        x, y = batch(net, cost, 4)
        step(x, y)
        reference(x, y)
        schedule.step()
    assert_follows(net, reference.net)


def test_adam_without_gradient_stays() -> None:
    """m and v are 0, and so is the step, because ε is not."""

    class Flat(Autograd):
        def gradient(self, output: Tensor, y: Tensor) -> Tensor:
            return 0 * super().gradient(output, y)

    net = network()
    before = values(net)
    TrainingStep(net, Flat(), 0.1, rule=Adam())(*batch(net, QuadraticCost(), 4))
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
