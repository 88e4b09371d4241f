import pytest

from experiments.slow_learning import Config, by_cost, conclusion, measure


def test_the_quadratic_cost_is_slow_because_of_sigma_prime() -> None:
    """At the same output, the errors under the two costs differ by σ' and nothing else."""
    quadratic, entropy = by_cost(list(measure(Config(epochs=1)))).values()
    slow, fast = quadratic[0], entropy[0]
    assert slow["output"] == fast["output"] == pytest.approx(0.982, abs=1e-3)
    assert slow["delta"] == pytest.approx(fast["delta"] * slow["sigma_prime"], rel=1e-12)
    assert slow["grad_a"] == pytest.approx(fast["delta"], rel=1e-12)
    # One step moves w and b by the learning rate times δ each.
    assert fast["output"] - entropy[1]["output"] > 50 * (slow["output"] - quadratic[1]["output"])


def test_the_quadratic_cost_takes_many_times_as_long() -> None:
    config = Config()
    rows = list(measure(config))
    arrivals = [
        next(row["epoch"] for row in those if row["output"] < 0.5)
        for those in by_cost(rows).values()
    ]
    assert arrivals[0] > 10 * arrivals[1]
    printed = conclusion(config, rows)
    assert f"Quadratic cost: below 0.5 after {arrivals[0]} epochs." in printed
    assert f"Cross-entropy cost: below 0.5 after {arrivals[1]} epochs." in printed


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (-2, "Quadratic cost: below 0.5 from the start, so there is little to learn."),
        (5, "Quadratic cost: not below 0.5 within 50 epochs."),
    ],
)
def test_the_conclusion_follows_from_the_start(start: float, said: str) -> None:
    config = Config(weight=start, bias=start, epochs=50)
    printed = conclusion(config, list(measure(config)))
    assert said in printed
    assert ("100% of its neurons are saturated" in printed[-1]) == (start == 5)
