"""Right candidates of low precision pass; a 1 % error in one of their gradients does not."""

from dataclasses import replace

import pytest

from manual_bp.verify._run import run
from tests.verify.low_precision import LOW_PRECISION, every_gradient, with_one_percent_more


def test_there_are_at_least_20_right_candidates() -> None:
    assert len(LOW_PRECISION) >= 20


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_right_candidate_passes(name: str, seed: int) -> None:
    run(replace(LOW_PRECISION[name], seed=seed), slow=False).raise_if_failed()


@pytest.mark.parametrize(("name", "i"), every_gradient(LOW_PRECISION))
def test_one_percent_in_a_bfloat16_gradient_is_found(name: str, i: int) -> None:
    report = run(with_one_percent_more(LOW_PRECISION[name], i), ["unbiased"])
    assert "bfloat16" in report.failures[0].message
