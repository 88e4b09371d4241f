"""Right candidates of low precision pass; a 1 % error in one of their gradients does not.

With more seeds, and an error in every gradient: python -m tests.verify --seeds 50
"""

import pytest

from manual_bp.verify._run import run
from tests.verify.low_precision import LOW_PRECISION
from tests.verify.seeds import one_percent_is_found


def test_there_are_at_least_20_right_candidates() -> None:
    assert len(LOW_PRECISION) >= 20


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_right_candidate_passes(name: str) -> None:
    run(LOW_PRECISION[name], slow=False).raise_if_failed()


@pytest.mark.parametrize(
    ("name", "i"),
    [
        ("rms_norm", 0),
        ("rms_norm_many_rows", 1),
        ("layer_norm", 2),
        ("dynamic_tanh", 1),
        ("linear_cross_entropy", 1),
        ("attention", 2),
        ("recurrence", 1),
        ("embedding", 0),
        ("eager_softmax", 0),
        ("eager_swiglu", 1),
    ],
)
def test_one_percent_in_a_bfloat16_gradient_is_found(name: str, i: int) -> None:
    assert one_percent_is_found(LOW_PRECISION[name], i)
