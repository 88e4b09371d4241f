"""The exported step in other runtimes, compared with training in PyTorch."""

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
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
    Sigmoid,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step import _export
from tests.training_step.networks import (
    ACTIVATIONS,
    RULES,
    Reference,
    batch,
    both,
    every_descent,
    network,
    values,
)

pytestmark = [
    # From packages that the exporter uses.
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
def test_program_equals_autograd_and_sgd(
    cost: Cost, descent: dict[str, Any], tmp_path: Path
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


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_clipped_program_of_a_rule_equals_torch_optim(name: str, tmp_path: Path) -> None:
    net, cost = network(Tanh(), (7, 5, 3)), QuadraticCost()
    step, reference = both(net, cost, 0.1, max_norm=0.1, **RULES[name])
    step.export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    state: list[Any] = [state_of(net)]
    state += [{n: torch.zeros_like(t) for n, t in k.items()} for k in kept_of(step).values()]
    for number, samples in enumerate((5, 2, 8, 1)):
        lr = 0.1 / (number + 1)
        reference.set_lr(lr)
        x, y = batch(net, cost, samples)
        found, *state = program(x, y, torch.tensor(lr, dtype=x.dtype), *state)
        torch.testing.assert_close(found, reference(x, y))
    assert_close(state[0], reference.net, rtol=1e-11, atol=1e-13)


def kept_of(step: TrainingStep) -> dict[str, dict[str, Tensor]]:
    """What the rule keeps, by its kind."""
    return {kind: kept for kind, kept in step.state_dict().items() if kind in KEPT and kept}


KEPT = {"velocities": "velocity", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "steps": "step"}


class InOnnxruntime:
    """A training loop that needs onnxruntime and NumPy, and no PyTorch."""

    def __init__(self, path: Path, step: TrainingStep) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.state = {name: p.numpy() for name, p in state_of(step.net).items()}
        for kind, kept in kept_of(step).items():
            self.state |= {
                f"{KEPT[kind]}.{name}": torch.zeros_like(t).numpy() for name, t in kept.items()
            }

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> float:
        inputs = {"x": x.numpy(), "y": y.numpy(), "lr": torch.tensor(lr, dtype=x.dtype).numpy()}
        names = ["cost", *(f"new.{name}" for name in self.state)]
        cost, *new = self.session.run(names, inputs | self.state)
        self.state = dict(zip(self.state, new, strict=True))
        return float(cost)

    @property
    def parameters(self) -> dict[str, Tensor]:
        named = {n: v for n, v in self.state.items() if not n.startswith(tuple(KEPT.values()))}
        return {name: torch.from_numpy(value) for name, value in named.items()}


def exported(step: TrainingStep, tmp_path: Path, y: Tensor | None = None) -> InOnnxruntime:
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    step.export_onnx(tmp_path / "step.onnx", y=y)
    return InOnnxruntime(tmp_path / "step.onnx", step)


def train(
    step: TrainingStep, run: InOnnxruntime, steps: int, *, indices: bool = False, **descent: Any
) -> None:
    reference = Reference(step.net, step.cost, 0.1, **descent)
    for number in range(steps):
        lr = 0.1 if number < steps // 2 else 0.03
        reference.set_lr(lr)
        x, y = batch(step.net, step.cost, (8, 8, 3, 1)[number % 4], indices=indices)
        assert run(x, y, lr) == pytest.approx(reference(x, y).item(), rel=1e-4)
    # float32, which rounds in another order at every step
    assert_close(run.parameters, reference.net, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingStep, InOnnxruntime, Path]:
    """A step, its ONNX model, and the folder with its file, because an export takes seconds."""
    folder = tmp_path_factory.mktemp("plain")
    step = TrainingStep(network(dtype=torch.float32), QuadraticCost(), 0.1)
    return step, exported(step, folder), folder


def test_fifty_steps_in_onnxruntime_equal_sgd(
    plain: tuple[TrainingStep, InOnnxruntime, Path],
) -> None:
    step, run, _ = plain
    train(step, run, 50)


@pytest.mark.parametrize("name", ["dampening", "adamw"])
def test_clipped_steps_of_a_rule_in_onnxruntime_are_exact(name: str, tmp_path: Path) -> None:
    descent: dict[str, Any] = {"max_norm": 0.1} | RULES[name]
    step = TrainingStep(network(sizes=(4, 3, 2)), QuadraticCost(), 0.1, **descent)
    session = exported(step, tmp_path).session
    assert_exact(step, partial(run_onnx, session), exact_start(step), **descent)


def test_every_activation_trains_in_onnxruntime(tmp_path: Path) -> None:
    """All in one network, likewise."""
    net = network_of(*map(copy.deepcopy, ACTIVATIONS)).float()
    step = TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9)
    train(step, exported(step, tmp_path), 8, momentum=0.9)


@pytest.mark.parametrize(
    ("cost", "indices"),
    [
        (SigmoidCrossEntropyCost("sum"), False),
        (SoftmaxCrossEntropyCost(), False),
        (SoftmaxCrossEntropyCost("sum"), True),
    ],
    ids=repr,
)
def test_cross_entropies_train_in_onnxruntime(cost: Cost, indices: bool, tmp_path: Path) -> None:
    step = TrainingStep(network(sizes=(4, 3), dtype=torch.float32), cost, 0.1)
    y = torch.tensor([2]) if indices else None
    train(step, exported(step, tmp_path, y), 8, indices=indices)


def test_a_network_with_frozen_parameters_a_fused_layer_and_an_input_activation_trains(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), LinearSigmoid(4, 3), Tanh(), nn.Linear(3, 2, False))
    net.append(nn.Linear(2, 2))
    net.get_parameter("1.weight").requires_grad_(False)
    net.get_parameter("4.bias").requires_grad_(False)
    step = TrainingStep(net, QuadraticCost("sum"), 0.1, weight_decay=0.1)
    train(step, exported(step, tmp_path), 4, weight_decay=0.1)


def test_all_frozen_network_with_momentum_takes_empty_velocities(tmp_path: Path) -> None:
    """The program still takes and returns a dict of velocities."""
    net = network().requires_grad_(False)
    TrainingStep(net, QuadraticCost(), 0.1, momentum=0.9).export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    x, y = batch(net, QuadraticCost(), 3)
    _, new, velocities = program(x, y, torch.tensor(0.1, dtype=x.dtype), state_of(net), {})
    assert_close(new, net, rtol=0, atol=0)
    assert velocities == {}


def test_only_parameters_that_learn_need_velocities(tmp_path: Path) -> None:
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


# Numbers that are not exact in float32.
DESCENT: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}


def network_of(*activations: nn.Module) -> nn.Sequential:
    """A linear layer before each activation, and one at the end."""
    modules = [module for each in activations for module in (nn.Linear(4, 4), each)]
    return nn.Sequential(*modules, nn.Linear(4, 4)).double()


def network_of_all(*more: nn.Module) -> nn.Sequential:
    slopes = LeakyReLU(0.1), nn.LeakyReLU(1 / 3, inplace=True)
    return network_of(Sigmoid(), Tanh(), nn.ReLU(), *slopes, *more)


def assert_exact(
    step: TrainingStep,
    run: Callable[..., Any],
    state: dict[str, Tensor],
    *,
    indices: bool = False,
    **descent: Any,
) -> None:
    """Three steps, each from the state of the last, are accurate to the digits of float64."""
    reference = Reference(step.net, step.cost, 0.1, **descent)
    for samples in (3, 7, 1):
        x, y = batch(step.net, step.cost, samples, indices=indices)
        cost, *new = run(x, y, torch.tensor(0.1, dtype=x.dtype), state)
        state = dict(zip(state, new, strict=True))
        exact: Any = {"rtol": 1e-14, "atol": 1e-15}
        torch.testing.assert_close(cost, reference(x, y), **exact)
        for name, p in reference.net.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), **exact)


def exact_start(step: TrainingStep) -> dict[str, Tensor]:
    state = state_of(step.net)
    for kind, kept in kept_of(step).items():
        state |= {f"{KEPT[kind]}.{name}": torch.zeros_like(t) for name, t in kept.items()}
    return state


@pytest.mark.parametrize(
    ("net", "cost", "descent", "indices"),
    [
        (network_of_all(), QuadraticCost(), DESCENT, False),
        (network_of(Tanh()), SigmoidCrossEntropyCost("sum"), {"weight_decay": 0.01}, False),
        (network_of(Tanh()), SoftmaxCrossEntropyCost(), {}, True),
    ],
)
def test_onnx_model_in_float64_is_exact(
    net: nn.Sequential, cost: Cost, descent: dict[str, Any], indices: bool, tmp_path: Path
) -> None:
    step = TrainingStep(net, cost, 0.1, **descent)
    session = exported(step, tmp_path, torch.tensor([2]) if indices else None).session
    assert_has_no_float32(tmp_path / "step.onnx")
    assert_exact(step, partial(run_onnx, session), exact_start(step), indices=indices, **descent)


def test_softplus_in_float64_is_exact_by_the_onnx_definitions(tmp_path: Path) -> None:
    """onnxruntime has no kernel for it, so the reference implementation of onnx runs the model."""
    reference = pytest.importorskip("onnx.reference", reason=NEEDS_ONNX)
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    net = network_of(Softplus(0.7, 20.1), nn.Softplus(3.0, 30.0))
    step = TrainingStep(net, QuadraticCost(), 0.1)
    step.export_onnx(tmp_path / "step.onnx")
    assert_has_no_float32(tmp_path / "step.onnx")
    model = reference.ReferenceEvaluator(str(tmp_path / "step.onnx"))
    assert_exact(step, partial(run_onnx, model), exact_start(step), indices=False)


def run_onnx(
    session: Any, x: Tensor, y: Tensor, lr: Tensor, state: dict[str, Tensor]
) -> list[Tensor]:
    inputs = {"x": x, "y": y, "lr": lr} | state
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.as_tensor(value) for value in found]


def assert_has_no_float32(path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    typed = [*graph.input, *graph.output, *graph.value_info]
    found = [t.name for t in typed if t.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    found += [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert not found


def test_program_in_float64_is_exact(tmp_path: Path) -> None:
    step = TrainingStep(network_of_all(Softplus(0.7, 20.1)), QuadraticCost(), 0.1, **DESCENT)
    step.export(tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    names = list(state_of(step.net))

    def run(x: Tensor, y: Tensor, lr: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
        parameters = {name: state[name] for name in names}
        velocities = {name: state[f"velocity.{name}"] for name in names}
        cost, parameters, velocities = program(x, y, lr, parameters, velocities)
        return [cost, *parameters.values(), *velocities.values()]

    assert_exact(step, run, exact_start(step), **DESCENT)


def test_small_softplus_slopes_are_accurate_in_onnxruntime(tmp_path: Path) -> None:
    """Far below 0, where e^x − 1 would be 0 in float32."""
    net = network(Softplus(), (1, 3), dtype=torch.float32)
    with torch.no_grad():
        net.get_parameter("0.bias").copy_(torch.tensor([-18.0, -12.0, -3.0]))
        net.get_parameter("0.weight").zero_()
    step = TrainingStep(net, QuadraticCost("sum"), 0.1)
    run, reference = exported(step, tmp_path), Reference(net, step.cost, 0.1)
    x, y = batch(net, step.cost, 4)
    run(x, y, 0.1)
    reference(x, y)
    found, expected = run.parameters["0.weight"], reference.net.get_parameter("0.weight")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)


def test_onnx_model_has_no_copies_or_slices(
    plain: tuple[TrainingStep, InOnnxruntime, Path],
) -> None:
    """Nor changes of dtype: what a runtime cannot remove would cost time."""
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    model = onnx.load(plain[-1] / "step.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Where", "Slice", "ScatterND", "Less", "Gather"}, kinds
    assert (
        sum(n.op_type in ("Gemm", "MatMul") for n in model.graph.node) == 3 * 3 - 1 + 3 + 1
    )  # and the cost
    assert [i.name for i in model.graph.input][:4] == ["x", "y", "lr", "0.weight"]
    assert [o.name for o in model.graph.output][:2] == ["cost", "new.0.weight"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param != "", dims[1].dim_value) == (True, 7)


def test_unsuitable_target_and_float16_are_refused(tmp_path: Path) -> None:
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


def small_step() -> TrainingStep:
    return TrainingStep(network(sizes=(4, 3)), QuadraticCost(), 0.1)


EXPORTS = [
    pytest.param(TrainingStep.export, id="program"),
    pytest.param(
        TrainingStep.export_onnx,
        id="onnx",
        marks=pytest.mark.skipif(find_spec("onnxscript") is None, reason=NEEDS_ONNX),
    ),
]
every_export = pytest.mark.parametrize("export", EXPORTS)


@contextmanager
def only_bytes_for(size: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    resource = pytest.importorskip("resource", reason="needs limits as POSIX has them")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_export
def test_failed_export_keeps_the_existing_file(export: Any, tmp_path: Path) -> None:
    path = tmp_path / "step"
    path.write_text("before")
    with only_bytes_for(1000), pytest.raises(OSError, match="File too large"):
        export(small_step(), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@every_export
def test_export_touches_no_other_file(export: Any, tmp_path: Path) -> None:
    """For other files of any name, and for links to any place."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.write_text("mine")
    folder.mkdir()
    for name in ("unfinished-step", ".unfinished-step", "step.tmp", "step~"):
        (folder / name).symlink_to(elsewhere)
    before = set(folder.iterdir())
    export(small_step(), folder / "step")
    assert elsewhere.read_text() == "mine"
    assert set(folder.iterdir()) == before | {folder / "step"}


def test_symbolic_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "step", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    path.symlink_to(elsewhere)
    small_step().export(path)
    assert (elsewhere.read_text(), path.is_symlink()) == ("mine", False)


def test_concurrent_exports_to_one_path_write_whole_files(tmp_path: Path) -> None:
    """After each round, the file is one of them."""
    path = tmp_path / "step"
    contents = [bytes([number]) * 200_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(partial(_export.write, path), contents))
            assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="needs permissions as POSIX has them")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_has_the_usual_permissions(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        _export.write(tmp_path / "step", b"step")
        (tmp_path / "other").write_bytes(b"other")
    finally:
        os.umask(before)
    found, expected = ((tmp_path / name).stat().st_mode for name in ("step", "other"))
    assert oct(found) == oct(expected)


def test_file_name_of_maximal_length_is_accepted(tmp_path: Path) -> None:
    _export.write(tmp_path / ("n" * 255), b"step")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_path_without_folder_or_to_a_folder_is_refused(tmp_path: Path) -> None:
    step = small_step()
    with pytest.raises(FileNotFoundError, match="path must lead into a folder that exists"):
        step.export(tmp_path / "nowhere" / "step.pt2")
    with pytest.raises(IsADirectoryError, match="path must lead to a file; got a folder"):
        step.export_onnx(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes as POSIX has them")
@every_export
def test_pipe_is_refused_and_kept(export: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="path must lead to a file; got a device or pipe"):
        export(small_step(), pipe)
    assert pipe.is_fifo()


def test_missing_onnxscript_error_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    step = small_step()
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript$"):
        step.export_onnx(tmp_path / "step.onnx")
