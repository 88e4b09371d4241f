import gc
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify import (
    CAPABILITIES,
    check_function,
    check_module,
    function_case,
    module_case,
    run,
)
from manual_bp.verify._context import CheckContext
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.mutants import MUTANTS
from tests.helpers import only_new_objects


class Square(Function):
    """Written with ctx in forward: no torch.func, no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 2 * x * grad
        return result


class Wrong(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 2.002 * x * grad
        return result


SAMPLES = [(torch.randn(5, 3, dtype=torch.float64),)]


def square(x: Tensor) -> Tensor:
    return x * x


def status(report: Any, check: str) -> str:
    (found,) = [outcome for outcome in report.outcomes if outcome.check == check]
    return str(found.status)


def message(report: Any, check: str) -> str:
    (found,) = [outcome for outcome in report.outcomes if outcome.check == check]
    return str(found.message)


def test_a_right_function_passes() -> None:
    report = check_function(Square, SAMPLES, square, in_dims=(0,), slow=False)
    assert report.ok, report
    assert report.case == "Square"
    assert status(report, "double_backward") == "passed"
    assert message(report, "double_backward") == "not declared, but it works"
    assert status(report, "forward_ad") == "not applicable"
    assert message(report, "forward_ad").startswith("not declared; it refuses: ")
    assert message(report, "vmap").startswith("not declared; it refuses: RuntimeError: ")


def test_a_declared_capability_that_raises_is_a_failure() -> None:
    report = check_function(Square, SAMPLES, square, supports=["vmap"], in_dims=(0,), only=["vmap"])
    assert status(report, "vmap") == "failed"
    assert "raised RuntimeError" in message(report, "vmap")


def test_a_wrong_function_fails_with_diagnosis_and_reproduction() -> None:
    report = check_function(Wrong, SAMPLES, square, seed=4, slow=False)
    assert not report.ok
    text = message(report, "gradients_match_reference")
    assert "gradient of x, at index" in text
    assert "ratio 1.001" in text
    assert "diagnosis: 1.001 times the right one, everywhere" in text
    assert text.endswith(
        "again: check_function(Wrong, ..., seed=4, only=['gradients_match_reference'])"
    )


def test_once_differentiable_is_a_refusal() -> None:
    class Once(Square):
        backward: Any = staticmethod(once_differentiable(Square.backward))

    report = check_function(Once, SAMPLES, square, only=["double_backward", "third_order"])
    assert status(report, "double_backward") == status(report, "third_order") == "not applicable"
    assert "it refuses: RuntimeError: once_differentiable" in message(report, "third_order")


class Once(Square):
    backward: Any = staticmethod(once_differentiable(Square.backward))


class OnceBesideALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Once.apply(self.layer(x))
        return result


class DetachedBesideALayer(OnceBesideALayer):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z.detach() * z * 2 - z.detach() ** 2


class SquareOfALayer(OnceBesideALayer):
    def forward(self, x: Tensor) -> Tensor:
        return square(self.layer(x))


@pytest.mark.parametrize("reference", [True, False])
def test_once_differentiable_is_a_refusal_beside_other_layers_too(reference: bool) -> None:
    only = ["double_backward", "third_order"]
    reports = [
        check_function(
            lambda x: Once.apply(x) + x**3,
            SAMPLES,
            (lambda x: x**2 + x**3) if reference else None,
            only=only,
        ),
        check_module(OnceBesideALayer, SAMPLES, SquareOfALayer if reference else None, only=only),
    ]
    for report in reports:
        for name in only:
            assert status(report, name) == "not applicable"
            assert "it refuses: RuntimeError: once_differentiable" in message(report, name)
    detached = check_module(
        DetachedBesideALayer, SAMPLES, SquareOfALayer if reference else None, only=only
    )
    assert status(detached, "double_backward") == "failed"


def raising(*_: Any) -> Any:
    raise IndexError("no such row")


@pytest.mark.parametrize(
    ("fn", "reference", "error", "text"),
    [
        (
            Square,
            raising,
            ValueError,
            "reference must accept the samples; it raised IndexError: no",
        ),
        (Square, lambda: 0, ValueError, "reference must accept the samples; it raised TypeError"),
        (Square, lambda _: None, TypeError, "reference must return a floating tensor, .* got none"),
        (Square, lambda x: x > 0, TypeError, "reference must return a .*; got torch.bool"),
        (lambda _: None, square, TypeError, "<lambda> must return a floating tensor, .* got none"),
        (lambda x: x > 0, square, TypeError, "<lambda> must return a floating.*; got torch.bool"),
        (lambda _: 3.0, None, TypeError, "<lambda> must return a tensor, or several; got none"),
    ],
)
def test_a_call_or_reference_that_gives_nothing_to_compare_is_refused_in_one_line(
    fn: Any, reference: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        check_function(fn, SAMPLES, reference, slow=False)
    assert "\n" not in str(caught.value)


def test_the_sample_that_a_reference_refuses_is_named() -> None:
    samples = [(torch.ones(5, 3),), (torch.ones(4, 3),)]
    with pytest.raises(ValueError, match=r"^sample 2 of 2, shape \(4, 3\): reference must accept"):
        check_function(Square, samples, lambda x: x * x[4].new_ones(3), slow=False)
    with pytest.raises(ValueError, match=r"^sample 1 .*: reference must .* raised TypeError"):
        check_module(lambda: nn.Linear(3, 4), samples, lambda: nn.Bilinear(3, 1, 4))


def test_a_call_that_raises_is_one_failure() -> None:
    report = check_function(lambda x: x @ x, SAMPLES, square, slow=False)
    (cause,) = report.causes
    assert cause.check == "deterministic"
    assert "raised RuntimeError" in report.verdict


def test_without_a_reference_finite_differences_find_the_mistake() -> None:
    report = check_function(Wrong, SAMPLES, slow=False)
    assert message(report, "gradients_match_reference") == "no reference was given"
    assert status(report, "finite_differences") == "failed"
    assert check_function(Square, SAMPLES, slow=False).ok


def test_the_seed_determines_the_samples() -> None:
    def draw(g: torch.Generator) -> list[tuple[Tensor]]:
        return [(torch.randn(5, generator=g),)]

    case = function_case(Square, draw)
    (one,), (again,) = (CheckContext(case, "vmap").samples[0] for _ in range(2))
    (other,) = CheckContext(replace(case, seed=1), "vmap").samples[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.dtype is torch.float64


def wrong_for_three_dimensions(x: Tensor) -> Tensor:
    return x * (x.detach() if x.ndim == 3 else x)


TWO_SAMPLES = [SAMPLES[0], (torch.randn(2, 5, 3, dtype=torch.float64),)]


def test_a_message_names_the_sample_that_failed() -> None:
    only = ["gradients_match_reference"]
    report = check_function(wrong_for_three_dimensions, TWO_SAMPLES, square, only=only)
    assert message(report, *only).startswith(
        "sample 2 of 2, shape (2, 5, 3): gradient of x, at index ("
    )
    report = check_function(wrong_for_three_dimensions, TWO_SAMPLES[1:], square, only=only)
    assert message(report, *only).startswith("gradient of x, at index (")


@pytest.mark.parametrize("supports", [[], ["vmap"]])
def test_an_error_names_the_sample_that_raised_it(supports: list[str]) -> None:
    def bounded(x: Tensor, w: Tensor) -> Tensor:
        return x * w if x.shape[-1] == 3 else x[9]

    samples = [(torch.ones(5, 3), torch.ones(3)), (torch.ones(5, 4), torch.ones(4))]
    options: Any = {"supports": supports, "in_dims": (0, None)}
    report = check_function(bounded, samples, only=["deterministic"], **options)
    where = "sample 2 of 2, shapes (5, 4), (4,): "
    assert message(report, "deterministic").startswith(f"{where}raised IndexError: ")
    report = check_function(bounded, samples, only=["vmap"], **options)
    refusal = f"{where}raised " if supports else f"not declared; it refuses: {where}"
    assert message(report, "vmap").startswith(refusal)


def test_the_compiler_check_names_the_sample_with_tied_arguments() -> None:
    def wrong_when_tied(x: Tensor, y: Tensor) -> Tensor:
        return x * y * (2 if x is y and torch.compiler.is_compiling() else 1)

    one, two = torch.rand(5, 3) + 1, torch.rand(4, 4) + 1
    samples = [(one, one[0]), (two, two + 1)]
    report = check_function(wrong_when_tied, samples, torch.mul, only=["compile"])
    assert "sample 2 of 2, shapes (4, 4), (4, 4): output when compiled" in str(report)


@pytest.mark.parametrize("is_complex_first", [True, False])
def test_a_sample_that_a_check_cannot_use_does_not_hide_the_others(is_complex_first: bool) -> None:
    def demoted(x: Tensor) -> Tensor:
        return x * (x.bfloat16().to(x.dtype) if x.dtype is torch.float32 else x)

    samples = [SAMPLES[0], (torch.randn(4, 3, dtype=torch.complex128),)]
    samples = samples[::-1] if is_complex_first else samples
    only = ["float32"]
    assert status(check_function(square, samples, square, only=only), *only) == "passed"
    assert status(check_function(demoted, samples, square, only=only), *only) == "failed"
    report = check_function(square, [(SAMPLES[0][0] * 1j,)], square, only=only)
    assert message(report, *only) == "the sample is complex"


def test_an_expected_failure_is_ok_and_its_pass_is_not() -> None:
    known = {"gradients_match_reference": "a thousandth too large"}
    only = ["gradients_match_reference"]
    report = check_function(Wrong, SAMPLES, square, expected_failures=known, only=only)
    assert report.ok
    assert status(report, *only) == "expected failure"
    report = check_function(Square, SAMPLES, square, expected_failures=known, only=only)
    assert not report.ok
    assert status(report, *only) == "unexpected pass"


def test_a_wrong_parameter_gradient_of_a_module_is_found() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight * 2 - self.weight.detach()
            return F.linear(x, w, self.bias)

    def samples(g: torch.Generator) -> list[tuple[Tensor]]:
        return [(torch.randn(5, 3, generator=g),)]

    assert torch.autograd.gradcheck(Doubling(3, 4).double(), SAMPLES[0][0].requires_grad_())
    report = check_module(lambda: Doubling(3, 4), samples, lambda: nn.Linear(3, 4), slow=False)
    text = message(report, "gradients_match_reference")
    assert "gradient of weight" in text
    assert "diagnosis: 2 times the right one, everywhere" in text


DIAGNOSES = {
    "flat_beyond_15": "right except where the argument is large",
    "reads_memory_in_order": "right only for contiguous upstream gradients",
    "drops_curvature": "a term of order 2 is missing",
    "scaled_by_first": "not linear in the upstream gradient",
    "first_row_only": "missing a sum over the batch",
    "keeps_on_ctx": "hidden from saved-tensor hooks",
    "saves_data": "the change went unnoticed",
    "returns_float32": "dtype demoted",
    "ignores_needs": "ctx.needs_input_grad is not used",
    "keeps_output": "a reference cycle",
    "shared_buffer": "overwritten by the next backward",
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_the_diagnosis_fits_the_planted_mistake(name: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    (outcome,) = run(mutant.case, only=[mutant.caught_by]).outcomes
    assert "diagnosis: " in outcome.message
    assert DIAGNOSES[name] in outcome.message


def test_a_declared_capability_that_cannot_be_judged_is_a_failure() -> None:
    report = check_function(Square, SAMPLES, supports=["float32"], only=["float32"])
    assert status(report, "float32") == "failed"
    assert message(report, "float32") == (
        "declared, but it cannot be judged: no reference was given"
    )


def test_nothing_else_is_compared_if_two_calls_differ() -> None:
    calls = itertools.count(1)
    report = check_function(lambda x: x * next(calls), SAMPLES, square, slow=False)
    (failure,) = report.failures
    assert failure.check == "deterministic"
    assert "diagnosis: it remembers earlier calls: each adds the same" in failure.message
    assert message(report, "vmap") == (
        "two calls with the same arguments differ: see deterministic"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x * x, (x > 0, x * 3)),
        lambda x: (x * x, (x <= 0, x * 2)),
        lambda x: (x * x, (x <= 0,)),
    ],
)
def test_nested_outputs_are_all_compared(wrong: Any) -> None:
    def right(x: Tensor) -> Any:
        return x * x, (x <= 0, x * 3)

    assert check_function(right, SAMPLES, right, slow=False, in_dims=(0,)).ok
    assert not check_function(wrong, SAMPLES, right, only=["forward_matches_reference"]).ok


def test_buffers_are_cast_and_restored_for_each_call() -> None:
    class Shift(nn.Module):
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.shift += 1
            return x * self.w + self.shift

    report = check_module(Shift, SAMPLES, Shift, slow=False, in_dims=(0,))
    names = ("float32", "bfloat16", "deterministic", "gradients_match_reference")
    assert {status(report, name) for name in names} == {"passed"}


def test_the_random_state_of_the_caller_does_not_change() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_function(Square, SAMPLES, square, slow=False)
    assert torch.equal(torch.rand(2), expected)


def test_directions_at_a_kink_are_reported() -> None:
    at_a_kink = [(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64),)]
    report = check_function(F.relu, at_a_kink, F.relu, only=["finite_differences", "at_zero"])
    assert report.ok
    assert message(report, "finite_differences") == (
        "4 directions start at a kink, which at_zero judges"
    )


def kept(value: Tensor) -> Tensor:
    """Saves its output, which makes a reference cycle if a hook keeps it."""
    return torch.exp(value)


@pytest.mark.parametrize(
    "case",
    [
        function_case(kept, SAMPLES, torch.exp, in_dims=(0,)),
        function_case(Square, SAMPLES, square, in_dims=(0,)),
        function_case(Wrong, SAMPLES, square, in_dims=(0,)),
        module_case(nn.Tanh, SAMPLES, nn.Tanh, in_dims=(0,)),
    ],
    ids=lambda case: case.name,
)
def test_a_run_leaves_no_tensors_behind(case: Any) -> None:
    run(case, slow=False)
    with only_new_objects():
        for _ in range(3):
            run(case, slow=False)
        gc.collect()
        nodes = (Tensor, torch.autograd.graph.Node)
        assert not [o for o in gc.get_objects() if issubclass(type(o), nodes)]


class Masked(Function):
    """x ⊙ mask, where the mask has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad * mask, None


def test_an_argument_that_never_has_a_gradient_should_be_closed_over() -> None:
    mask = torch.rand(5, 3, dtype=torch.float64)
    report = check_function(Masked, [(*SAMPLES[0], mask)], only=["finite_differences"])
    assert "close over an argument that never has one" in message(report, "finite_differences")
    report = check_function(
        lambda x: Masked.apply(x, mask.to(x.dtype)),
        SAMPLES,
        lambda x: x * mask.to(x.dtype),
        slow=False,
    )
    report.raise_if_failed()
    report = check_function(
        lambda x: Masked.apply(x, mask),
        SAMPLES,
        lambda x: x * mask,
        only=["float32"],
    )
    assert "promoted by a tensor of a wider dtype" in message(report, "float32")


class Sine(Function):
    """sin x, which saves cos x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.cos())
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return grad * slope


def test_an_intermediate_that_forward_saves_is_a_constant_in_double_backward() -> None:
    report = check_function(Sine, SAMPLES, torch.sin, slow=False)
    assert {outcome.check for outcome in report.failures} == {"double_backward"}
    assert "so is what forward computes and saves" in message(report, "double_backward")


class Domain(Function):
    """ln x, which refuses x ≤ 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not (x > 0).all():
            raise ValueError("x must be above 0")
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad / x


class Narrow(Domain):
    """ln x, which also refuses x ≥ 10, where the reference is finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not (x < 10).all():
            raise ValueError("x must be small")
        return Domain.forward(ctx, x)


def test_arguments_outside_the_domain_of_the_reference_may_be_refused() -> None:
    samples = [(torch.rand(5, 3, dtype=torch.float64) + 0.1,)]
    report = check_function(Domain, samples, torch.log, slow=False, in_dims=(0,))
    report.raise_if_failed()
    assert status(report, "large_values") == "passed"
    report = check_function(Narrow, samples, torch.log, slow=False, in_dims=(0,))
    assert [outcome.check for outcome in report.failures] == ["large_values"]


@pytest.mark.parametrize("check", ["float32", "bfloat16", "float16"])
def test_an_output_must_have_the_dtype_of_the_reference(check: str) -> None:
    def wide(x: Tensor) -> Tensor:
        return x.double().exp()

    given: Any = {"only": [check], "supports": [check]}
    check_function(wide, SAMPLES, wide, **given).raise_if_failed()
    report = check_function(wide, SAMPLES, torch.exp, **given)
    assert "as the reference, got torch.float64" in message(report, check)
    report = check_function(torch.exp, SAMPLES, wide, **given)
    assert "expected torch.float64, as the reference" in message(report, check)


def test_every_check_has_a_unique_name_and_a_description() -> None:
    assert all(check.run.__doc__ for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_the_capabilities_are_the_checks_that_are_declared_as_such() -> None:
    assert {check.name for check in CHECKS if check.capability} == CAPABILITIES
    assert {"vmap", "compile", "factory_kwargs"} < CAPABILITIES
    assert not {"deterministic", "pickle"} & CAPABILITIES
    assert all(check.capability for check in CHECKS if check.only_if_declared)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"supports": ["vmpa"]}, ValueError, r"must be names from .*'vmap'.*; got \['vmpa'\]"),
        ({"only": ["vmpa"]}, ValueError, r"must name checks of .*; got \['vmpa'\]"),
        ({"expected_failures": {"x": "y"}}, ValueError, r"must name checks of .*; got \['x'\]"),
        ({"samples": []}, TypeError, r"samples must be a sequence of argument tuples; got \[\]"),
        ({"samples": [torch.ones(2)]}, TypeError, "argument tuples; got a Tensor"),
        ({"samples": [(1, 2)]}, TypeError, "samples must each hold a floating or complex tensor"),
        ({"supports": "vmap"}, TypeError, "supports must be names in a list or tuple; got 'vmap'"),
        ({"only": "vmap"}, TypeError, "only must be names in a list or tuple; got 'vmap'"),
        ({"in_dims": 0}, ValueError, "in_dims must be a tuple with an entry for each argument"),
        (
            {"in_dims": (0, 0)},
            ValueError,
            "in_dims must be a tuple with an entry for each argument",
        ),
        ({"device": "meta"}, ValueError, "device must be one that PyTorch can use here; got meta"),
        ({"fn": 3}, TypeError, "fn must be callable; got int"),
        ({"reference": 3}, TypeError, "reference must be callable; got int"),
    ],
)
def test_unusable_input_raises(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"fn": Square, "samples": SAMPLES} | options
    with pytest.raises(error, match=message):
        check_function(**arguments)


def test_unusable_modules_raise() -> None:
    with pytest.raises(TypeError, match=r"factory must make an nn.Module; got Tensor"):
        module_case(lambda: torch.ones(2), SAMPLES)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"reference must have the parameters of the module, \["):
        module_case(lambda: nn.Linear(3, 4), SAMPLES, lambda: nn.Linear(3, 4, bias=False))


def test_sizes_that_would_take_too_much_are_left_out() -> None:
    def triples(x: Tensor) -> Any:
        return torch.combinations(x, 3).prod(1)

    report = check_function(triples, [(torch.randn(7),)], triples, in_dims=(0,), only=["sizes"])
    assert status(report, "sizes") == "passed"
    assert "1025 rows left out: more than 16777216 elements" in message(report, "sizes")
    assert "17 rows" not in message(report, "sizes")


def test_sizes_foresees_the_time_of_a_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose time grows with the third power of the size, by a clock of its own."""
    clock = [0.0]

    def slow(x: Tensor) -> Any:
        clock[0] += len(x) ** 3 * 1e-8
        return x.square()

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    report = check_function(slow, SAMPLES, slow, in_dims=(0,), only=["sizes"])
    assert status(report, "sizes") == "passed"
    assert "1025 rows left out: it would take more than 10 s" in message(report, "sizes")
    assert "129 rows" not in message(report, "sizes")
