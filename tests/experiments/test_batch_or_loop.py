import pytest
import torch

from experiments.batch_or_loop import COST, Config, conclusion, differences, timed
from experiments.benchmark import measure as measuring
from experiments.curves import Row
from experiments.networks import build_net


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "PAUSE", 0)
        patch.setattr(measuring, "TURN", 0.005)
        return list(timed(Config(samples=(50, 1), hidden=(1, 8), rounds=3, budget=0.5)))


def of(rows: list[Row], over: str, way: str, size: int) -> Row:
    (row,) = (r for r in rows if (r["over"], r["way"], r["size"]) == (over, way, size))
    return row


def test_all_three_ways_lead_to_the_same_gradient(rows: list[Row]) -> None:
    for row in rows:
        assert row["error"] < {"batch": 1e-30, "loop": 1e-14, "differences": 1e-4}[row["way"]]
    assert min(row["error"] for row in rows if row["way"] == "differences") > 1e-12


def test_a_loop_takes_many_times_as_long_as_the_batch(rows: list[Row]) -> None:
    assert of(rows, "samples", "loop", 50)["times_batch"] > 10
    assert of(rows, "samples", "loop", 1)["times_batch"] < 5


def test_differences_take_longer_the_more_parameters_there_are(rows: list[Row]) -> None:
    few, many = 64 + 1 + 20, 64 * 8 + 8 + 8 * 10 + 10
    ratios = [of(rows, "parameters", "differences", n)["times_batch"] for n in (few, many)]
    assert ratios[0] > few / 100
    assert ratios[1] > 3 * ratios[0]
    said = conclusion(rows)[-1]
    assert f"each of {many} parameters, and took {ratios[1]:,.0f} times as long" in said


def test_differences_leave_the_parameters_as_they_were() -> None:
    net = build_net((3, 2), "sigmoid", "quadratic").double()
    before = [p.detach().clone() for p in net.parameters()]
    x, y = torch.rand(4, 3).double(), torch.rand(4, 2).double()
    grads = differences(net, x, y)
    COST(net(x), y).backward()
    for parameter, was, grad in zip(net.parameters(), before, grads, strict=True):
        assert torch.equal(parameter, was)
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-6)
