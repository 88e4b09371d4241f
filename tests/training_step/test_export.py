"""The step in other runtimes, beside PyTorch's own training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import (
    Cost,
    LeakyReLU,
    LinearSigmoid,
    QuadraticCost,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Tanh,
    TrainingStep,
)
from tests.training_step.networks import Reference, batch, network, values
from tests.training_step.test_training_step import every_activation, every_descent

pytestmark = [
    # The exporter's own, of packages that it uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NEEDS_ONNX = "needs the extra onnx: pip install -e '.[onnx]'"


def state_of(net: nn.Sequential) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_close(found: dict[str, Tensor], net: nn.Module, **tolerances: float) -> None:
    expected = state_of(net)  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **tolerances)  # type: ignore[arg-type]


@every_descent
@pytest.mark.parametrize("cost", [QuadraticCost(), SoftmaxCrossEntropyCost("sum")], ids=repr)
def test_a_program_trains_as_autograd_and_sgd(
    cost: Cost, descent: dict[str, float], tmp_path: Path
) -> None:
    net = network(Tanh())
    step, reference = TrainingStep(net, cost, 0.1, **descent), Reference(net, cost, 0.1, **descent)
    before = values(net)
    step.export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    state = state_of(net)
    arguments: list[Any] = [state]
    if step.momentum:
        arguments.append({name: torch.zeros_like(p) for name, p in state.items()})
    for number, samples in enumerate((5, 2, 8, 1)):
        lr = 0.1 / (number + 1)
        reference.set_lr(lr)
        x, y = batch(net, cost, samples)
        found, *arguments = program(x, y, torch.tensor(lr, dtype=x.dtype), *arguments)
        torch.testing.assert_close(found, reference(x, y))
    assert_close(arguments[0], reference.net, rtol=1e-11, atol=1e-13)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))


class InOnnxruntime:
    """The training loop of somebody who has onnxruntime and NumPy, and no PyTorch."""

    def __init__(self, path: Path, step: TrainingStep) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.state = {name: p.numpy() for name, p in state_of(step.net).items()}
        if step.momentum:
            self.state |= {f"velocity.{name}": 0 * value for name, value in self.state.items()}

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> float:
        inputs = {"x": x.numpy(), "y": y.numpy(), "lr": torch.tensor(lr, dtype=x.dtype).numpy()}
        names = ["cost", *(f"new.{name}" for name in self.state)]
        cost, *new = self.session.run(names, inputs | self.state)
        self.state = dict(zip(self.state, new, strict=True))
        return float(cost)

    @property
    def parameters(self) -> dict[str, Tensor]:
        named = {n: v for n, v in self.state.items() if not n.startswith("velocity.")}
        return {name: torch.from_numpy(value) for name, value in named.items()}


def exported(step: TrainingStep, tmp_path: Path, y: Tensor | None = None) -> InOnnxruntime:
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    step.export_onnx(tmp_path / "step.onnx", y=y)
    return InOnnxruntime(tmp_path / "step.onnx", step)


def train(step: TrainingStep, run: InOnnxruntime, steps: int, *, indices: bool = False) -> None:
    reference = Reference(
        step.net, step.cost, 0.1, momentum=step.momentum, weight_decay=step.weight_decay
    )
    for number in range(steps):
        lr = 0.1 if number < steps // 2 else 0.03
        reference.set_lr(lr)
        x, y = batch(step.net, step.cost, (8, 8, 3, 1)[number % 4], indices=indices)
        assert run(x, y, lr) == pytest.approx(reference(x, y).item(), rel=1e-4)
    # float32, rounded in another order at every step
    assert_close(run.parameters, reference.net, rtol=1e-4, atol=1e-5)


@every_descent
def test_fifty_steps_in_onnxruntime(descent: dict[str, float], tmp_path: Path) -> None:
    step = TrainingStep(network(dtype=torch.float32), QuadraticCost(), 0.1, **descent)
    train(step, exported(step, tmp_path), 50)


@every_activation
def test_every_activation_in_onnxruntime(activation: nn.Module, tmp_path: Path) -> None:
    step = TrainingStep(network(activation, dtype=torch.float32), QuadraticCost(), 0.1)
    train(step, exported(step, tmp_path), 8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("cost", "indices"),
    [
        (SigmoidCrossEntropyCost, False),
        (SoftmaxCrossEntropyCost, False),
        (SoftmaxCrossEntropyCost, True),
    ],
)
def test_every_cost_in_onnxruntime(
    cost: type[Cost], indices: bool, reduction: Any, tmp_path: Path
) -> None:
    step = TrainingStep(network(dtype=torch.float32), cost(reduction), 0.1)
    y = torch.tensor([2]) if indices else None
    train(step, exported(step, tmp_path, y), 8, indices=indices)


def test_frozen_parameters_come_out_as_they_went_in(tmp_path: Path) -> None:
    net = network(dtype=torch.float32)
    net.get_parameter("0.weight").requires_grad_(False)
    net.get_parameter("4.bias").requires_grad_(False)
    step = TrainingStep(net, QuadraticCost(), 0.1, weight_decay=0.1)
    train(step, exported(step, tmp_path), 4)


def test_a_program_of_momentum_alone(tmp_path: Path) -> None:
    """With all parameters frozen there are no velocities, and still a place for them."""
    net = network().requires_grad_(False)
    TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9).export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    x, y = batch(net, QuadraticCost(), 3)
    _, new, velocities = program(x, y, torch.tensor(0.1, dtype=x.dtype), state_of(net), {})
    assert_close(new, net, rtol=0, atol=0)
    assert velocities == {}


def test_velocities_are_asked_for_of_what_learns(tmp_path: Path) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1, momentum=0.9)
    x, y = batch(step.net, step.cost, 3)
    step(x, y)
    step.net.get_parameter("0.weight").requires_grad_(False)
    step.export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    names = [name for name, p in step.net.named_parameters() if p.requires_grad]
    state = state_of(step.net)
    zeros = {name: torch.zeros_like(state[name]) for name in names}
    _, _, velocities = program(x, y, torch.tensor(0.1, dtype=x.dtype), state, zeros)
    assert list(velocities) == names


def test_float64_in_onnxruntime(tmp_path: Path) -> None:
    step = TrainingStep(network(LeakyReLU(0.1)), QuadraticCost(), 0.1)
    train(step, exported(step, tmp_path), 4)


def test_a_linear_sigmoid_and_an_input_activation(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), LinearSigmoid(4, 3), Tanh(), nn.Linear(3, 2, False))
    step = TrainingStep(net, QuadraticCost(), 0.1)
    train(step, exported(step, tmp_path), 4)


def test_the_model_is_the_products_and_little_else(tmp_path: Path) -> None:
    """No copies, no slices, no dtypes changed: what a runtime cannot take away costs time."""
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    step = TrainingStep(network(dtype=torch.float32), QuadraticCost(), 0.1)
    exported(step, tmp_path)
    model = onnx.load(tmp_path / "step.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Where", "Slice", "ScatterND", "Less", "Gather"}, kinds
    assert (
        sum(n.op_type in ("Gemm", "MatMul") for n in model.graph.node) == 3 * 3 - 1 + 3 + 1
    )  # and the cost
    assert [i.name for i in model.graph.input][:4] == ["x", "y", "lr", "0.weight"]
    assert [o.name for o in model.graph.output][:2] == ["cost", "new.0.weight"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param != "", dims[1].dim_value) == (True, 7)


def test_targets_that_do_not_suit_the_cost_are_refused(tmp_path: Path) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    with pytest.raises(TypeError, match="y must have the dtype of the output"):
        step.export(tmp_path / "step.pt2", y=torch.tensor([1]))
    wrong: Any = [1.0]
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor; got list"):
        step.export(tmp_path / "step.pt2", y=wrong)
    half = TrainingStep(network(dtype=torch.float16), QuadraticCost(), 0.1)
    with pytest.raises(TypeError, match="a step to be exported must be of float64, float32 or bf"):
        half.export(tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.pt2"
    path.write_text("before")

    def fail(_: Any, file: str) -> None:
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        TrainingStep(network(), QuadraticCost(), 0.1).export(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_none_is_refused_before_the_work(tmp_path: Path) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    with pytest.raises(FileNotFoundError, match="path must lead into a folder that is there"):
        step.export(tmp_path / "nowhere" / "step.pt2")
    with pytest.raises(IsADirectoryError, match="path must lead to a file; got a folder"):
        step.export_onnx(tmp_path)


def test_without_onnxscript_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    with pytest.raises(ImportError, match=r"pip install 'manual-bp\[onnx\]'"):
        step.export_onnx(tmp_path / "step.onnx")
