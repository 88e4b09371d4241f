"""Every sample's own gradient, against a loop over single samples and against vmap(grad)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from manual_bp import Linear, LinearSigmoid, QuadraticCost, Sigmoid, Trace, backprop, record
from manual_bp.trace import Call, LayerTrace, _per_sample
from tests.helpers import assert_same

Grads = dict[str, Tensor]


def loss(output: Tensor, y: Tensor) -> Tensor:
    """C_x of each sample, (N,), for outputs of any dimensions."""
    return (output - y).square().flatten(1).sum(1) / 2 + output.sin().flatten(1).sum(1)


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Grads:
    """The oracle: one sample at a time, through autograd."""
    grads: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                grads.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(each) for name, each in grads.items()}


def traced(
    model: nn.Module, x: Tensor, y: Tensor, reduction: Any = "mean", **options: Any
) -> Trace:
    model.zero_grad()
    with record(model, reduction, **options) as trace:
        getattr(loss(model(x), y), reduction)().backward()
    return trace


def norms_of(grads: Grads) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)  # type: ignore[no-any-return]


def assert_same_grads(found: Grads, expected: Grads) -> None:
    assert list(found) == list(expected)
    assert_same(list(found.values()), list(expected.values()))


def assert_follows(trace: Trace, model: nn.Module, x: Tensor, y: Tensor, reduction: str) -> None:
    """All per-sample results equal the loop's, and reduce to `.grad` of the pass."""
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    expected = loop(model, x, y)
    found = trace.per_sample_grads()
    assert_same_grads(found, expected)
    for name, grads in found.items():
        assert_same([getattr(grads, reduction)(0)], [whole[name]])
    norms = norms_of(expected)
    assert_same([trace.per_sample_norms()], [norms])
    for max_norm in (norms.median().item(), 2 * norms.max().item(), 1e-3):
        weights = (max_norm / norms).clamp(max=1)
        clipped = {
            name: getattr(torch.einsum("n,n...->n...", weights, grads), reduction)(0)
            for name, grads in expected.items()
        }
        assert_same_grads(trace.clipped_grads(max_norm), clipped)


class Model(nn.Module):
    """All kinds of layers: plain, run twice, tied, without a bias, fused."""

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        n_in, n, n_out = sizes
        self.first = nn.Linear(n_in, n)
        self.again = Linear(n, n)
        self.tied = nn.Linear(n, n, bias=False)
        self.other = nn.Linear(n, n)
        self.other.weight = self.tied.weight
        self.fused = LinearSigmoid(n, n)
        self.last = nn.Linear(n, n_out, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.sigmoid(self.again(torch.sigmoid(self.again(h))))
        h = F.softplus(self.other(F.relu(self.tied(h))))
        return self.last(self.fused(h))  # type: ignore[no-any-return]


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(
    sizes=sizes,
    samples=st.integers(1, 6),
    rows=st.lists(st.integers(1, 4), max_size=2),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 100),
)
def test_any_shape_equals_the_loop_over_samples(
    sizes: tuple[int, int, int], samples: int, rows: list[int], reduction: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model(sizes)
    x = torch.randn(samples, *rows, sizes[0], dtype=torch.float64)
    y = torch.randn(samples, *rows, sizes[2], dtype=torch.float64)
    assert_follows(traced(model, x, y, reduction), model, x, y, reduction)


@given(sizes=sizes, samples=st.integers(1, 6), rows=st.lists(st.integers(1, 4), max_size=2))
def test_any_shape_equals_vmap_of_grad(
    sizes: tuple[int, int, int], samples: int, rows: list[int]
) -> None:
    model = Model(sizes)
    x = torch.randn(samples, *rows, sizes[0], dtype=torch.float64)
    y = torch.randn(samples, *rows, sizes[2], dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(parameters: Grads, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, parameters, (x[None],)), y[None]).sum()

    expected = vmap(grad(of_one), (None, 0, 0))(parameters, x, y)
    assert_same_grads(traced(model, x, y).per_sample_grads(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_device_equals_the_loop_over_samples(reduction: str, device: torch.device) -> None:
    model = Model((3, 4, 2)).to(device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    y = torch.randn(5, 2, dtype=torch.float64, device=device)
    assert_follows(traced(model, x, y, reduction), model, x, y, reduction)


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)], ids=str)
def test_backprop_gives_the_gradient_of_each_sample_alone(
    shape: tuple[int, ...], device: torch.device
) -> None:
    """If a sample has several rows, its own cost is the mean over them."""
    net = nn.Sequential(Linear(3, 4), Sigmoid(), Linear(4, 2), Sigmoid()).to(device, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    y = torch.rand((*shape[:-1], 2), dtype=torch.float64, device=device)
    trace = backprop(net, x, y, QuadraticCost())
    for i in range(6):
        alone = backprop(net, x[i], y[i], QuadraticCost())
        for layer, of_one in zip(trace.layers, alone.layers, strict=True):
            w, b = layer.per_sample_grad_w(), layer.per_sample_grad_b()
            assert w is not None
            assert b is not None
            assert_same([w[i], b[i]], [of_one.grad_w, of_one.grad_b])  # type: ignore[list-item]
    for layer in trace.layers:
        assert_same([layer.per_sample_grad_w().mean(0)], [layer.grad_w])  # type: ignore[union-attr,list-item]
    grads = trace.per_sample_grads()
    assert list(grads) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(grads["2.weight"], trace["2"].per_sample_grad_w())  # type: ignore[arg-type]
    assert_same([trace.per_sample_norms()], [norms_of(grads)])


class TestForms:
    """Both forms of a norm, at once and in chunks, and which of them is used."""

    @pytest.mark.parametrize("form", [_per_sample._gram_norm, _per_sample._direct_norm])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_each_form_is_the_norm(
        self, form: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        a = torch.randn(5, 4, 3, dtype=dtype, device=device)
        delta = torch.randn(5, 4, 2, dtype=dtype, device=device)
        slow = torch.stack([sum(torch.outer(d, v.conj()) for d, v in zip(*pair, strict=True)).norm()  # type: ignore[union-attr]
                            for pair in zip(delta, a, strict=True)])  # fmt: skip
        assert_same([form(a, delta)], [slow])
        assert_same([_per_sample.norm_w(a, delta)], [slow])

    @pytest.mark.parametrize(("rows", "form"), [(2, "gram"), (32, "gram"), (33, "direct")])
    def test_the_cheaper_form_is_used(
        self, rows: int, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert _per_sample.gram_is_cheaper(rows, 64, 64) == (form == "gram")
        for name, number in (("gram", 2.0), ("direct", 3.0)):
            monkeypatch.setattr(
                _per_sample, f"_{name}_norm", lambda a, _, n=number: 0 * a[:, 0, 0] + n
            )
        norms = _per_sample.norm_w(torch.ones(5, rows, 64), torch.ones(5, rows, 64))
        assert norms.tolist() == [2.0 if form == "gram" else 3.0] * 5

    def test_rows_that_cancel_keep_their_digits(self, device: torch.device) -> None:
        """In float32, as when words are much alike and their errors nearly add up to 0."""
        a = 1 + 1e-4 * torch.randn(9, 16, 40, device=device)
        delta = torch.randn(9, 16, 50, device=device)
        delta[2:7] -= delta[2:7].mean(1, keepdim=True)
        delta[4] = 0
        exact = _per_sample.grad_w(a.double(), delta.double()).flatten(1).norm(dim=1)
        assert _per_sample.gram_is_cheaper(16, 40, 50)
        assert_same([_per_sample.norm_w(a, delta)], [exact], rtol=1e-4)
        assert_same([_per_sample.norm_w(a, delta)[[0, 1, 7, 8]]], [exact[[0, 1, 7, 8]]], rtol=1e-6)

    @pytest.mark.parametrize("rows", [2, 9])
    def test_chunks_give_the_same_norms(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        a = torch.randn(7, rows, 6, dtype=torch.float64)
        delta = torch.randn(7, rows, 5, dtype=torch.float64)
        whole = _per_sample.norm_w(a, delta)
        taken: list[int] = []
        name, numbers = ("_gram_norm_at_once", 8) if rows == 2 else ("_direct_norm_at_once", 30)
        form = getattr(_per_sample, name)

        def watched(a: Tensor, delta: Tensor) -> Tensor:
            taken.append(len(a))
            return form(a, delta)  # type: ignore[no-any-return]

        monkeypatch.setattr(_per_sample, name, watched)
        monkeypatch.setattr(_per_sample, "CHUNK", 3 * numbers + 1)
        assert torch.equal(_per_sample.norm_w(a, delta), whole)
        assert taken == [3, 3, 1]
        monkeypatch.setattr(
            _per_sample, "CHUNK", numbers - 1
        )  # one sample is too large, but must fit
        assert torch.equal(_per_sample.norm_w(a, delta), whole)
        assert taken[3:] == [1] * 7

    def test_norms_and_clipping_compute_no_per_sample_gradient(self, device: torch.device) -> None:
        """For samples of one row, no tensor as large as all their gradients is ever made."""
        net = nn.Sequential(nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 20)).to(device)
        x, y = torch.randn(50, 40, device=device), torch.randn(50, 20, device=device)
        trace = traced(net, x, y)
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    largest = max(largest, result.numel())
                return result

        with Watch():
            trace.per_sample_norms()
        assert 0 < largest <= 50 * 40
        with Watch():
            trace.clipped_grads(1.0)
        assert largest <= 50 * 40


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-20, 1.0, 1e18], ids=str)
def test_norms_of_tiny_and_huge_errors_neither_vanish_nor_overflow(scale: float) -> None:
    """Squares in float32 would, below 1e-22 and above 1e19."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for rows in ((), (2,), (40,)):
        x, y = torch.randn(5, *rows, 4), torch.randn(5, *rows, 2)
        net.zero_grad()
        with record(net, "sum") as trace:
            (loss(net(x), y) * scale).sum().mul(1).backward()
        exact = net.double()
        expected = norms_of(loop(exact, x.double(), y.double())) * scale
        net.float()
        assert expected.min() > 0
        assert_same([trace.per_sample_norms().double()], [expected], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e20], ids=str)
def test_norms_of_tiny_and_huge_inputs_neither_vanish_nor_overflow(scale: float) -> None:
    layer = nn.Linear(4, 3, bias=False)
    for rows in ((), (2,), (40,)):
        x = torch.randn(5, *rows, 4)
        upstream = torch.randn(5, *rows, 3) / scale
        layer.zero_grad()
        with record(layer, "sum") as trace:
            (layer(x * scale) * upstream).sum().backward()
        exact = torch.einsum("n...i,n...o->noi", (x * scale).double(), upstream.double())
        norms = exact.flatten(1).norm(dim=1)
        assert_same([trace.per_sample_norms().double()], [norms], rtol=1e-5)
        clipped = trace.clipped_grads(norms.min().item() / 2)["weight"]
        assert clipped.norm() > norms.min() / 10


@pytest.mark.parametrize("faded", [1e-21, 1e-23])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_norms_are_right_if_only_delta_is_out_of_range(faded: float, rows: int) -> None:
    a, delta = torch.randn(5, rows, 8) * 1e10, torch.randn(5, rows, 6) * faded
    exact = _per_sample.grad_w(a.double(), delta.double()).flatten(1).norm(dim=1)
    assert_same([_per_sample.norm_w(a, delta)], [exact], rtol=1e-5, atol=0)


def exact_norms(t: Tensor) -> Tensor:
    """Norms over all dimensions but the first, for numbers of any magnitude."""
    norms = [math.hypot(*of_one.flatten().tolist()) for of_one in t]
    return torch.tensor(norms, dtype=torch.float64)


# How many powers of ten the rows of a or δ, and their products, may be away from 1.
REACH = {torch.float32: (35, 70), torch.float64: (290, 290)}


@pytest.mark.parametrize("dtype", REACH, ids=str)
@pytest.mark.parametrize("form", ["gram", "direct", "chosen", "of b"])
@given(shape=st.tuples(*[st.integers(1, 4)] * 4), reach=st.floats(0, 1), seed=st.integers(0, 100))
def test_norms_of_rows_of_any_magnitude(
    form: str, dtype: torch.dtype, shape: tuple[int, ...], reach: float, seed: int
) -> None:
    """a may be as small as δ is large, and the other way round in the next row."""
    samples, rows, n_in, n_out = shape
    torch.manual_seed(seed)
    of_one, of_both = (limit * reach for limit in REACH[dtype])
    size = of_one * (2 * torch.rand(samples, rows, 1).double() - 1)
    product = of_both * (2 * torch.rand(samples, rows, 1).double() - 1)
    a = torch.randn(samples, rows, n_in) * 10**size
    delta = torch.randn(samples, rows, n_out) * 10 ** (product - size).clamp(-of_one, of_one)
    a, delta = a.to(dtype), delta.to(dtype)
    if form == "of b":
        found, grads = _per_sample.norm_b(delta), _per_sample.grad_b(delta.double())
    else:
        forms: dict[str, Callable[..., Tensor]] = {
            "gram": lambda *pair: _per_sample._in_range(_per_sample._gram_norm, *pair),
            "direct": lambda *pair: _per_sample._in_range(_per_sample._direct_norm, *pair),
            "chosen": _per_sample.norm_w,
        }
        found, grads = forms[form](a, delta), _per_sample.grad_w(a.double(), delta.double())
    rtol = 1e-4 if dtype is torch.float32 else 1e-10
    assert_same([found], [exact_norms(grads)], rtol=rtol, atol=0)


@pytest.mark.parametrize("rows", [(), (2,), (40,)], ids=str)
@pytest.mark.parametrize("scale", [1e-290, 1e-200, 1e-160, 1e-80, 1e80, 1e160, 1e200, 1e290])
def test_norms_and_clipping_over_all_layers_in_float64(scale: float, rows: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, *rows, 4).double(), torch.randn(5, *rows, 2).double()
    with record(net, "sum") as trace:
        (loss(net(x), y) * scale).sum().mul(1).backward()
    grads = trace.per_sample_grads()
    norms = exact_norms(torch.cat([g.flatten(1) for g in grads.values()], 1))
    assert 1e-3 * scale < norms.min() < norms.max() < 1e6 * scale
    assert_same([trace.per_sample_norms()], [norms], atol=0)
    max_norm = norms.median().item()
    weights = (max_norm / norms).clamp(max=1)
    expected = {name: torch.einsum("n,n...->...", weights, g / scale) for name, g in grads.items()}
    clipped = trace.clipped_grads(max_norm)
    assert_same_grads({name: g / scale for name, g in clipped.items()}, expected)


def trace_of_pair(a: Tensor, delta: Tensor) -> Trace:
    """The trace of a layer without a bias that had this pair, under the sum."""
    w = nn.Parameter(torch.zeros(delta.shape[-1], a.shape[-1], dtype=a.dtype))
    layer = LayerTrace("", w, None, (Call(a, delta, delta, delta),))
    return Trace(torch.tensor(0.0), delta, (layer,), {w: "weight"})


@pytest.mark.parametrize("rows", [(), (2,), (9,)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "a_size", "delta_size", "max_norm"),
    [
        (torch.float32, 1e25, 1e25, 1.0),  # the factor is too small for float32
        (torch.float32, 1e37, 1e-5, 1e-12),  # so is the factor times δ
        (torch.float32, 1e30, 1e-30, 1e-9),
        (torch.float32, 1e-30, 1e30, 1e-9),
        (torch.float64, 1e200, 1e90, 1e-20),
        (torch.float64, 1e300, 1e-10, 1e-35),
        (torch.float64, 1e-250, 1e100, 1e-160),
        (torch.bfloat16, 1e30, 1e30, 1.0),
        (torch.float16, 1e4, 1e4, 1.0),
    ],
    ids=str,
)
def test_clipping_of_gradients_of_any_magnitude(
    dtype: torch.dtype, a_size: float, delta_size: float, max_norm: float, rows: tuple[int, ...]
) -> None:
    a = (torch.randn(5, *rows, 4).double() * a_size).to(dtype)
    delta = (torch.randn(5, *rows, 3).double() * delta_size).to(dtype)
    a[3], delta[4] = 0, 0  # samples that have no gradient
    (found,) = trace_of_pair(a, delta).clipped_grads(max_norm).values()
    grads = torch.einsum(
        "n...i,n...o->noi", a.double().reshape(5, -1, 4), delta.double().reshape(5, -1, 3)
    )
    weights = (max_norm / exact_norms(grads)).clamp(max=1)
    expected = torch.einsum("n,noi->oi", weights, grads)
    assert found.dtype is dtype
    rtol = {torch.float32: 1e-4, torch.float64: 1e-10}.get(dtype, 1e-2)
    assert_same([found.double() / max_norm], [expected / max_norm], rtol=rtol, atol=rtol)


def test_a_norm_beyond_float64_is_infinite_and_no_sample_is_left_out() -> None:
    a, delta = torch.ones(3, 4).double(), torch.ones(3, 2).double()
    a[1], delta[1] = 1e200, 1e200
    trace = trace_of_pair(a, delta)
    assert trace.per_sample_norms().isinf().tolist() == [False, True, False]
    assert trace.clipped_grads(1.0)["weight"].isnan().all()


def test_norms_of_a_float16_model_may_exceed_float16(device: torch.device) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float16, device=device)
    x = torch.full((2, 4), 300.0, dtype=torch.float16, device=device)
    with record(layer, "sum") as trace:
        (300 * layer(x)).sum().backward()
    w_norm, b_norm = 300 * 300 * 12**0.5, 300 * 3**0.5
    expected = torch.full((2,), (w_norm**2 + b_norm**2) ** 0.5, device=device)
    assert_same([trace.per_sample_norms()], [expected], rtol=1e-3)
    assert expected[0] > torch.finfo(torch.float16).max


def test_complex_gradients_equal_the_loop_over_samples(device: torch.device) -> None:
    net = nn.Sequential(Linear(3, 4), nn.Tanh(), Linear(4, 2)).to(device)
    with pytest.warns(UserWarning, match="Complex modules are a new feature"):
        net.to(torch.complex128)
    x = torch.randn(5, 3, dtype=torch.complex128, device=device)
    y = torch.randn(5, 2, dtype=torch.complex128, device=device)

    def cost_of(x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).abs().square().sum(-1).mean()  # type: ignore[no-any-return]

    each: list[list[Tensor]] = []
    for i in range(5):
        net.zero_grad()
        cost_of(x[i : i + 1], y[i : i + 1]).backward()
        each.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    expected = [torch.stack(grads) for grads in zip(*each, strict=True)]
    net.zero_grad()
    with record(net) as trace:
        cost_of(x, y).backward()
    assert_same(list(trace.per_sample_grads().values()), expected)
    norms = torch.cat([g.flatten(1) for g in expected], 1).norm(dim=1)
    assert_same([trace.per_sample_norms()], [norms])
    weights = (norms.median() / norms).clamp(max=1)
    clipped = [torch.einsum("n,n...->...", weights + 0j, grads) / 5 for grads in expected]
    assert_same(list(trace.clipped_grads(norms.median().item()).values()), clipped)


class TestFewSamples:
    @pytest.mark.parametrize("rows", [(), (3,), (0,)], ids=str)
    def test_no_samples(self, rows: tuple[int, ...], device: torch.device) -> None:
        model = Model((3, 4, 2)).to(device)
        x = torch.randn(0, *rows, 3, dtype=torch.float64, device=device)
        y = torch.randn(0, *rows, 2, dtype=torch.float64, device=device)
        trace = traced(model, x, y, "sum")
        assert trace.samples == 0
        assert trace.per_sample_norms().shape == (0,)
        for name, parameter in model.named_parameters():
            assert trace.per_sample_grads()[name].shape == (0, *parameter.shape)
            assert torch.equal(trace.clipped_grads(1.0)[name], torch.zeros_like(parameter))
        assert list(trace.split(3)) == []
        assert "first" in str(trace.diagnostics())

    def test_samples_without_rows_have_norm_0(self) -> None:
        model = Model((3, 4, 2))
        trace = traced(model, torch.randn(2, 0, 3).double(), torch.randn(2, 0, 2).double())
        assert torch.equal(trace.per_sample_norms(), torch.zeros(2, dtype=torch.float64))

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
    @given(
        widths=st.lists(st.integers(0, 3), min_size=2, max_size=4),
        samples=st.integers(0, 3),
        rows=st.lists(st.integers(0, 3), max_size=2),
        activation=st.sampled_from([nn.Sigmoid, nn.ReLU, nn.GELU]),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    )
    def test_empty_dimensions_anywhere(
        self, widths: list[int], samples: int, rows: list[int], activation: Any, dtype: torch.dtype
    ) -> None:
        """Layers without inputs or neurons, samples without rows, no samples."""
        net = nn.Sequential()
        for n_in, n_out in pairwise(widths):
            net.extend([nn.Linear(n_in, n_out), activation()])
        net.to(dtype)
        x = torch.randn(samples, *rows, widths[0]).to(dtype)
        y = torch.randn(samples, *rows, widths[-1]).to(dtype)
        trace = traced(net, x, y, "sum")
        grads = trace.per_sample_grads()
        assert {name: g.shape for name, g in grads.items()} == {
            name: (samples, *p.shape) for name, p in net.named_parameters()
        }
        norms, rtol = norms_of(grads).to(trace.per_sample_norms().dtype), 0.02
        assert_same([trace.per_sample_norms()], [norms], rtol=rtol)
        for name, clipped in trace.clipped_grads(1e6).items():
            assert_same([clipped], [grads[name].sum(0)], rtol=rtol, atol=0.02)
        for part in trace.split(2):
            assert len(part.per_sample_norms()) == part.samples
        assert len(trace.diagnostics(0.1).layers) == len(widths) - 1
        assert "not in this table" not in str(trace.diagnostics(0.1))

    def test_a_single_sample_without_a_batch_dimension(self) -> None:
        model = Model((3, 4, 2))
        x, y = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
        model.zero_grad()
        with record(model) as trace:
            loss(model(x)[None], y[None]).sum().backward()
        assert_same_grads(trace.per_sample_grads(), loop(model, x[None], y[None]))
        (part,) = trace.split(4)
        assert_same_grads(part.per_sample_grads(), trace.per_sample_grads())


def explicit(net: nn.Sequential, x: Tensor, y: Tensor) -> Trace:
    return backprop(net, x, y, QuadraticCost())


class TestSplit:
    @pytest.mark.parametrize("size", [1, 3, 7, 100])
    def test_parts_add_up_to_the_whole(self, size: int) -> None:
        model = Model((3, 4, 2))
        x = torch.randn(7, 2, 3, dtype=torch.float64)
        y = torch.randn(7, 2, 2, dtype=torch.float64)
        trace = traced(model, x, y)
        parts = list(trace.split(size))
        assert [part.samples for part in parts] == [len(t) for t in torch.arange(7).split(size)]
        for name, grads in trace.per_sample_grads().items():
            assert_same([torch.cat([part.per_sample_grads()[name] for part in parts])], [grads])
        assert_same(
            [torch.cat([part.per_sample_norms() for part in parts])], [trace.per_sample_norms()]
        )
        for name, grad_ in trace.clipped_grads(0.5).items():
            shares = [part.clipped_grads(0.5)[name] for part in parts]
            assert_same([torch.stack(shares).sum(0)], [grad_])
        for layer in trace.layers:
            assert_same(
                [torch.stack([part[layer.name].grad_w for part in parts]).sum(0)],  # type: ignore[misc]
                [layer.grad_w],  # type: ignore[list-item]
            )

    @pytest.mark.parametrize("make", ["record", "backprop"])
    def test_parts_have_the_tensors_and_gradients_of_their_samples(self, make: str) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
        x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
        makes = {"record": lambda: traced(net, x, y), "backprop": lambda: explicit(net, x, y)}
        trace = makes[make]()
        for start, part in zip((0, 2, 4), trace.split(2), strict=True):
            for layer, whole in zip(part.layers, trace.layers, strict=True):
                for name in ("a_prev", "z", "a", "delta"):
                    assert torch.equal(
                        getattr(layer, name), getattr(whole, name)[start : start + 2]
                    )
                rows = slice(start, start + 2)
                expected = whole.delta[rows].mT @ whole.a_prev[rows]
                assert_same([layer.grad_w, layer.grad_b], [expected, whole.delta[rows].sum(0)])  # type: ignore[list-item]

    def test_size_must_be_an_integer_of_at_least_1(self) -> None:
        trace = traced(nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2))
        with pytest.raises(TypeError, match="size must be an integer; got float"):
            next(trace.split(2.5))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="size must be at least 1; got 0"):
            next(trace.split(0))


class TestRefusals:
    @pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
    def test_max_norm_must_be_above_0(self, max_norm: float) -> None:
        trace = traced(nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2))
        with pytest.raises(ValueError, match=f"max_norm must be above 0; got {max_norm}"):
            trace.clipped_grads(max_norm)

    def test_max_norm_must_be_a_number(self) -> None:
        trace = traced(nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2))
        with pytest.raises(TypeError, match="max_norm must be a number; got str"):
            trace.clipped_grads("1")  # type: ignore[arg-type]

    def test_layers_that_see_different_numbers_of_samples_are_refused(self) -> None:
        class Flattening(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.outer(self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]))  # type: ignore[no-any-return]

        trace = traced(Flattening(), torch.randn(4, 5, 3), torch.randn(4, 5, 2))
        message = "got 20 in 'inner' and 4 in 'outer'"
        for ask in (
            trace.per_sample_grads,
            trace.per_sample_norms,
            lambda: trace.clipped_grads(1.0),
            lambda: list(trace.split(2)),
        ):
            with pytest.raises(ValueError, match=message):
                ask()
        assert trace["inner"].per_sample_grad_b().shape == (20, 3)  # type: ignore[union-attr]

    def test_a_layer_whose_number_of_samples_changes_is_refused(self) -> None:
        layer = nn.Linear(3, 3)
        with record(layer) as trace:
            (layer(torch.randn(4, 3)).mean() + layer(torch.randn(5, 3)).mean()).backward()
        with pytest.raises(ValueError, match=r"layer '' must see the same samples .* got 4 and 5"):
            trace.per_sample_norms()


@pytest.mark.parametrize("name", ["a_prev", "delta"])
def test_tensors_changed_since_the_pass_are_refused(name: str) -> None:
    trace = traced(nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2))
    trace.per_sample_norms()
    getattr(trace[""], name).zero_()
    asked: list[Callable[[], object]] = [
        trace.per_sample_norms,
        trace[""].per_sample_grad_w,
        lambda: trace.clipped_grads(1.0),
        lambda: trace[""].grad_w,
        lambda: trace[""].grad_b,
    ]
    for ask in asked:
        with pytest.raises(RuntimeError, match="a_prev and delta must still be those of the pass"):
            ask()


def test_a_nonfinite_sample_does_not_affect_the_others() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for rows in ((), (2,), (9,)):
        x, y = torch.randn(4, *rows, 3), torch.randn(4, *rows, 2)
        expected = traced(net, x, y).per_sample_norms()
        y[2] = torch.inf
        found = traced(net, x, y).per_sample_norms()
        assert_same([found[[0, 1, 3]]], [expected[[0, 1, 3]]], rtol=1e-6)
        assert not found[2].isfinite()


def test_a_sample_without_a_gradient_is_not_scaled() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        y = layer(x)
    y[1:] += 1
    layer.zero_grad()
    with record(layer) as trace:
        F.mse_loss(layer(x), y).backward()
    assert trace.per_sample_norms()[0] == 0
    assert all(grad.isfinite().all() for grad in trace.clipped_grads(0.1).values())


def test_results_have_the_dtype_and_device_of_the_parameters(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(3, 2)).to(device, torch.bfloat16)
    x = torch.randn(4, 3, device=device, dtype=torch.bfloat16)
    trace = traced(net, x, torch.randn(4, 2, device=device, dtype=torch.bfloat16))
    for grads in trace.per_sample_grads().values():
        assert grads.dtype is torch.bfloat16
        assert grads.device == x.device
    assert trace.per_sample_norms().dtype is torch.float32


@pytest.mark.parametrize("rows", [(), (2,), (40,)], ids=str)
def test_only_the_pairs_are_in_low_precision(rows: tuple[int, ...]) -> None:
    """From a and δ in bfloat16, norms have six right digits, not two."""
    layer = nn.Linear(16, 12, dtype=torch.bfloat16)
    x = torch.randn(5, *rows, 16).bfloat16()
    trace = traced(layer, x, torch.randn(5, *rows, 12).bfloat16())
    a, delta = (t.double().reshape(5, -1, t.shape[-1]) for t in (x, trace[""].delta))
    grads = [5 * (delta.mT @ a), 5 * delta.sum(1)]
    norms = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)
    assert_same([trace.per_sample_norms().double()], [norms], rtol=1e-5)
    assert all(g.dtype is torch.bfloat16 for g in trace.clipped_grads(1.0).values())
