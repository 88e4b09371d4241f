import math
from itertools import pairwise

import pytest

from experiments.curves import Row
from experiments.vanishing import Config, conclusion, deepest, gain, measure, typical


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(measure(Config(layers=(8, 3), width=32, samples=32)))


def test_the_factors_of_bp2_explain_all_of_the_change(rows: list[Row]) -> None:
    for those in deepest(rows).values():
        assert [row["layer"] for row in those] == list(range(1, 9))
        for row, above in pairwise(those):
            factors = row["by_w"] * row["by_sigma_prime"]
            assert row["delta"] == pytest.approx(above["delta"] * factors, rel=1e-9)
        assert those[-1]["delta"] == 1
        assert math.isnan(those[-1]["by_w"])


def test_the_error_fades_under_sigmoid_and_not_where_the_start_is_scaled(rows: list[Row]) -> None:
    arrived = {names: those[0]["delta"] for names, those in deepest(rows).items()}
    assert arrived["sigmoid", "pytorch"] < 1e-5
    assert arrived["sigmoid", "pytorch"] < arrived["tanh", "pytorch"] / 100
    assert 0.1 < arrived["relu", "scaled"] < 10
    assert 0.1 < arrived["tanh", "scaled"] < 10


def test_sigma_prime_takes_it_under_sigmoid_and_w_under_tanh(rows: list[Row]) -> None:
    series = deepest(rows)
    assert typical(series["sigmoid", "pytorch"], "by_sigma_prime") <= 0.25
    assert typical(series["tanh", "pytorch"], "by_sigma_prime") > 0.9
    printed = dict(zip(*[iter(conclusion(rows)[1:])] * 2, strict=True))
    fates = {name.split(":")[0]: fate for name, fate in printed.items()}
    assert fates["sigmoid, PyTorch's start"].endswith("it fades, mostly because of σ'.")
    assert fates["relu, PyTorch's start"].endswith("it fades, mostly because of wᵀ.")
    assert fates["relu, scaled start"].endswith("it arrives.")


def test_the_scaled_start_makes_up_for_the_slope_near_0() -> None:
    gains = {name: gain(name) for name in ("sigmoid", "tanh", "relu")}
    assert gains == pytest.approx({"sigmoid": 4, "tanh": 1, "relu": math.sqrt(2)}, rel=1e-9)


def test_an_error_that_does_not_arrive_at_all_is_called_so() -> None:
    """ReLUs of one neuron each, one of which is off."""
    rows = list(measure(Config(layers=(12,), width=1, samples=8)))
    assert deepest(rows)["relu", "scaled"][0]["delta"] == 0
    assert conclusion(rows)[-1].endswith("    None of it arrives.")
