"""Opacus: per-sample gradients, clipped, with noise added.

Opacus looks up how to compute them by a layer's exact class. It does not know ours, so it does what
works for any layer: torch.func over the layer's forward, which runs our backward under vmap and
grad.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import manual_bp
from manual_bp import convert, restore
from tests.compatibility.clients.side_by_side import (
    EXACT,
    NEEDS,
    assert_learns,
    assert_same_parameters,
    changes,
    every_activation,
    twins,
)
from tests.helpers import assert_same

opacus: Any = pytest.importorskip("opacus", reason=NEEDS)
samplers: Any = pytest.importorskip("opacus.grad_sample", reason=NEEDS)
linear_samplers: Any = pytest.importorskip("opacus.grad_sample.linear", reason=NEEDS)
layers: Any = pytest.importorskip("opacus.layers", reason=NEEDS)
validators: Any = pytest.importorskip("opacus.validators", reason=NEEDS)

pytestmark = [
    pytest.mark.clients,
    # Opacus warns that its noise is not cryptographic, and about its hook on the first layer, whose
    # input needs no gradient.
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
]

FEATURES, CLASSES, ROWS, BATCH, EPOCHS = 6, 3, 24, 6, 5
LIMIT = 0.3  # of the norm of a sample's gradient: most are above, some below


@pytest.fixture
def _registered() -> Iterator[None]:
    """Our Linear, registered as the documentation of Opacus says."""
    with (
        patch.dict(samplers.GradSampleModule.GRAD_SAMPLERS),
        patch.dict(samplers.GradSampleModuleFastGradientClipping.NORM_SAMPLERS),
    ):
        samplers.register_grad_sampler(manual_bp.Linear)(linear_samplers.compute_linear_grad_sample)
        samplers.register_norm_sampler(manual_bp.Linear)(linear_samplers.compute_linear_norm_sample)
        yield


# Without a sequence, a sample's gradient of a weight is an outer product, one multiplication per
# element: torch.func and Opacus' own formula must be bitwise equal.
def with_relu() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.LayerNorm(8),
        nn.LeakyReLU(),
        nn.Linear(8, CLASSES),
    )


def with_every_activation() -> nn.Sequential:
    return every_activation(FEATURES, CLASSES).double()


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return x.to(dtype), y


def sample_gradients(model: Any, **options: Any) -> list[Tensor]:
    """The gradients that Opacus computes, for each parameter and each sample."""
    x, y = data(next(model.parameters()).dtype)
    watched = samplers.GradSampleModule(model, **options)
    cross_entropy(watched(x), y).backward()
    return [parameter.grad_sample for parameter in model.parameters()]


def sample_by_sample(model: nn.Module) -> list[Tensor]:
    """The same, with each sample passed through the model alone."""
    x, y = data(next(model.parameters()).dtype)
    parameters = list(model.parameters())
    losses = [cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(ROWS)]
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    return [torch.stack(each) for each in zip(*gradients, strict=True)]


def by_functorch(model: nn.Module) -> set[str]:
    """The layers for which Opacus uses torch.func."""
    return {name for name, m in model.named_modules() if hasattr(m, "ft_compute_sample_grad")}


def private(
    model: Any, mode: str, noise: float = 0.0, *, batch: int = BATCH, poisson: bool = False
) -> list[Tensor]:
    """The losses of a private training, which changes the model's parameters."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(3)  # for Poisson sampling
    cost = nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    loader: Any = DataLoader(TensorDataset(*data(dtype)), batch_size=batch)
    watched, optimizer, *costs, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        criterion=cost,
        data_loader=loader,
        noise_multiplier=noise,
        noise_generator=torch.Generator().manual_seed(4),
        max_grad_norm=LIMIT,
        poisson_sampling=poisson,
        grad_sample_mode=mode,
    )
    losses = []
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = (costs[0] if costs else cost)(watched(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


def test_gradients_of_each_sample() -> None:
    ours, theirs, report = twins(with_relu())
    assert changes(report) == {"Linear": 3, "ReLU": 1, "LeakyReLU": 1}
    expected = sample_by_sample(copy.deepcopy(theirs).double())
    found = sample_gradients(ours)
    assert_same(found, sample_gradients(theirs), **EXACT)
    assert by_functorch(ours) == {"0", "2", "5"}
    assert by_functorch(theirs) == set()
    assert_same(found, [t.float() for t in expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", [False, True])
def test_gradients_of_each_sample_through_every_layer(fuse: bool) -> None:
    ours, theirs, report = twins(with_every_activation(), fuse=fuse)
    assert len(report.changed) == 11
    expected = sample_by_sample(copy.deepcopy(theirs))
    assert_same(sample_by_sample(copy.deepcopy(ours)), expected)
    found = sample_gradients(ours)
    assert_same(found, expected)
    assert_same(found, sample_gradients(theirs))
    assert by_functorch(ours) == {"0", "2", "4", "6", "8", "10"}


def test_opacus_own_layers() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    attention = layers.DPMultiheadAttention(6, 2, batch_first=True)
    recurrent = [getattr(layers, name)(6, 3, batch_first=True) for name in ("DPLSTM", "DPGRU")]
    for model, inputs in ((attention, (x, x, x)), *((m, (x,)) for m in recurrent)):
        ours, theirs, report = twins(model.double())
        assert report.changed
        for module in (ours, theirs):
            watched = samplers.GradSampleModule(module)
            watched(*inputs)[0].square().sum().backward()
        found, expected = ([p.grad_sample for p in m.parameters()] for m in (ours, theirs))
        assert_same(found, expected)  # sums over the sequence, in any order
        assert {len(gradients) for gradients in found} == {5}


def test_recurrent_layers_with_the_batch_second_are_refused_if_converted() -> None:
    # Opacus recognises layers that still take the batch first by their exact class.
    torch.manual_seed(1)
    ours, theirs, report = twins(layers.DPLSTM(6, 3, batch_first=False))
    assert changes(report) == {"RNNLinear": 2}
    message = "vmap: Expected all tensors to have the same size in the mapped dimension"
    for model, expectation in (
        (theirs, nullcontext()),
        (ours, pytest.raises(ValueError, match=message)),
    ):
        output, _ = samplers.GradSampleModule(model, batch_first=False)(torch.randn(4, 5, 6))
        with expectation:
            output.square().sum().backward()
    per_sample: list[Any] = list(theirs.parameters())
    assert {len(parameter.grad_sample) for parameter in per_sample} == {5}


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("fuse", [False, True])
def test_private_training(mode: str, noise: float, fuse: bool) -> None:
    ours, theirs, _ = twins(with_every_activation(), fuse=fuse)
    seen = private(ours, mode, noise)
    assert_same(seen, private(theirs, mode, noise))
    assert_same_parameters(ours, theirs)
    if not noise:
        assert_learns(seen)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_private_training_is_bitwise_equal(mode: str) -> None:
    ours, theirs, _ = twins(with_relu())
    seen = private(ours, mode, 1.0)
    assert_same(seen, private(theirs, mode, 1.0), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)


def test_empty_batches_of_poisson_sampling_match_pytorchs() -> None:
    ours, theirs, _ = twins(with_relu())
    seen, expected = (
        private(model, "hooks", 1.0, batch=1, poisson=True) for model in (ours, theirs)
    )
    assert torch.stack(seen).isnan().any()  # the mean over nothing
    torch.testing.assert_close(seen, expected, **EXACT, equal_nan=True)
    assert_same_parameters(ours, theirs, **EXACT)


def test_ghost_clipping_skips_our_linear() -> None:
    # Nothing refuses it, but its per-sample gradients are held in memory after all.
    ours, theirs, _ = twins(with_relu())
    assert_same(private(ours, "ghost"), private(theirs, "ghost"), rtol=1e-5, atol=1e-6)
    assert by_functorch(ours) == {"0", "2", "5"}
    assert by_functorch(theirs) == set()


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_our_registered_linear_is_handled_as_pytorchs(mode: str) -> None:
    ours, theirs, _ = twins(with_relu())
    seen = private(ours, mode, 1.0)
    assert by_functorch(ours) == set()
    assert_same(seen, private(theirs, mode, 1.0), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)


def converted_while_watched() -> list[Tensor]:
    model: Any = with_relu()
    watched = samplers.GradSampleModule(model)
    convert(watched)
    x, y = data(torch.float32)
    cross_entropy(watched(x), y).backward()
    return [parameter.grad_sample for parameter in model.parameters()]


def test_converting_what_opacus_has_wrapped_is_refused() -> None:
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute '_forward_counter'"):
        converted_while_watched()


@pytest.mark.usefixtures("_registered")
def test_converting_what_opacus_has_wrapped_works_when_registered() -> None:
    assert_same(converted_while_watched(), sample_gradients(with_relu()), **EXACT)


@pytest.mark.parametrize("fuse", [False, True])
def test_expanded_weights_are_refused(fuse: bool) -> None:
    ours, theirs, _ = twins(with_every_activation(), fuse=fuse)
    x, y = data(torch.float64)
    cross_entropy(samplers.GradSampleModuleExpandedWeights(theirs)(x), y).backward()
    watched = samplers.GradSampleModuleExpandedWeights(ours)
    name = "linear_sigmoid" if fuse else "linear"
    message = f"Expanded Weights encountered but cannot handle function {name}$"
    with pytest.raises(RuntimeError, match=message):
        watched(x)


def test_the_validator_and_the_fixer_accept_ours() -> None:
    ours, _, _ = twins(nn.Sequential(*with_relu(), nn.BatchNorm1d(CLASSES)))
    (error,) = validators.ModuleValidator.validate(ours)
    assert "BatchNorm cannot support training with differential privacy" in str(error)
    fixed = validators.ModuleValidator.fix(ours)
    assert validators.ModuleValidator.validate(fixed) == []
    assert [type(m) for m in fixed[:-1]] == [type(m) for m in ours[:-1]]
    assert type(fixed[0]) is manual_bp.Linear
    plain = copy.deepcopy(fixed)
    restore(plain)
    assert type(plain[0]) is nn.Linear
    assert_same(sample_gradients(fixed), sample_gradients(plain), **EXACT)


@pytest.mark.parametrize("shape", [(ROWS, FEATURES), (ROWS, 5, FEATURES)], ids=str)
def test_a_trace_has_the_gradients_that_opacus_has(shape: tuple[int, ...]) -> None:
    """Per-sample gradients of linear layers, their norms, and the clipped gradients."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(CLASSES, (ROWS,))

    def cost(model: Any) -> Tensor:
        return cross_entropy(model(x).reshape(ROWS, -1, CLASSES).mean(1), y)

    with manual_bp.record(net) as trace:
        cost(net).backward()
    watched = samplers.GradSampleModule(copy.deepcopy(net))
    cost(watched).backward()
    expected = {name: p.grad_sample for name, p in watched._module.named_parameters()}
    found = trace.per_sample_grads()
    assert list(found) == list(expected)
    assert_same(list(found.values()), list(expected.values()))
    norms = torch.cat([grads.flatten(1) for grads in expected.values()], 1).norm(dim=1)
    assert_same([trace.per_sample_norms()], [norms])
    limit = norms.median().item()
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(watched.parameters()),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        expected_batch_size=ROWS,
    )
    optimizer.pre_step()
    clipped = trace.clipped_grads(limit)
    for name, parameter in watched._module.named_parameters():
        # Opacus scales to limit / (norm + 1e-6).
        assert_same([clipped[name]], [parameter.grad], rtol=1e-5, atol=1e-8)
