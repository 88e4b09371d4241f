"""The report names the cause; what follows from it is folded, and it says where it fails."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify import Report, check_function, function_case, run
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.mutants import MUTANTS

SAMPLES = [(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),)]


def square(x: Tensor) -> Tensor:
    return x * x


def squares(backward: Callable[[int, Tensor, Tensor], Tensor]) -> type[Function]:
    """The square with this backward, of the number of the call, x and the upstream gradient."""

    class Squares(Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return square(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            Squares.calls += 1
            (x,) = ctx.saved_tensors
            return backward(Squares.calls, x, grad)

    return Squares


def report_of(name: str) -> Report:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    return run(mutant.case, slow=False)


def test_what_a_check_builds_on_exists_and_does_not_build_on_the_check() -> None:
    builds_on = {check.name: check.builds_on for check in CHECKS}

    def below(name: str) -> set[str]:
        return {name}.union(*(below(other) for other in builds_on[name]))

    for name, others in builds_on.items():
        assert name not in {n for other in others for n in below(other)}


CAUSES = {
    "extra_mean": "gradients_match_reference",
    "mean_bias": "finite_differences",
    "negated_bias": "forward_matches_reference",
    "scales_upstream_in_place": "writes_nothing",
    "zeroes_upstream": "writes_nothing",
    "clips_upstream": "gradients_match_reference",
    "shared_buffer": "interleaved_calls",
    "kept_on_stack": "interleaved_calls",
    "unseeded_dropout": "deterministic",
    "unsummed_bias": "raw_backward",
    "drops_curvature": "double_backward",
    "keeps_on_ctx": "saves_nothing_on_ctx",
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_leads_and_all_other_failures_follow_from_it(name: str) -> None:
    report = report_of(name)
    assert [outcome.check for outcome in report.causes] == [CAUSES[name]]
    followers = [outcome for outcome in report.failures if outcome.follows_from]
    assert {outcome.follows_from for outcome in followers} <= {CAUSES[name]}
    assert len(followers) == len(report.failures) - 1


FIRST_ORDER = [mutant.name for mutant in MUTANTS if mutant.kind.endswith((".first_order",))]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_wrong_value_or_gradient_leads_and_not_a_missing_term_of_order_two(name: str) -> None:
    verdict = report_of(name).verdict
    assert "order 2" not in verdict
    assert "–" in verdict or "no gradient" in verdict


def test_a_wrong_gradient_of_a_wrong_value_is_a_mistake_of_its_own() -> None:
    class Both(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * square(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            x: Tensor = ctx.saved_tensors[0]
            return 3 * grad * x

    report = check_function(Both, SAMPLES, square, slow=False)
    causes = [outcome.check for outcome in report.causes]
    assert causes == ["forward_matches_reference", "finite_differences"]


def test_the_same_error_in_many_checks_is_one_failure() -> None:
    def broken(x: Tensor) -> Tensor:
        raise TypeError(f"broken for {x.ndim} dimensions")

    report = check_function(broken, SAMPLES, square, slow=False)
    assert len(report.causes) == 1
    assert "raised TypeError: broken for 2 dimensions" in report.verdict
    assert not any("two calls" in outcome.message for outcome in report.outcomes)


ITS_OWN = torch.Generator()
BACKWARDS: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "flaky: 2 of 8 calls differ from the others": lambda n, x, g: 2 * x * g * (1 + (n % 4 == 3)),
    "it remembers earlier calls: it gives something else from call 2 on": (
        lambda n, x, g: 2 * x * g * (1 + (n == 1))
    ),
    "it remembers earlier calls: each adds the same": lambda n, x, g: 2 * n * x * g,
    "random, or it remembers earlier calls, in backward": (
        lambda _, x, g: 2 * x * g + torch.rand(x.shape, generator=ITS_OWN)
    ),
}


@pytest.mark.parametrize("expected", BACKWARDS)
def test_calls_that_differ_are_told_apart(expected: str) -> None:
    report = check_function(squares(BACKWARDS[expected]), SAMPLES, square, slow=False)
    (failure,) = report.failures
    assert failure.check == "deterministic"
    assert expected in report.verdict


def test_a_call_that_is_rarely_wrong_is_flaky() -> None:
    # The first nine calls find out whether calls differ, and how to call it.
    wrong = squares(lambda n, x, g: 2 * x * g * (1 + (n == 10)))
    only = ["gradients_match_reference"]
    report = check_function(wrong, SAMPLES, square, only=only)
    assert "flaky: the same check with the same arguments passed the second time" in report.verdict
    always = squares(lambda _, x, g: 3 * x * g)
    assert "flaky" not in check_function(always, SAMPLES, square, only=only).verdict


def wrong_if(condition: Callable[[Tensor], bool]) -> type[Function]:
    return squares(lambda _, x, g: (3 if condition(x) else 2) * x * g)


ONE, MANY, CUBE = (torch.randn(*shape) for shape in ((5, 3), (7, 3), (2, 5, 3)))
F64, BF16 = torch.float64, torch.bfloat16
WHERE: dict[str, tuple[Callable[[Tensor], bool], list[Tensor], list[torch.dtype]]] = {
    "only in bfloat16": (lambda x: x.dtype is BF16, [ONE, MANY], [F64, BF16]),
    "only with 7 rows": (lambda x: len(x) == 7, [ONE, MANY], [F64]),
    "only with 3 dimensions": (lambda x: x.ndim == 3, [ONE, MANY, CUBE], [F64]),
    "at every sample": (lambda _: True, [ONE, MANY], [F64]),
    "at 1 of 2 samples": (lambda x: bool(x[0, 0] > 0), [ONE.abs(), -ONE.abs()], [F64]),
}


@pytest.mark.parametrize("expected", WHERE)
def test_a_failure_says_where_it_is(expected: str) -> None:
    condition, tensors, dtypes = WHERE[expected]
    samples = [(t,) for t in tensors]
    options: dict[str, Any] = {"dtypes": dtypes, "only": ["gradients_match_reference"]}
    report = check_function(wrong_if(condition), samples, square, **options)
    assert report.failures[0].where == expected
    assert report.verdict.endswith(f", {expected}")


def test_a_single_sample_says_nothing_about_others() -> None:
    report = check_function(
        wrong_if(lambda _: True), SAMPLES, square, only=["gradients_match_reference"]
    )
    assert report.failures[0].where == ""


def test_an_unexpected_pass_leads_too() -> None:
    case = function_case(square, SAMPLES, square)
    known = replace(case, expected_failures={"deterministic": "known"})
    report = run(known, only=["deterministic"])
    assert report.verdict == "NOT OK: deterministic: expected to fail: known"


def test_what_follows_from_an_expected_failure_is_folded_under_it() -> None:
    case = function_case(squares(lambda _, x, g: x * g), SAMPLES, square)
    report = run(replace(case, expected_failures={"gradients_match_reference": "half"}), slow=False)
    (cause,) = report.causes
    assert cause.check == "gradients_match_reference"
    assert not report.ok
    assert {outcome.follows_from for outcome in report.failures} == {cause.check}
    text = "gradients_match_reference is expected to fail, but 11 checks that build on it fail too:"
    assert text in report.verdict
    assert "gradients_match_reference: expected to fail: half" in str(report).splitlines()
    names = {outcome.check: "half" for outcome in (cause, *report.failures)}
    assert run(replace(case, expected_failures=names), slow=False).ok


def test_a_failure_of_its_own_leads_before_what_follows_from_an_expected_one() -> None:
    def backward(_: int, x: Tensor, g: Tensor) -> Tensor:
        g.zero_()
        return x

    case = function_case(squares(backward), SAMPLES, square)
    report = run(replace(case, expected_failures={"writes_nothing": "known"}), slow=False)
    assert [cause.check for cause in report.causes][-1] == "writes_nothing"


def test_sizes_says_which_sizes_are_wrong() -> None:
    wrong = wrong_if(lambda x: len(x) in (127, 129))
    report = check_function(wrong, SAMPLES, square, in_dims=(0,), only=["sizes"])
    (failure,) = report.failures
    assert "wrong with 127 rows, 129 rows, right with 17 rows, 1025 rows" in failure.message


def test_a_wrong_remainder_names_the_block() -> None:
    def remainder(_: int, x: Tensor, g: Tensor) -> Tensor:
        slope = 2 * x * g
        slope[len(x) // 128 * 128 :] *= 1 if len(x) < 128 else 0
        return slope

    report = check_function(squares(remainder), SAMPLES, square, in_dims=(0,), slow=False)
    (cause,) = report.causes
    assert cause.check == "sizes"
    assert "the rows from 128 on do not count: the remainder of a block of" in report.verdict
