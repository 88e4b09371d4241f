import csv
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import command_line, train
from experiments.data import load
from experiments.train import main
from experiments.training import Config, Training
from manual_bp import Linear, ReLU, Sigmoid
from tests.activations import TABLE
from tests.helpers import logged_below, refusal

ROOT = Path(__file__).parents[2]
QUICK = ["--hidden", "8", "--epochs", "2", "--batch-size", "100", "--log-every", "5"]


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_the_main_job_learns_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the README, except for the folder; with the 96 % that it promises."""
    assert main(["--run-folder", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *epochs, last, verdict, where, page, how = printed.out.splitlines()
    assert first.startswith("64-30-10 sigmoid, output sigmoid, quadratic cost, on digits: 1437")
    assert len(epochs) == 30
    assert epochs[0].startswith("epoch  1/30  cost ")
    assert verdict == "verdict on layer 1 (64→30 sigmoid), layer 2 (30→10 sigmoid): learns"
    accuracy = re.fullmatch(r"test accuracy (\S+)% after \S+ s; \S+ s of .*", last)
    assert accuracy is not None
    assert float(accuracy[1]) >= 96

    folder = only(tmp_path)
    assert re.fullmatch(r"digits__64-30-10__seed0__\d{8}-\d{6}", folder.name)
    assert where == f"run folder: {folder}"
    assert page == f"report:     {folder / 'report.html'}"
    assert how == f"to see it:  tensorboard --logdir {folder}"
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(float(accuracy[1]) / 100, abs=1e-4)
    assert float(rows[-1]["train_cost"]) < float(rows[0]["train_cost"]) / 10
    config = json.loads((folder / "config.json").read_text("utf-8"))["config"]
    assert config["net"] == "64-30-10"
    assert config["learning_rate"] == 3.0
    assert (config["activation"], config["output"]) == ("sigmoid", "sigmoid")
    assert "dry_run" not in config


def test_a_run_logs_all_curves_histograms_and_images(tmp_path: Path) -> None:
    assert main([*QUICK, "--run-folder", str(tmp_path)]) == 0
    folder = only(tmp_path)
    logged = logged_below(folder)
    (first, second) = sorted(logged.keys() - {".", "test", "train"})
    assert first.startswith("1 64→")
    # Before the first update, and after every epoch of 15 updates.
    for name in ("test", "train"):
        assert logged[name].Tags()["scalars"] == ["1. learning/cost", "1. learning/accuracy"]
        assert [point.step for point in logged[name].Scalars("1. learning/cost")] == [0, 15, 30]
    for name in (first, second):
        tags = logged[name].Tags()
        assert len(tags["scalars"]) == 4
        for tag in tags["scalars"]:
            assert [point.step for point in logged[name].Scalars(tag)] == [0, 5, 10, 15, 20, 25]
        for tag in tags["histograms"]:
            assert [point.step for point in logged[name].Histograms(tag)] == [0, 15, 30]
        assert len(tags["histograms"]) == 4
    # Drawn once, because each takes as long as an epoch, but for the weights.
    steps = {
        tag.partition("/")[2]: [picture.step for picture in logged["."].Images(tag)]
        for tag in logged["."].Tags()["images"]
    }
    assert steps == {
        "weights of the first layer": [0, 15, 30],
        "which classes are confused": [30],
        "log₁₀ ‖δ‖ of every layer": [30],
    }


@pytest.mark.parametrize("cost", ["quadratic", "sigmoid-cross-entropy", "softmax-cross-entropy"])
def test_all_methods_follow_the_same_trajectory(cost: Any, device: torch.device) -> None:
    """Bit for bit, except for TrainingStep, which follows it up to rounding."""
    data = load("digits")
    methods: Any = ("autograd", "explicit", "step")
    trainings = [
        Training(Config(hidden=(20, 15), cost=cost, method=method, device=str(device)), data)
        for method in methods
    ]
    start = [p.detach().clone() for p in trainings[0].net.parameters()]
    for _, batches in zip(
        range(25), zip(*(t.epoch() for t in trainings), strict=True), strict=False
    ):
        for training, batch in zip(trainings, batches, strict=True):
            training.update(*batch)
        ours, theirs, last = (list(training.net.parameters()) for training in trainings)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        torch.testing.assert_close(last, theirs, rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(p, was) for p, was in zip(ours, start, strict=True))


@pytest.mark.parametrize("method", ["autograd", "explicit", "step"])
def test_observing_changes_nothing(method: Any, device: torch.device) -> None:
    data = load("digits")
    config = Config(hidden=(20, 15), method=method, device=str(device))
    plain, observed = Training(config, data), Training(config, data)
    norms: list[float] = []
    for _, batch, same in zip(range(10), plain.epoch(), observed.epoch(), strict=False):
        plain.update(*batch)
        observed.update(*same, lambda trace: norms.append(trace["0"].delta.norm().item()))
    assert len(set(norms)) == 10
    pairs = zip(plain.net.parameters(), observed.net.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.usefixtures("without_charts")
def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    rows: list[str] = []
    for seed in ("1", "1", "2"):
        folder = tmp_path / str(len(rows))
        assert main([*QUICK, "--seed", seed, "--run-folder", str(folder)]) == 0
        rows.append((only(folder) / "metrics.csv").read_text("utf-8"))
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "iris"],
        ["--dataset", "wine", "--method", "explicit"],
        ["--dataset", "wine", "--method", "step", "--hidden"],
        ["--dataset", "breast_cancer", "--cost", "sigmoid-cross-entropy"],
        ["--cost", "softmax-cross-entropy", "--hidden", "9", "7", "--learning-rate", "0.5"],
    ],
)
def test_other_settings_train_as_well(options: list[str], tmp_path: Path) -> None:
    assert main([*QUICK, *options, "--epochs", "1", "--run-folder", str(tmp_path)]) == 0
    assert (only(tmp_path) / "metrics.csv").exists()


def test_the_net_is_made_of_our_modules() -> None:
    training = Training(Config(), load("digits"))
    assert [type(module) for module in training.net] == [Linear, Sigmoid, Linear, Sigmoid]
    on_z = Training(Config(cost="softmax-cross-entropy"), load("digits"))
    assert [type(module) for module in on_z.net] == [Linear, Sigmoid, Linear]


@pytest.mark.parametrize(
    ("cost", "output"),
    [("quadratic", [Sigmoid]), ("sigmoid-cross-entropy", []), ("softmax-cross-entropy", [])],
)
def test_the_option_sets_the_activation_of_the_hidden_layers_only(
    cost: Any, output: list[Any]
) -> None:
    """The output follows from the cost."""
    digits = load("digits")
    relu = Training(Config(activation="relu", cost=cost, hidden=(9, 8)), digits)
    assert [type(m) for m in relu.net] == [Linear, ReLU, Linear, ReLU, Linear, *output]
    none = Training(Config(activation="relu", cost=cost, hidden=()), digits)
    assert [type(m) for m in none.net] == [Linear, *output]
    assert train.settings(Config(cost=cost), relu)["output"] == ("sigmoid" if output else "z")


ELU = """
import torch
from manual_bp.layers._activation import Activation

def elu(input, alpha=1.0): return torch.nn.functional.elu(input, alpha)
def prelu(input, weight): return torch.nn.functional.prelu(input, weight)

class ELU(Activation, torch.nn.ELU, function=elu): pass
class PReLU(Activation, torch.nn.PReLU, function=prelu):
    def __init__(self, weight): super().__init__()

from experiments.networks import build_net
from experiments.train import main
print(build_net((3, 2, 1), "elu", "quadratic"))
try:
    main(["--help"])
except SystemExit:
    main(["--activation", "prelu"])
"""


def test_a_new_activation_is_a_choice_unless_it_needs_arguments() -> None:
    command = [sys.executable, "-c", ELU]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "  (1): ELU(alpha=1.0)" in ended.stdout
    names = sorted({"elu", *(activation.name.replace("_", "-") for activation in TABLE)})
    assert f"{{{','.join(names)}}}" in ended.stdout
    assert "(default: sigmoid)" in ended.stdout
    assert ended.returncode == 2
    assert "invalid choice 'prelu' for argument '--activation'. Expected one of" in ended.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--run-folder", str(tmp_path / "runs")]) == 0
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "nothing was written" in printed
    assert "; epochs: 1 (30 without --dry-run), updates in each: 144; " in printed
    assert "after one epoch: cost 0." in printed


def test_a_dry_run_names_the_layers_as_the_verdicts_of_a_run_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", "iris", "--hidden", "8", "5", "--epochs", "1"]
    assert main([*options, "--dry-run"]) == 0
    dry = dict(re.findall(r"^(\d: \S+ sigmoid)  (\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert list(dry) == ["1: 4→8 sigmoid", "2: 8→5 sigmoid", "3: 5→3 sigmoid"]
    assert main([*options, "--run-folder", str(tmp_path)]) == 0
    run: dict[str, str] = {}
    for layers, verdict in re.findall(r"^verdict on (.*): (.*)$", capsys.readouterr().out, re.M):
        names = re.findall(r"layer (\d) \((.*?)\)", layers)
        run |= {f"{place}: {shape}": verdict for place, shape in names}
    assert dry == run


def test_a_dry_run_that_does_not_reach_the_end_of_the_epoch_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    diverges = ["--activation", "relu", "--cost", "softmax-cross-entropy", "--learning-rate"]
    assert main([*diverges, "1e38", "--dry-run"]) == 1
    assert re.search(r"^after update \d+: cost nan", capsys.readouterr().out, re.MULTILINE)


def test_a_dry_run_reports_dead_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dies = ["--activation", "relu", "--cost", "softmax-cross-entropy", "--learning-rate", "10"]
    assert main([*dies, "--dry-run", "--run-folder", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "does not learn: all its neurons are off" in printed.out
    assert printed.err.startswith("warning: nothing was learned: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("rate", ["1e25", "1e38"])
@pytest.mark.parametrize("method", ["autograd", "explicit", "step"])
def test_enormous_weights_can_still_be_logged(rate: str, method: str, tmp_path: Path) -> None:
    options = ["--learning-rate", rate, "--method", method, "--run-folder", str(tmp_path)]
    assert main([*QUICK, *options, "--epochs", "1"]) in (0, 1)
    assert len((only(tmp_path) / "metrics.csv").read_text("utf-8").splitlines()) >= 2


@pytest.mark.usefixtures("without_charts")
def test_a_batch_larger_than_the_data_is_all_of_it(tmp_path: Path) -> None:
    options = ["--batch-size", "1" + "0" * 20, "--run-folder", str(tmp_path)]
    assert main([*QUICK, *options]) == 0
    assert (only(tmp_path) / "metrics.csv").read_text("utf-8").splitlines()[2].startswith("2,2,")


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("method", ["autograd", "explicit", "step"])
def test_a_run_that_diverges_stops_at_once_and_keeps_its_results(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cost", "softmax-cross-entropy", "--learning-rate", "1e38", "--epochs", "5"]
    assert main([*options, "--method", method, "--run-folder", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(
        "stopped: the cost is (nan|inf); it began .*; a smaller learning rate may help\n",
        printed.err,
    )
    assert "is broken: not finite: " in printed.out
    lines = (only(tmp_path) / "metrics.csv").read_text("utf-8").splitlines()
    assert len(lines) == 2
    assert int(lines[1].split(",")[1]) <= 3  # updates, of 144 in an epoch


@pytest.mark.usefixtures("without_charts")
def test_a_run_that_learns_nothing_ends_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--learning-rate", "1e4", "--method", "step", "--run-folder", str(tmp_path)]
    assert main([*QUICK, *options]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"warning: nothing was learned: \S+% of the training samples are right, and always "
        r"guessing the most frequent class gets 10.16%; try another learning rate, or more "
        r"epochs\n",
        printed.err,
    )
    assert "sigmoid): learns\n" not in printed.out


def test_a_run_whose_folder_is_deleted_ends_in_one_line(
    tmp_path: Path,
    before_update: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever notices first: also the thread of TensorBoard may."""
    monkeypatch.setattr(threading, "excepthook", command_line._in_a_thread)
    before_update(20, lambda: shutil.rmtree(only(tmp_path)))
    options = [*QUICK, "--checkpoint-every", "25", "--run-folder", str(tmp_path)]
    assert main(options) == 1
    err = capsys.readouterr().err
    assert err.startswith("stopped: ")
    assert re.fullmatch(rf"{tmp_path}/digits__\S+ is no longer there\n", err.split("; ")[-1])
    assert err.count("\n") == 1


def test_a_reader_that_stops_reading_ends_the_run_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", *QUICK, "--run-folder", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


def test_the_help_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    words = re.sub("[│─╭╮╰╯]", "", capsys.readouterr().out)
    assert words.isascii()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--learning-rate", "nan"],
            "--learning-rate must be above 0 and at most 3.4e+38; got nan",
        ),
        (["--learning-rate", "-1"], "--learning-rate must be above 0 and at most 3.4e+38; got -1"),
        (["--learning-rate", "1e39"], "--learning-rate must be above 0 and at most 3.4e+38; got"),
        (["--hidden", "10000000000000"], "the network cannot be made: "),
        (["--hidden", "9" * 30], "the network cannot be made: "),
        (["--device", "cpu:300"], "--device must be auto, or one that PyTorch can use here"),
        (["--device", "mkldnn"], "--device must be auto, or one that PyTorch can use here"),
        (["--device", "hpu"], "--device must be auto, or one that PyTorch can use here"),
        (
            ["--dry-run", "--run-folder", "/dev/null"],
            "--run-folder must be a place to write to",
        ),
        (["--run-folder", "\udcff"], "--run-folder must be a place to write to; got"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1; got 0"),
        (["--on-nan", "panic"], "invalid choice 'panic' for argument '--on-nan'"),
        (["--log-every", "0"], "--log-every must be at least 1; got 0"),
        (["--hidden", "30", "0"], "--hidden must be sizes of at least 1; got (30, 0)"),
        (["--seed", "-1"], "--seed must be from 0 to 2^63 - 1; got -1"),
        (["--device", "abacus"], "--device must be auto, or one that PyTorch can use here"),
        (["--device", "cuda:99"], "--device must be auto, or one that PyTorch can use here"),
        (["--device", "meta"], "--device must be auto, or one that PyTorch can use here"),
        (["--dataset", "cifar"], "invalid choice 'cifar' for argument '--dataset'"),
        (["--data-dir", "x"], "--data-dir goes only with --dataset mnist; got digits"),
        (["--dataset", "mnist", "--data-dir", "x"], "there is no train-images-idx3-ubyte or"),
        (["--epoch", "3"], "Unrecognized options: --epoch, 3. Perhaps you meant --epochs"),
        (["--learning-rat", "3"], "Perhaps you meant --learning-rate?"),
        (["--hidden", "30,20"], "--hidden must be whole numbers, separated by spaces; got '30,20'"),
        (["--run-folder", ""], "--run-folder must not be empty"),
        (["--run-folder", "a" * 300], "--run-folder must be a place to write to; got"),
        (["--run-folder", "/dev/null"], "--run-folder must be a place to write to; got"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(main, options, capsys)
    assert reason in said
    assert said.count("\n") == 1
