import pytest

from experiments.curves import Row
from experiments.gradient_check import (
    EQUATIONS,
    FORGOTTEN,
    TOO_LARGE,
    Config,
    conclusion,
    errors,
    measure,
)

CONFIG = Config(halvings=30, samples=3)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(measure(CONFIG))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_error_has_the_shape_of_a_v(rows: list[Row], equation: str) -> None:
    found = errors(rows, "float64", equation)
    best = found.index(min(found))
    assert 10 <= best <= 25
    assert min(found) < 1e-9
    # On one side curvature: half the step, a quarter of the error. On the other side rounding.
    assert found[4] / found[5] == pytest.approx(4, rel=0.05)
    assert found[-1] > 10 * min(found)


def test_float32_cannot_tell_what_float64_can(rows: list[Row]) -> None:
    for equation in EQUATIONS:
        in_32 = min(errors(rows, "float32", equation))
        assert 1e4 * min(errors(rows, "float64", equation)) < in_32 < 1e-3


def test_a_planted_mistake_has_a_floor(rows: list[Row]) -> None:
    assert min(errors(rows, "float64", TOO_LARGE)) == pytest.approx(CONFIG.excess, rel=0.01)
    for dtype in ("float64", "float32"):
        assert min(errors(rows, dtype, FORGOTTEN)) > 0.3


def test_the_conclusion_says_which_mistake_shows_in_which_dtype(rows: list[Row]) -> None:
    said = conclusion(CONFIG, rows)
    assert said[0].startswith("float64: all four equations agree with differences to ")
    assert said[1].endswith(": it stands out.")
    assert said[4].endswith(": that does not show.")
    forgotten, too_large = said[-2:]
    assert forgotten.startswith("manual_bp.verify on the one without σ': NOT OK")
    assert too_large.endswith("1.0001 times the right one, everywhere")
