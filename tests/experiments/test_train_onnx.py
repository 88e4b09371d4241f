import errno
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import train_onnx, training
from experiments.data import load
from experiments.train_onnx import Config, accuracy, learn, main, prepare
from tests.helpers import refusal

pytestmark = [
    # The exporter causes these in packages that it uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Prepared = tuple[Config, train_onnx.Data, dict[str, train_onnx.Array]]

NEEDS = "needs the extra onnx: pip install -e '.[onnx]'"


@pytest.fixture(autouse=True, scope="module")
def _onnx() -> None:
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=NEEDS)


def test_it_reaches_the_accuracy_of_the_main_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "step.onnx"), "--epochs", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step exported to {tmp_path / 'step.onnx'}, ")
    assert [line.split()[0] for line in lines[1:7]] == ["epoch"] * 6
    job = training.Training(training.Config(epochs=6, device="cpu"), load("digits"))
    for _ in range(6):
        for x, y in job.epoch():
            job.update(x, y)
    expected = job.metrics()["test_accuracy"]
    assert expected > 0.9
    assert lines[7].startswith(f"test accuracy {expected:.2%} after ")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The step, exported once, with the data and the first parameters."""
    config = Config(model=tmp_path_factory.mktemp("step") / "step.onnx", epochs=2)
    return (config, *prepare(config))


def test_an_epoch_gives_the_parameters_of_the_main_job(prepared: Prepared) -> None:
    config, data, parameters = prepared
    found = next(learn(replace(config, batch_size=100), data, parameters))
    job = training.Training(training.Config(epochs=1, batch_size=100, device="cpu"), load("digits"))
    for x, y in job.epoch():
        job.update(x, y)
    for name, parameter in job.net.named_parameters():
        right = parameter.detach()
        torch.testing.assert_close(torch.from_numpy(found[name]), right, rtol=1e-4, atol=1e-5)


def test_the_loop_needs_no_pytorch(prepared: Prepared, tmp_path: Path) -> None:
    """In a process in which PyTorch cannot be imported."""
    file = tmp_path / "all.pickle"
    file.write_bytes(pickle.dumps(prepared))
    program = f"""
        import pickle, sys
        sys.modules["torch"] = None
        from experiments.train_onnx import accuracy, learn
        with open({str(file)!r}, "rb") as file:
            config, data, parameters = pickle.load(file)
        *_, last = learn(config, data, parameters)
        print(accuracy(last, data.x_test, data.label_test))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(train_onnx.__file__).parents[1],
    )
    assert float(ended.stdout) > 0.8


def test_accuracy_is_the_share_of_right_samples() -> None:
    parameters = {"w": np.eye(2, dtype=np.float32), "b": np.zeros(2, np.float32)}
    x, label = np.array([[1, 0], [1, 0]], np.float32), np.array([0, 1])
    assert accuracy(parameters, x, label) == 0.5


def test_saturated_neurons_are_read_without_a_warning() -> None:
    parameters = {"w": np.array([[-1e4], [1e4]], np.float32), "b": np.zeros(2, np.float32)}
    x, label = np.array([[1], [-1]], np.float32), np.array([1, 0])
    assert accuracy(parameters, x, label) == 1


def test_a_full_disk_is_a_refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Config) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_onnx, "prepare", fail)
    said = refusal(main, ["--model", str(tmp_path / "step.onnx")], capsys)
    assert said.endswith("train_onnx: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--hidden", "10000000000000"], "the network cannot be made: "),
        (["--hidden", "0"], "--hidden must be sizes of at least 1; got (0,)"),
        (["--learning-rate", "0"], "--learning-rate must be above 0 and at most 3.4e+38; got 0.0"),
        (["--learning-rate", "1e39"], "--learning-rate must be above 0 and at most 3.4e+38; got"),
        (["--seed", "-1"], "--seed must be from 0 to 2^63 - 1; got -1"),
        (["--model", "/nowhere/step.onnx"], "--model must be in an existing folder"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(main, arguments, capsys)
