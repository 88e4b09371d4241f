import numpy as np
import pytest

from experiments.curves import Row
from experiments.small_activations import Config, columns, conclusion, measure

CONFIG = Config(hidden=8, batch_size=20)


@pytest.fixture(scope="module")
def found() -> tuple[list[Row], list[Row]]:
    parts = list(measure(CONFIG))
    return [row for rows, _ in parts for row in rows], [row for _, rows in parts for row in rows]


def test_weights_fed_by_0_do_not_move_at_all(found: tuple[list[Row], list[Row]]) -> None:
    size, moved = columns(found[0], "original")
    assert (size == 0).sum() == 4
    assert (moved[size == 0] == 0).all()
    assert (moved[size > 0] > 0).all()


def test_weights_fed_by_larger_activations_move_further(
    found: tuple[list[Row], list[Row]],
) -> None:
    size, moved = columns(found[0], "original")
    assert np.corrcoef(size, moved)[0, 1] > 0.6


def test_dimming_slows_down_the_weights_of_the_dimmed_pixels_only(
    found: tuple[list[Row], list[Row]],
) -> None:
    (size, moved), (dim_size, dim_moved) = (columns(found[0], i) for i in ("original", "dimmed"))
    dimmed = dim_size < size
    assert dimmed.sum() == 31
    np.testing.assert_allclose(dim_size[dimmed], CONFIG.dim * size[dimmed], rtol=1e-5)
    slower, other = (
        np.linalg.norm(dim_moved[part]) / np.linalg.norm(moved[part]) for part in (dimmed, ~dimmed)
    )
    assert slower < 1.5 * CONFIG.dim
    assert other > 0.5
    last = conclusion(CONFIG, found[0])[-1]
    assert last.startswith("The 31 pixels dimmed to 0.1: ")
    assert f"{slower:.3g} times" in last


def test_the_curves_end_where_the_pixels_do(found: tuple[list[Row], list[Row]]) -> None:
    pixels, curves = found
    for inputs in ("original", "dimmed"):
        _, moved = columns(pixels, inputs)
        last = max(row["update"] for row in curves)
        ends = [row["moved"] for row in curves if (row["inputs"], row["update"]) == (inputs, last)]
        assert np.linalg.norm(ends) == pytest.approx(np.linalg.norm(moved), rel=1e-5)
