"""Several processes train as one does, and any number of them goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoint
from experiments.train import main
from experiments.training import Training
from tests.experiments.run_ranks import OBSERVED, observe, without_pictures
from tests.experiments.runs import left_by
from tests.experiments.scenarios import RTOL, TOTAL, close, code, needs_gloo, weights

pytestmark = needs_gloo


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """What one process computes."""
    return observe(lambda config, data: Training(replace(config, shard=False), data))


@pytest.mark.parametrize("kind", list(OBSERVED))
def test_several_processes_compute_what_one_does(
    kind: str, ran: Path, expected: dict[str, Any]
) -> None:
    """Also in a batch of which one process has no sample; every process gets all results."""
    for rank in range(2):
        found = torch.load(ran / f"rank{rank}.pt", weights_only=True)[kind]
        close(found["costs"], expected[kind]["costs"])
        close(found["weights"], expected[kind]["weights"])
        close(found["metrics"], expected[kind]["metrics"])
        assert len(found["looks"]) == 7
        for look, wanted in zip(found["looks"], expected[kind]["looks"], strict=True):
            *numbers, diagnostics = look
            *wanted_numbers, wanted_diagnostics = wanted
            close(numbers, wanted_numbers)
            for layer, wanted_layer in zip(diagnostics, wanted_diagnostics, strict=True):
                for name, value in wanted_layer.items():
                    assert layer[name] == (
                        pytest.approx(value, rel=RTOL) if isinstance(value, float) else value
                    ), name


def test_one_folder_has_the_curves_and_tables_of_one_process(ran: Path) -> None:
    one, whole = (left_by(ran / "runs" / name) for name in ("one", "whole"))
    assert code(ran / "whole") == 0
    assert whole.keys() == one.keys()
    close(weights(ran / "runs/whole"), weights(ran / "runs/one"))
    for name, points in one.items():
        if ": " in name:  # a curve, or pictures
            steps, values = zip(*whole[name], strict=True)
            steps_of_one, values_of_one = zip(*points, strict=True)
            assert steps == steps_of_one
            if isinstance(values[0], float):
                assert values == pytest.approx(values_of_one, rel=RTOL), name
    config = json.loads((ran / "runs/whole/config.json").read_text())["config"]
    assert config["processes"] == 2


@pytest.mark.parametrize("name", ["more", "from-one"])
def test_another_number_of_processes_goes_on(name: str, ran: Path) -> None:
    """From two to three, with sharded weights from there on; from one to two."""
    assert code(ran / name) == 0
    close(weights(ran / "runs" / name), weights(ran / "runs/one"))


def test_one_process_goes_on_with_a_run_of_two(
    ran: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_pictures(monkeypatch)
    run = shutil.copytree(ran / "runs/stopped", tmp_path / "run")
    assert main(["--resume", str(run)]) == 0
    assert f"going on after update 9 of {TOTAL}\n" in capsys.readouterr().out
    close(weights(run), weights(ran / "runs/one"))
    used = checkpoint.read(run / "best.pt", whole=False)["training"]["net"]
    folders = {used.folder} if isinstance(used, checkpoint.Shards) else set()
    assert set(run.glob("weights-*")) == folders
