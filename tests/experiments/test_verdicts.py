"""Runs that go well and runs that fail, and what is reported about each."""

from typing import Any

import pytest

from experiments.data import load
from experiments.training import Config, Training
from experiments.verdicts import verdicts, warn

LEARNED, NOTHING, DIVERGED = "", "warning: nothing was learned: ", "stopped: the cost is "

SOFTMAX, SIGMOID = "softmax-cross-entropy", "sigmoid-cross-entropy"

# Options that differ from the default; how the message about the run begins; how the verdict on one
# of its layers begins (on all of them, if that is "learns"); and words that the verdict has.
RUNS: list[tuple[dict[str, Any], str, str, str]] = [
    # From docs/train.md.
    ({"epochs": 30}, LEARNED, "learns", ""),
    ({"activation": "relu", "learning_rate": 1.0, "epochs": 30}, LEARNED, "learns", ""),
    ({"cost": SOFTMAX, "learning_rate": 0.5, "epochs": 30}, LEARNED, "learns", ""),
    ({"dataset": "wine", "epochs": 30}, LEARNED, "learns", ""),
    # Saturated where the output is right, as it should be.
    ({"activation": "tanh"}, LEARNED, "learns", ""),
    ({"activation": "tanh", "cost": SIGMOID, "learning_rate": 0.5}, LEARNED, "learns", ""),
    ({"learning_rate": 10.0, "seed": 1}, LEARNED, "learns", ""),
    # Too fast: saturated for good.
    ({"learning_rate": 100.0}, NOTHING, "learns slowly", "saturated"),
    ({"activation": "tanh", "learning_rate": 30.0}, NOTHING, "learns slowly", "saturated"),
    (
        {"activation": "tanh", "cost": SOFTMAX, "learning_rate": 10.0},
        NOTHING,
        "learns slowly",
        "saturated",
    ),
    ({"cost": SIGMOID, "learning_rate": 30.0}, NOTHING, "learns slowly", "saturated"),
    # Too fast: dead, although the cost stays at a number that looks harmless.
    ({"activation": "relu", "learning_rate": 100.0}, NOTHING, "does not learn", "rounded to 0"),
    (
        {"activation": "relu", "cost": SOFTMAX, "learning_rate": 3.0},
        NOTHING,
        "does not learn",
        "off",
    ),
    (
        {"activation": "relu", "cost": SIGMOID, "learning_rate": 3.0},
        NOTHING,
        "does not learn",
        "off",
    ),
    # Too fast: no longer finite.
    (
        {"activation": "leaky-relu", "cost": SOFTMAX, "learning_rate": 100.0},
        DIVERGED,
        "is broken",
        "not finite",
    ),
    # Too deep for sigmoids.
    (
        {"hidden": (30,) * 6, "learning_rate": 1.0, "epochs": 3},
        NOTHING,
        "learns slowly",
        "times smaller than the last layer's",
    ),
    # Too slow, or not for long enough.
    ({"dataset": "wine", "learning_rate": 0.01, "epochs": 5}, NOTHING, "learns", ""),
]


@pytest.mark.parametrize(
    ("options", "said", "begins", "has"),
    RUNS,
    ids=["-".join(map(str, options.values())) or "default" for options, *_ in RUNS],
)
def test_a_run_is_reported_as_it_went(
    options: dict[str, Any],
    said: str,
    begins: str,
    has: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings: dict[str, Any] = {"epochs": 10, "method": "step", "device": "cpu"} | options
    config = Config(**settings)
    training = Training(config, load(config.dataset))
    costs = [training.update(x, y) for _ in range(config.epochs) for x, y in training.epoch()]
    code = warn(training, training.metrics(), costs[-1])
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert bool(printed) == bool(said)
    assert code == (said == DIVERGED)
    found = verdicts(training.whole_trace(), config.learning_rate)
    assert found[0].startswith(f"layer 1 ({training.data.features}→")
    if begins == "learns":
        assert len(found) == 1
        assert found[0].endswith("): learns")
    assert any(f"): {begins}" in each and has in each for each in found)
