"""Clipping by the norm of the whole gradient equals `clip_grad_norm_`, before any update."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark.measure import peak_bytes
from manual_bp import AdamW, Cost, Linear, QuadraticCost, Tanh, TrainingStep
from manual_bp.training_step import _clip, _learn
from manual_bp.training_step._layer import fresh_buffers
from tests.helpers import Operations
from tests.training_step.networks import (
    RULES,
    Reference,
    assert_follows,
    batch,
    both,
    every_activation,
    every_cost,
    follow,
    network,
    values,
)

# At most 11 samples: (N, N) matrices take fewer operations in all layers, in some, in none.
SIZES = [(60, 50, 40), (60, 50, 3), (4, 3, 3)]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@every_size
def test_a_hundred_clipped_steps_equal_autograd_and_sgd(
    sizes: tuple[int, ...], device: torch.device
) -> None:
    """The norm falls below the limit on the way, at the latest for the smaller batches."""
    follow(network(sizes=sizes, device=device), QuadraticCost(), 100, max_norm=0.3)


@every_cost
def test_clipped_steps_with_every_cost_equal_autograd_and_sgd(cost: Cost) -> None:
    follow(network(sizes=(60, 50, 3)), cost, 5, max_norm=0.3)


@every_activation
def test_clipped_steps_with_every_activation_equal_autograd_and_sgd(activation: nn.Module) -> None:
    """Also with those that overwrite a, which BP4 needs later."""
    follow(network(activation, (20, 15, 12, 3)), QuadraticCost(), 5, max_norm=0.01)


@pytest.mark.parametrize("rule", [*RULES.values(), {"momentum": 0.9}], ids=[*RULES, "momentum"])
def test_clipped_steps_of_every_rule_equal_torch_optim(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_learn, "BLOCK", 200)
    follow(network(Tanh(), (60, 50, 4)), QuadraticCost(), 5, max_norm=0.01, **rule)


def test_rate_in_a_tensor_clips_the_same(device: torch.device) -> None:
    net, cost = network(device=device), QuadraticCost()
    step, reference = both(net, cost, 0.1, max_norm=0.05)
    for _ in range(4):
        x, y = batch(net, cost, 4)
        run = step._plan.new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
        with torch.no_grad():
            found = run(x, y, torch.tensor(0.1, dtype=x.dtype, device=device))
        torch.testing.assert_close(found, reference(x, y))
        torch.testing.assert_close(step.grad_norm, reference.grad_norm)
    assert_follows(net, reference.net)


def test_several_activations_and_frozen_parameters_equal_autograd_and_sgd() -> None:
    net = nn.Sequential(nn.ReLU(), Linear(9, 8), Tanh(), nn.LeakyReLU(0.2), Linear(8, 7), Tanh())
    net = net.append(Linear(7, 2)).double()
    for frozen in ("1.weight", "1.bias", "4.weight", "6.weight"):
        net.get_parameter(frozen).requires_grad_(False)
        follow(net, QuadraticCost(), 3, max_norm=0.01)


def test_all_frozen_network_has_norm_0() -> None:
    net = network().requires_grad_(False)
    step = TrainingStep(net, QuadraticCost(), 0.1, max_norm=1.0)
    step(*batch(net, step.cost, 4))
    assert step.grad_norm == 0


@pytest.mark.parametrize(("samples", "more"), [(10, 2 + 2), (15, 2 + 1), (30, 1 + 1)])
def test_the_form_with_fewer_operations_is_computed(samples: int, more: int) -> None:
    """The norm of ∂C/∂w takes two products (N, N), or one (out, in)."""
    counts = []
    for max_norm in (None, 1.0):
        net = network(sizes=(60, 50, 20))
        step = TrainingStep(net, QuadraticCost(), 0.1, max_norm=max_norm)
        x, y = batch(net, step.cost, samples)
        operations = Operations()
        with operations:
            step(x, y)
        counts.append(sum(name in {"mm", "addmm", "addmm_"} for name in operations.names))
    assert counts == [5, 5 + more]


@pytest.mark.parametrize("part", [1.0, 0.5, 0.1, 1e-2, 1e-4, 0.0])
def test_norm_of_gradients_that_cancel_is_accurate(part: float) -> None:
    """Pairs of samples with opposite gradients, up to a part.

    The products (N, N) alone would be off by 1e-4 of the norm for a part of 1e-2, and more below.
    """
    net, cost = network(Tanh(), (300, 200), dtype=torch.float32), QuadraticCost()
    x = torch.randn(1, 300).repeat(40, 1) + 1e-3 * torch.randn(40, 300)
    a = net(x).detach()
    error = torch.randn(20, 200)
    y = a - torch.cat([error, (part - 1) * error])
    step, theirs = both(net, cost, 0.0, max_norm=1e9)
    exact = Reference(copy.deepcopy(net).double(), cost, 0.0, max_norm=1e9)
    step(x, y)
    theirs(x, y)
    exact(x.double(), y.double())
    norms = [each.grad_norm for each in (step, theirs, exact)]
    found, their, right = (float(n) for n in norms if n is not None)
    assert abs(found - right) <= 2 * abs(their - right) + 1e-6 * right


def test_norm_by_gram_is_refused_where_it_would_be_rounding() -> None:
    """And it is accurate where it is not refused."""
    accepted = 0
    for shift in torch.logspace(-6, 1, 40).tolist():
        a, half = torch.ones(30, 400) + 1e-3 * torch.randn(30, 400), torch.randn(15, 300)
        delta = torch.cat([half, -half]) + shift
        right = (delta.double().mT @ a.double()).norm().item()
        found = _clip.norm_by_gram(delta, a)
        accepted += found is not None
        assert found is None or abs(found / right - 1) < 1e-5
    assert 5 < accepted < 35


class Slope(Cost):
    """The mean of all outputs, whose δ is the same everywhere."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return output.sum(-1).mean()

    def gradient(self, output: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return torch.full_like(output, 1 / len(output))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-5, 1e15, 1e25, 1e37])
def test_norm_whose_square_is_out_of_range_is_that_of_pytorch(scale: float) -> None:
    """0 or infinite at the ends."""
    net = nn.Sequential(Linear(30, 20, bias=False))
    step, reference = both(net, Slope(), 0.0, max_norm=math.inf)
    x, y = scale * torch.rand(4, 30), torch.zeros(4, 20)
    step(x, y)
    reference(x, y)
    torch.testing.assert_close(step.grad_norm, reference.grad_norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_size
def test_norm_that_is_not_finite_is_treated_as_by_pytorch(
    bad: float, sizes: tuple[int, ...]
) -> None:
    """No error; a norm that is nan makes parameters nan."""
    net, cost = network(sizes=sizes), QuadraticCost()
    step, reference = both(net, cost, 0.1, max_norm=1.0)
    x, y = batch(net, cost, 4)
    y[0, 0] = bad
    step(x, y)
    reference(x, y)
    norms = step.grad_norm, reference.grad_norm
    assert [n is not None and bool(n.isfinite()) for n in norms] == [False, False]
    for found, expected in zip(values(net), values(reference.net), strict=True):
        assert bool(found.isfinite().all()) == bool(expected.isfinite().all())


def test_infinite_limit_only_measures() -> None:
    net, cost = network(), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, max_norm=math.inf)
    assert step.grad_norm is not None
    assert step.grad_norm.isnan()
    plain, reference = Reference(net, cost, 0.1), Reference(net, cost, 0.1, max_norm=math.inf)
    for _ in range(3):
        x, y = batch(net, cost, 4)
        step(x, y)
        plain(x, y)
        reference(x, y)
        torch.testing.assert_close(step.grad_norm, reference.grad_norm)
    assert_follows(net, plain.net)
    assert TrainingStep(net, cost, 0.1).grad_norm is None


def test_grad_norm_is_a_new_tensor() -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.5, max_norm=1.0)
    x, y = batch(step.net, step.cost, 4)
    step(x, y)
    first = step.grad_norm
    assert first is not None
    value = first.item()
    step(x, y)
    assert first.item() == value != step.grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(20, 30, 10), (300, 200, 90)], ids=str)
def test_clipped_steps_are_as_accurate_as_pytorch(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    net, cost = network(Tanh(), sizes, dtype=dtype), QuadraticCost()
    options = {"max_norm": 0.1, "momentum": 0.9}
    exact = Reference(copy.deepcopy(net).double(), cost, 0.01, **options)
    theirs, ours = Reference(net, cost, 0.01, **options), TrainingStep(net, cost, 0.01, **options)  # type: ignore[arg-type]
    for _ in range(100):
        x, y = batch(net, cost, 16)
        exact(x.double(), y.double())
        theirs(x, y)
        ours(x, y)
    found, their, right = (
        torch.cat([v.double().flatten() for v in values(n)]) for n in (net, theirs.net, exact.net)
    )
    assert (found - right).norm() <= 2 * (their - right).norm() + torch.finfo(
        dtype
    ).eps * right.norm()


def test_batch_that_is_part_of_a_parameter_is_read_before_the_update() -> None:
    net, cost = network(sizes=(5, 5, 5, 5)), QuadraticCost()
    step, reference = both(net, cost, 0.5, max_norm=0.1)
    rows, others = net.get_parameter("4.weight").detach(), torch.rand(5, 5, dtype=torch.float64)
    for x, y in [(rows, others), (others, rows)] * 2:
        expected = reference(x.clone(), y.clone())
        torch.testing.assert_close(step(x, y), expected)
    assert_follows(net, reference.net)


@pytest.mark.parametrize("rule", [{}, {"rule": AdamW()}], ids=str)
def test_clipping_holds_every_delta_one_copy_and_one_block(rule: dict[str, Any]) -> None:
    """And, for a moment, the two products (N, N) of one layer."""
    net, cost = network(sizes=(50, 40, 3)), QuadraticCost()
    step = TrainingStep(net, cost, 0.1, max_norm=0.1, **rule)
    x, y = batch(net, cost, 6)
    step(x, y)
    numbers = 6 * (40 + 3) + 6 * (40 + 3) + 6 * 40 + 50 * 40
    assert sum(m.numel() for m in step._plan._buffers.values()) == numbers
    assert peak_bytes(lambda: step(x, y), "cpu") <= 8 * 2 * 6 * 6 + 200
