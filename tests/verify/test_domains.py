"""Arguments with a domain stay in it, whatever a check does with the samples."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function

from manual_bp.verify import check_function, check_module, function_case, module_case
from manual_bp.verify._run import run
from tests.verify.test_run import message, status


def positive(x: Tensor) -> Tensor:
    return x.clamp(min=1e-3)


def probability(x: Tensor) -> Tensor:
    x = x.abs().clamp(min=1e-3)
    return x / x.sum(-1, keepdim=True)


def symmetric(x: Tensor) -> Tensor:
    """Positive definite, with eigenvalues of at least 0.1."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    result: Tensor = (vectors * values.clamp(min=0.1).unsqueeze(-2)) @ vectors.mT
    return result


def ascending(x: Tensor) -> Tensor:
    return x.sort(-1).values


def positives(g: Generator) -> list[tuple[Tensor]]:
    return [(torch.rand(5, 3, generator=g) + 0.5,)]


def probabilities(g: Generator) -> list[tuple[Tensor]]:
    return [(probability(torch.rand(5, 3, generator=g) + 0.1),)]


def matrices(g: Generator) -> list[tuple[Tensor]]:
    x = torch.randn(4, 4, generator=g)
    return [(x @ x.mT + torch.eye(4),)]


def rows(g: Generator) -> list[tuple[Tensor]]:
    return [(torch.randn(5, 3, generator=g).sort(-1).values,)]


CASES: dict[str, Any] = {
    "positive": (lambda x: x.log() * x.sqrt(), positives, positive),
    "probability": (lambda p: -(p * p.log()).sum(-1), probabilities, probability),
    "symmetric": (torch.logdet, matrices, symmetric),
    "ascending": (lambda x: x.diff(dim=-1).sqrt(), rows, ascending),
}
IS_IN_DOMAIN: dict[str, Any] = {
    "positive": lambda x: (x > 0).all(),
    "probability": lambda p: (p > 0).all() and ((p.sum(-1) - 1).abs() < 0.02).all(),
    "symmetric": lambda x: torch.allclose(x, x.mT) and (torch.linalg.eigvalsh(x) > 0).all(),
    "ascending": lambda x: (x.diff(dim=-1) >= 0).all(),
}


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_no_check_leaves_the_domain(name: str, has_reference: bool) -> None:
    function, samples, project = CASES[name]
    outside = []

    def call(x: Tensor) -> Tensor:
        value = x.detach().double()
        if not IS_IN_DOMAIN[name](value):  # vmap refuses this question
            outside.append(value)
        result: Tensor = function(x)
        return result

    options: Any = {"slow": False, "in_dims": (0,) if name != "symmetric" else None}
    reference = function if has_reference else None
    report = check_function(call, samples, reference, project={"x": project}, **options)
    report.raise_if_failed()
    assert not outside
    needs_reference = ["small_values", "large_values"] if has_reference else []
    for check in ("finite_differences", "third_order", "full_precision", "at_ties"):
        assert status(report, check) == "passed", check
    for check in ("forward_over_reverse", "interleaved_calls", *needs_reference):
        assert status(report, check) == "passed", check


def test_draws_that_are_moved_a_little_stay_in_the_domain() -> None:
    sums = []

    def call(p: Tensor) -> Tensor:
        sums.append(p.detach().double().sum(-1))
        return -(p * p.log()).sum(-1)

    samples = probabilities(Generator().manual_seed(0))
    given: Any = {"project": {"p": probability}, "dtypes": [torch.bfloat16], "only": ["unbiased"]}
    report = check_function(call, samples, CASES["probability"][0], **given)
    assert status(report, "unbiased") == "passed"
    assert len(sums) > 5
    assert all(torch.allclose(t, torch.ones_like(t), atol=0.02) for t in sums)


def test_a_batch_of_one_argument_alone_stays_in_its_domain() -> None:
    batches = []

    def call(x: Tensor, p: Tensor) -> Tensor:
        with suppress(RuntimeError):  # vmap refuses this question
            batches.append(p.tolist())
        return x / p

    def samples(g: Generator) -> list[Any]:
        return [(torch.randn(5, 12, generator=g), torch.rand(12, generator=g) + 0.5)]

    given: Any = {"project": {"p": positive}, "in_dims": (0, None), "only": ["vmap"]}
    check_function(call, samples, torch.div, **given).raise_if_failed()
    assert len(set(map(tuple, batches))) > 1
    assert all(min(p) > 0 for p in batches)


class Larger(Function):
    """The larger of two matrices. At ties the whole gradient is that of the first."""

    share = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.maximum(x, y)

    @classmethod
    def slopes(cls, ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grad * (x >= y), grad * ((y > x) + cls.share * (y == x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Larger.slopes(ctx, grad)


class LargerTwice(Larger):
    share = 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return LargerTwice.slopes(ctx, grad)


def halved(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


@pytest.mark.parametrize("reference", [torch.maximum, None])
def test_at_a_kink_any_slope_along_the_domain_is_right(reference: Any) -> None:
    def samples(g: Generator) -> list[Any]:
        return [tuple(symmetric(torch.randn(3, 3, generator=g)) for _ in range(2))]

    given: Any = {"project": {0: halved, 1: halved}, "only": ["at_ties"]}
    report = check_function(Larger, samples, reference, **given)
    assert status(report, "at_ties") == "passed"
    assert status(check_function(LargerTwice, samples, reference, **given), "at_ties") == "failed"


def test_there_is_no_slope_across_the_edge_of_a_domain() -> None:
    def call(x: Tensor) -> Tensor:
        return x.relu() + x

    samples = [(torch.linspace(0.5, 2, 6),)]
    given: Any = {"project": {0: lambda x: x.clamp(min=0)}, "only": ["at_zero"]}
    report = check_function(call, samples, **given)  # whose slope at 0 is 1 by autograd, and 2
    assert status(report, "at_zero") == "passed"


class Entropy(Function):
    """−Σ p ln p, which refuses what is no probability."""

    wrong_by = 1.0

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        if not torch.allclose(p.sum(-1), torch.ones((), dtype=p.dtype), atol=1e-3):
            raise ValueError("p must sum to 1")
        ctx.save_for_backward(p)
        return -(p * p.log()).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return -grad.unsqueeze(-1) * (p.log() + 1)


class WrongEntropy(Entropy):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return -grad.unsqueeze(-1) * p.log() * 1.001


def test_a_function_may_refuse_what_is_not_in_its_domain() -> None:
    reference = CASES["probability"][0]
    report = check_function(Entropy, probabilities, reference, slow=False)
    assert "large_values" in {outcome.check for outcome in report.failures}
    given: Any = {"project": {0: probability}, "slow": False, "in_dims": (0,)}
    check_function(Entropy, probabilities, reference, **given).raise_if_failed()


def test_without_a_reference_a_wrong_slope_in_the_domain_is_found() -> None:
    given: Any = {"project": {"p": probability}, "only": ["finite_differences"]}
    check_function(Entropy, probabilities, **given).raise_if_failed()
    report = check_function(WrongEntropy, probabilities, **given)
    assert "slope along a direction of p" in message(report, "finite_differences")


class FlatEntropy(Entropy):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return -grad.unsqueeze(-1) * (p.detach().log() + 1)


def test_without_a_reference_a_wrong_second_derivative_in_the_domain_is_found() -> None:
    given: Any = {"project": {"p": probability}, "only": ["double_backward"]}
    check_function(Entropy, probabilities, **given).raise_if_failed()
    report = check_function(FlatEntropy, probabilities, **given)
    assert "derivative of order 2 along a direction of p" in message(report, "double_backward")


@pytest.mark.parametrize("key", ["scale", 1])
def test_a_module_and_nested_arguments_may_have_domains(key: str | int) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, pair: list[Tensor]) -> Tensor:
            return pair[0].sqrt() * pair[1].log() * self.scale.sqrt()

    def samples(g: Generator) -> list[Any]:
        return [([torch.rand(5, 3, generator=g) + 0.5, torch.rand(5, 3, generator=g) + 0.5],)]

    project: Any = {0: positive, key: lambda t: t.clamp(min=0.5)}
    assert set(module_case(Root, samples, project=project).project) == {0, 1, 2}
    report = check_module(Root, samples, Root, project=project, slow=False)
    report.raise_if_failed()


def half_known(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 8, x.sin(), torch.nan)


def test_where_the_reference_is_nan_nothing_is_asked() -> None:
    samples = [(torch.linspace(-1, 1, 15, dtype=torch.float64),)]
    only = ["large_values"]
    report = check_function(torch.sin, samples, half_known, only=only)
    report.raise_if_failed()
    wrong = check_function(lambda x: x.sin() * (1 + (x > 3)), samples, half_known, only=only)
    assert status(wrong, *only) == "failed"


@pytest.mark.parametrize(
    ("project", "error", "text"),
    [
        ({"y": positive}, ValueError, r"project must name arguments of \['x'\]; got 'y'"),
        ({1: positive}, ValueError, r"project must name arguments of \['x'\]; got 1"),
        ([positive], TypeError, r"project must be a dict by argument; got \["),
        ({"x": 3}, TypeError, r"project\['x'\] must be callable; got int"),
        ({"x": torch.sum}, ValueError, r"must return a tensor of shape \(2,\) .* of shape \(\)"),
        ({"x": lambda t: t.float()}, ValueError, r"\['x'\] must return .*float64, .*float32"),
        ({"x": lambda _: None}, ValueError, r"\['x'\] must return a tensor .*; got a NoneType"),
        ({"x": lambda t: t[9]}, ValueError, r"\['x'\] must map the samples .* raised IndexError"),
        ({"x": lambda t: t.clamp_(-1, 1)}, ValueError, r"\['x'\] must leave the samples .* of 9"),
        ({"x": positive, 0: positive}, ValueError, "project must name each argument once; got 'x'"),
        ({"x": torch.neg}, ValueError, r"project\['x'\] must leave the samples as they are, .* 2"),
        ({0: F.relu6}, ValueError, r"project\['x'\] must leave the samples as they are"),
    ],
)
def test_an_unusable_domain_is_refused(project: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        function_case(lambda x: x, [(torch.full((2,), 10.0),)], project=project)


def test_probabilities_of_float32_are_samples_of_float64() -> None:
    case = function_case(Entropy, probabilities, project={"p": probability})
    assert case.draw(Generator().manual_seed(0))[0][0].dtype is torch.float32


def relu6(slope_at_six: float) -> type[Function]:
    class Relu6(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(0, 6)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * torch.where(x == 6, slope_at_six, ((x > 0) & (x < 6)).to(x.dtype))

    return Relu6


def test_a_mistake_at_a_special_value_is_found_where_the_case_names_it() -> None:
    samples, reference = [(torch.randn(5, 3),)], torch.nn.functional.relu6
    unnamed = check_function(relu6(1.0), samples, reference, slow=False)
    assert unnamed.ok
    for_x: list[Any] = [{"x": [6.0]}, {0: [6]}]
    for special in for_x:
        case = function_case(relu6(1.0), samples, reference, special=special)
        report = run(case, slow=False)
        assert [outcome.check for outcome in report.failures] == ["special_values"]
        assert "with x = 6" in report.failures[0].message
    case = function_case(relu6(0.0), samples, reference, special={"x": [6.0]})
    assert run(case, slow=False).ok


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 2.0])
def test_without_a_reference_a_slope_at_a_special_value_is_between_those_beside_it(
    slope: float,
) -> None:
    case = function_case(relu6(slope), [(torch.randn(5, 3),)], special={"x": [6.0]})
    assert run(case, ["special_values"]).ok == (slope <= 1)


@pytest.mark.parametrize("reference", [lambda w, i: w[i], None])
def test_a_special_value_that_is_refused_is_a_failure(reference: Any) -> None:
    samples = [(torch.randn(6, 3), torch.tensor([1, 2]))]
    for value, is_right in ((5, True), (100, False)):
        report = check_function(
            lambda w, i: w[i], samples, reference, special={"i": [value]}, only=["special_values"]
        )
        assert report.ok == is_right
    assert "output with i = 100 – a special value that is none" in report.verdict
    with pytest.raises(TypeError, match=r"special\['i'\] must be whole numbers for torch.int64"):
        function_case(lambda w, i: w[i], samples, special={"i": [1.5]})


@pytest.mark.parametrize(
    ("special", "error", "message"),
    [
        ({"y": [6.0]}, ValueError, "special must name arguments of"),
        ([6.0], TypeError, "special must be a dict by argument"),
        ({"x": 6.0}, TypeError, r"special\['x'\] must be a list of numbers; got 6.0"),
        ({"x": []}, TypeError, r"special\['x'\] must be a list of numbers; got \[\]"),
        ({"x": ["6"]}, TypeError, r"special\['x'\] must be a list of numbers"),
        ({"x": [6.0], 0: [6.0]}, ValueError, "special must name each argument once; got 'x' twice"),
    ],
)
def test_special_values_must_be_numbers_for_an_argument(
    special: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function_case(relu6(0.0), [(torch.randn(5, 3),)], special=special)
