import pytest

from experiments.backward_cost import Config, conclusion, timed
from experiments.benchmark import measure as measuring
from experiments.curves import Row


def measured(*layers: int) -> list[Row]:
    config = Config(widths=(16, 32), layers=layers, samples=8, rounds=2, budget=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "PAUSE", 0)
        patch.setattr(measuring, "TURN", 0.002)
        return list(timed(config))


def test_backward_has_two_products_a_layer_and_one_in_the_first() -> None:
    rows = measured(1, 2, 5)
    for row in rows:
        assert row["counted"] == (2 * row["layers"] - 1) / row["layers"]
        assert row["times_forward"] == pytest.approx(
            row["backward_microseconds"] / row["forward_microseconds"], rel=0.9
        )
    assert {row["layers"] for row in rows if row["over"] == "width"} == {2}
    assert {row["width"] for row in rows if row["over"] == "layers"} == {32}
    said = conclusion(rows)
    assert "5 layers of 32 neurons: backward takes 1.80 times the operations" in said[1]
    assert said[-1].endswith("too low by a factor of up to 1.80.")


def test_with_one_layer_the_notes_are_right() -> None:
    assert conclusion(measured(1))[-1].endswith("by operations that is right here.")
