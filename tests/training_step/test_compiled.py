"""The step as machine code. One package serves most tests, because compiling takes seconds."""

import copy
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import (
    CompiledStep,
    Cost,
    EnsembleStep,
    LeakyReLU,
    Linear,
    QuadraticCost,
    Sigmoid,
    SoftmaxCrossEntropyCost,
    Softplus,
    Tanh,
    TrainingStep,
)
from manual_bp.training_step import _captured, _lowering, _package
from manual_bp.training_step._compiled import attach
from tests.training_step.networks import (
    ACTIVATIONS,
    COSTS,
    DESCENTS,
    Autograd,
    Reference,
    assert_follows,
    batch,
    every_rule,
    network,
    values,
)

PAGE = (Path(__file__).parents[2] / "docs" / "training_step.md").read_text("utf-8")
DESCENT: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}


class Net(nn.Sequential):
    """A class of the user's, which the process that loads a package does not have."""


def new_step() -> TrainingStep:
    """The step that the shared package was compiled from, with other parameters each time."""
    # Sums of few terms, as in a narrow layer, are inlined where they are used: after the update of
    # the weight, if nothing prevents it.
    parts = Linear(7, 5), Sigmoid(), LeakyReLU(0.1), Linear(5, 1), Softplus(2.0, 25.0), Linear(1, 3)
    net = Net(*parts).double()
    net.get_parameter("3.weight").requires_grad_(False)
    net.get_parameter("0.bias").requires_grad_(False)
    return TrainingStep(net, SoftmaxCrossEntropyCost(), 0.1, **DESCENT)


def attached(step: TrainingStep, package: Path) -> CompiledStep:
    """What `step.compile` returns, without compiling again."""
    return attach(step._plan, package, step._keeps(step._plan))


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "step.pt2"
    step = new_step()
    before, state = values(step.net), step.state_dict()["velocities"]
    step.compile(*batch(step.net, step.cost, 4, indices=True), path=path)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))
    for name, velocity in step.state_dict()["velocities"].items():
        assert torch.equal(velocity, state[name])
    return path


def test_compiled_steps_equal_autograd_and_sgd(package: Path) -> None:
    """For batches of any size and shape; between them, the eager step shares parameters."""
    step = new_step()
    reference, compiled = Reference(step.net, step.cost, 0.1, **DESCENT), attached(step, package)
    for number, samples in enumerate([(4,), (1,), (2, 3), (), (11,), (4,), (300,)]):
        step.lr = 0.1 / (1 + number // 3)
        reference.set_lr(compiled.lr)
        x, y = batch(step.net, step.cost, *samples, indices=True)
        run = step if number == 5 else compiled
        torch.testing.assert_close(run(x, y), reference(x, y), rtol=1e-11, atol=1e-13)
    assert_follows(step.net, reference.net)


def test_layout_of_a_batch_and_int32_indices_make_no_difference(package: Path) -> None:
    step = new_step()
    reference, compiled = Reference(step.net, step.cost, 0.1, **DESCENT), attached(step, package)
    x, y = batch(step.net, step.cost, 4, indices=True)
    wide = x.repeat_interleave(2, 1)[:, ::2].t().contiguous().t().requires_grad_()
    cost = compiled(wide, torch.stack([y, y], 1)[:, 0])
    assert not cost.requires_grad
    torch.testing.assert_close(cost, reference(x, y))
    with pytest.raises(TypeError, match=r"y must be of torch.int64 on the CPU, as compiled; got"):
        compiled(x, y.int())
    assert_follows(step.net, reference.net)


def test_x_may_be_a_part_of_a_parameter(package: Path) -> None:
    step = new_step()
    reference, compiled = Reference(step.net, step.cost, 0.1, **DESCENT), attached(step, package)
    x = step.net.get_parameter("0.weight").detach()[:4]
    y = torch.tensor([0, 2, 1, 0])
    expected = reference(x.clone(), y)
    torch.testing.assert_close(compiled(x, y), expected)
    assert_follows(step.net, reference.net)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_samples_of_an_epoch_may_be_a_part_of_a_parameter(is_compiled: bool, package: Path) -> None:
    """They are what they were when the epoch began."""
    step, other = new_step(), new_step()
    other.net.load_state_dict(step.net.state_dict())
    run: Any = attached(step, package) if is_compiled else step
    x, y = step.net.get_parameter("0.weight").detach(), torch.tensor([0, 2, 1, 0, 1])
    order = torch.arange(5).repeat(20)
    expected = other.epoch(x.clone(), y, order, 2)
    torch.testing.assert_close(run.epoch(x, y, order, 2), expected)
    assert_follows(step.net, other.net)


def test_a_negated_view_is_read_by_its_values(package: Path) -> None:
    step = new_step()
    reference, compiled = Reference(step.net, step.cost, 0.1, **DESCENT), attached(step, package)
    x, y = batch(step.net, step.cost, 4, indices=True)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(compiled(negated, y), reference(x, y))


def test_a_package_can_be_loaded_and_run_under_any_default(package: Path) -> None:
    step = new_step()
    reference = Reference(step.net, step.cost, 0.1, **DESCENT)
    parameters = {name: p.detach() for name, p in step.net.named_parameters()}
    x, y = batch(step.net, step.cost, 4, indices=True)
    with torch.device("meta"), torch.inference_mode():
        compiled = CompiledStep.load(package, parameters, 0.1)
        cost = compiled(x, y)
    torch.testing.assert_close(cost, reference(x, y))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.testing.assert_close(compiled(x, y), reference(x, y))
    finally:
        torch.set_num_threads(threads)
    assert_follows(step.net, reference.net)


def test_a_saved_state_continues_in_another_process_as_here(package: Path, tmp_path: Path) -> None:
    step = new_step()
    compiled, (x, y) = attached(step, package), batch(step.net, step.cost, 4, indices=True)
    compiled(x, y)
    names = {name: p.detach() for name, p in step.net.named_parameters()}
    torch.save((names, compiled.state), tmp_path / "saved.pt")
    parameters, state = torch.load(tmp_path / "saved.pt")
    later = CompiledStep.load(package, parameters, 0.1, state=state)
    for _ in range(3):
        assert torch.equal(later(x, y), compiled(x, y))
    assert all(torch.equal(parameters[name], p) for name, p in names.items())


def test_each_call_returns_a_new_cost_tensor(package: Path) -> None:
    step = new_step()
    compiled, pair = attached(step, package), batch(step.net, step.cost, 4, indices=True)
    first = compiled(*pair)
    value = first.item()
    assert compiled(*pair).item() < value == first.item()


def test_autograd_notices_that_a_weight_has_changed(package: Path) -> None:
    step = new_step()
    compiled, (x, y) = attached(step, package), batch(step.net, step.cost, 4, indices=True)
    cost = step.cost(step.net(x.requires_grad_()), y)
    compiled(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost.backward()


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_epoch_equals_a_step_for_each_batch(is_compiled: bool, package: Path) -> None:
    """With samples left out, one twice, a smaller last batch, and parts that are gathered apart."""
    step = new_step()
    reference = Reference(step.net, step.cost, 0.1, **DESCENT)
    run: Any = attached(step, package) if is_compiled else step
    x, y = batch(step.net, step.cost, 50_000, indices=True)
    order = torch.cat([torch.randperm(50_000)[:-7], torch.tensor([3])])
    costs = run.epoch(x, y, order, batch_size=3000)
    expected = [reference(x[part], y[part]) for part in order.split(3000)]
    torch.testing.assert_close(costs, torch.stack(expected))
    assert_follows(step.net, reference.net)
    assert run.epoch(x, y, order[:0], 10).shape == (0,)


# Around the break PyTorch 2.11 looks into the call, and warns of what it cannot compile.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_in_compiled_code_a_call_is_a_graph_break(package: Path) -> None:
    step = new_step()
    reference, compiled = Reference(step.net, step.cost, 0.1, **DESCENT), attached(step, package)
    x, y = batch(step.net, step.cost, 4, indices=True)

    @torch.compile(backend="eager")
    def train(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.arange(4)
        costs = step.epoch(x, y, order, 4), compiled.epoch(x, y, order, 4)
        return 2 * compiled(x, y), *costs

    last, first, second = train(x, y)
    for found in (first[0], second[0], last / 2):
        torch.testing.assert_close(found, reference(x, y))
    assert_follows(step.net, reference.net)


def test_wrong_epochs_are_refused(package: Path) -> None:
    step = new_step()
    x, y = batch(step.net, step.cost, 6, indices=True)
    before, order = values(step.net), torch.arange(6)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "x and y must hold the same number of samples", (x, y[:5], order, 2)),
        (TypeError, "order must be a torch.Tensor; got list", (x, y, [0, 1], 2)),
        (TypeError, "order must hold the indices of samples, int64", (x, y, order.int(), 2)),
        (ValueError, "order must hold indices from 0 to 5; got 1 to 6", (x, y, order + 1, 2)),
        (ValueError, "order must hold indices from 0 to 5; got -1 to 4", (x, y, order - 1, 2)),
        (ValueError, "batch_size must be at least 1; got 0", (x, y, order, 0)),
        (TypeError, "batch_size must be an integer; got float", (x, y, order, 2.0)),
    ]
    runs: list[Any] = [step, attached(step, package)]
    for run in runs:
        for error, message, arguments in wrong:
            with pytest.raises(error, match=message):
                run.epoch(*arguments)
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of autocast"):
            run.epoch(x, y, order, 2)
    with pytest.raises(ValueError, match="y must hold class indices from 0 to 2; got 0 to 3"):
        runs[1].epoch(x, torch.tensor([0, 0, 0, 0, 0, 3]), order, 2)
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def test_refused_batch_changes_nothing(package: Path) -> None:
    step = new_step()
    compiled, (x, y) = attached(step, package), batch(step.net, step.cost, 4, indices=True)
    before = values(step.net)
    wrong: list[tuple[type[Exception], str, tuple[Any, Any]]] = [
        (TypeError, "x must be of torch.float64 on the CPU, as compiled; got", (x.float(), y)),
        (TypeError, "got torch.float64 on meta", (x.to("meta"), y)),
        (TypeError, "x must be a dense tensor", (x.to_sparse(), y)),
        (TypeError, "x must be a torch.Tensor; got list", ([1.0], y)),
        (ValueError, "x must have last dimension 7, as compiled", (x[:, :6], y)),
        (ValueError, r"y must have shape \(4,\), a target for each sample", (x, y[:3])),
        (ValueError, "x must have at least one sample", (x[:0], y[:0])),
        (ValueError, "y must hold class indices from 0 to 2; got 0 to 3", (x, torch.arange(4))),
    ]  # fmt: skip
    for error, message, pair in wrong:
        with pytest.raises(error, match=message):
            compiled(*pair)
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of autocast"):
        compiled(x, y)
    with pytest.raises(RuntimeError, match=r"^CompiledStep must be called outside of"):
        torch.func.vmap(lambda x: compiled(x, y))(x[None])
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


def moved(step: TrainingStep) -> None:
    w = step.net.get_parameter("0.weight")
    w.data = w.data.clone()


def replaced(step: TrainingStep) -> None:
    step.net[3].weight = nn.Parameter(step.net.get_parameter("3.weight").detach().clone())


def frozen(step: TrainingStep) -> None:
    step.net.get_parameter("5.bias").requires_grad_(False)


def steeper(step: TrainingStep) -> None:
    activation: Any = step.net[2]
    activation.negative_slope = 0.2


def loaded(step: TrainingStep) -> None:
    step.load_state_dict(step.state_dict())


def summed(step: TrainingStep) -> None:
    step.cost.reduction = "sum"


@pytest.mark.parametrize("change", [moved, replaced, frozen, steeper, loaded, summed])
def test_compiled_step_refuses_after_a_change(
    change: Callable[[TrainingStep], None], package: Path
) -> None:
    step = new_step()
    compiled, (x, y) = attached(step, package), batch(step.net, step.cost, 4, indices=True)
    compiled(x, y)
    change(step)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must be what was compiled; got others: compile ag"):
            compiled(x, y)
        with pytest.raises(RuntimeError, match="must be what was compiled; got others: compile ag"):
            compiled.epoch(x, y, torch.arange(4), 2)
        step(x, y)


ELSEWHERE = """
import sys
import torch

path, start, end = sys.argv[1:]
state = torch.load(start)
x, y, parameters = state["x"], state["y"], state["parameters"]

# With PyTorch alone.
run = torch._inductor.aoti_load_package(path).loader.run
lr = torch.tensor(0.1, dtype=x.dtype)
copies = [p.clone() for p in parameters.values()]
velocities = [torch.zeros_like(parameters[name]) for name in state["learned"]]
raw = [run([x, y, lr, *copies, *velocities])[0] for _ in range(3)]
assert "manual_bp" not in sys.modules

# With the package, without the network.
from manual_bp import CompiledStep

step = CompiledStep.load(path, parameters, lr=0.1)
costs = [step(x, y) for _ in range(3)]
assert torch.equal(torch.stack(raw), torch.stack(costs))
assert all(map(torch.equal, copies, parameters.values()))
torch.save({"costs": torch.stack(costs), "parameters": parameters}, end)
"""


def test_package_trains_in_a_process_without_the_network(package: Path, tmp_path: Path) -> None:
    step = new_step()
    x, y = batch(step.net, step.cost, 5, indices=True)
    parameters = {name: p.detach().clone() for name, p in step.net.named_parameters()}
    learned = [name for name, p in step.net.named_parameters() if p.requires_grad]
    start, end = tmp_path / "start.pt", tmp_path / "end.pt"
    torch.save({"x": x, "y": y, "parameters": parameters, "learned": learned}, start)
    arguments = map(str, (package, start, end))
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True)
    found, reference = torch.load(end), Reference(step.net, step.cost, 0.1, **DESCENT)
    expected = torch.stack([reference(x, y) for _ in range(3)])
    torch.testing.assert_close(found["costs"], expected)
    for name, p in reference.net.named_parameters():
        torch.testing.assert_close(found["parameters"][name], p.detach(), rtol=1e-11, atol=1e-13)


def test_what_does_not_fit_a_package_is_refused(package: Path, tmp_path: Path) -> None:
    step = new_step()
    good = {name: p.detach().clone() for name, p in step.net.named_parameters()}
    w = good["0.weight"]
    shared = torch.zeros(5, dtype=w.dtype)
    (tmp_path / "text.pt2").write_text("no package")
    wrong: list[tuple[type[Exception], str, dict[str, Tensor]]] = [
        (KeyError, "parameters must have the names 0.weight, 0.bias", {"0.weight": w}),
        (ValueError, r"'0.weight'\] must have shape \(5, 7\)", good | {"0.weight": w.t()}),
        (ValueError, r"must have the strides \(7, 1\), as compiled; got \(1, 5\)",
         good | {"0.weight": w.t().contiguous().t()}),
        (TypeError, "must be of float64 on the CPU, as compiled; got float32",
         good | {"0.weight": w.float()}),
        (ValueError, r"'0.weight'\] must hold its values themselves; got a negated view",
         good | {"0.weight": torch.complex(w, -w).conj().imag}),
        (ValueError, "5.bias must share no memory with 5.weight",
         good | {"5.weight": shared[:3].view(3, 1), "5.bias": shared[2:5]}),
    ]  # fmt: skip
    for error, message, parameters in wrong:
        with pytest.raises(error, match=message):
            CompiledStep.load(package, parameters, 0.1)
    with pytest.raises(ValueError, match="lr must be at least 0; got -1"):
        CompiledStep.load(package, good, -1)
    with pytest.raises(KeyError, match="state must have the keys velocities; got none"):
        CompiledStep.load(package, good, 0.1, state={})
    with pytest.raises(KeyError, match=r"velocities must have the names 0\.weight, 3\.bias"):
        CompiledStep.load(package, good, 0.1, state={"velocities": {}})
    with pytest.raises(FileNotFoundError, match="path must lead to a compiled step; got"):
        CompiledStep.load(tmp_path / "nowhere", good, 0.1)
    step.export(tmp_path / "program.pt2", y=torch.tensor([0]))
    for name in ("text.pt2", "program.pt2"):
        with pytest.raises(ValueError, match=r"path must lead to a compiled step.*; got"):
            CompiledStep.load(tmp_path / name, good, 0.1)
    (tmp_path / "renamed").write_bytes(package.read_bytes())
    with pytest.raises(ValueError, match=r"path must end in \.pt2; got"):
        CompiledStep.load(tmp_path / "renamed", good, 0.1)


def double(net: nn.Sequential) -> None:
    net.float().double()


def join_an_ensemble(net: nn.Sequential) -> None:
    EnsembleStep([net], SoftmaxCrossEntropyCost(), 0.1)


@pytest.mark.parametrize("change", [double, join_an_ensemble, nn.Module.share_memory])
def test_a_loaded_step_refuses_parameters_and_state_that_have_moved(
    change: Callable[[nn.Sequential], None], package: Path
) -> None:
    step = new_step()
    net, (x, y) = step.net, batch(step.net, step.cost, 4, indices=True)
    parameters = dict(net.named_parameters())
    later = CompiledStep.load(package, parameters, 0.1)
    later(x, y)
    net.load_state_dict({name: t.clone() for name, t in net.state_dict().items()})
    later(x, y)
    change(net)
    before, message = values(net), "got 0.weight in another: load again"
    with pytest.raises(RuntimeError, match=message):
        later(x, y)
    with pytest.raises(RuntimeError, match=message):
        later.epoch(x, y, torch.arange(4), 2)
    assert all(torch.equal(*pair) for pair in zip(values(net), before, strict=True))
    again = CompiledStep.load(package, parameters, 0.1, state=later.state)
    again(x, y)
    velocity = later.state["velocities"]["3.bias"]
    velocity.data = velocity.data.clone()
    with pytest.raises(RuntimeError, match=r"got 3\.bias of velocities in another: load again"):
        again(x, y)


def test_state_is_changed_in_its_tensors_and_cannot_be_replaced(package: Path) -> None:
    compiled: Any = attached(new_step(), package)
    with pytest.raises(AttributeError, match="state"):
        compiled.state = {}


def test_a_package_of_another_machine_or_that_is_damaged_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {name: p.detach() for name, p in new_step().net.named_parameters()}
    content, damaged = package.read_bytes(), tmp_path / "damaged.pt2"
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="path must lead to a compiled step; got"):
        CompiledStep.load(damaged, parameters, 0.1)
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(damaged, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"no code" if name.endswith(".so") else old.read(name))
    with pytest.raises(ValueError, match=r"for PyTorch .*damaged\.pt2', which cannot be loaded"):
        CompiledStep.load(damaged, parameters, 0.1)
    monkeypatch.setattr(_package, "_origin", lambda: "PyTorch 9.9 on a toaster")
    with pytest.raises(ValueError, match=r"for PyTorch 9\.9 on a toaster; got one for PyTorch "):
        CompiledStep.load(package, parameters, 0.1)


def test_a_rate_out_of_range_is_refused(package: Path) -> None:
    step = TrainingStep(
        network(dtype=torch.float32), QuadraticCost(), 0.1, groups={"0.*": {"lr_scale": 4.0}}
    )
    assert _package._largest_lr(step._plan) == torch.finfo(torch.float32).max / 4
    compiled = attached(new_step(), package)
    for wrong, message in ((-1.0, "at least 0"), (math.inf, "finite"), (1e309, "finite")):
        with pytest.raises(ValueError, match=f"lr must be {message}"):
            compiled.lr = wrong
    compiled._largest_lr = 1.0
    with pytest.raises(ValueError, match=r"lr must be at most 1\.0, so that"):
        compiled.lr = 2.0
    assert compiled.lr == 0.1


def test_a_failed_or_interrupted_compilation_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, path = TrainingStep(network(), QuadraticCost(), 0.1), tmp_path / "step.pt2"
    path.write_text("old")
    before, pair = values(step.net), batch(step.net, step.cost, 4)

    def fails(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    stops: list[tuple[BaseException, str]] = [
        (RuntimeError("C++ compile error\nCommand: g++"), "the step; got C.. compile error$"),
        (KeyboardInterrupt("stop"), "stop"),
    ]
    for stop, message in stops:
        with pytest.raises(type(stop), match=message):
            step.compile(*pair, path=path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(*pair) for pair in zip(values(step.net), before, strict=True))


class ByLength(QuadraticCost):
    """A cost of the user's that turns the number of samples into a number."""

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        return (a - y).pow(2).sum() / len(y)


def test_what_cannot_be_compiled_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingStep(network(), QuadraticCost(), 0.1)
    x, y = batch(step.net, step.cost, 4)
    half = TrainingStep(network(dtype=torch.float16), QuadraticCost(), 0.1)
    with pytest.raises(TypeError, match="a step to be compiled must be of float64, float32 or bf"):
        half.compile(x.half(), y.half())
    with pytest.raises(ValueError, match=r"x must have shape \(N, in\); got \(2, 2, 7\)"):
        step.compile(x.view(2, 2, 7), y.view(2, 2, 3))
    with pytest.raises(ValueError, match=r"must have shape \(4, 3\)"):
        step.compile(x, y[:3])
    with pytest.raises(TypeError, match="y must be of a floating-point dtype for a QuadraticCost"):
        step.compile(x, y.long())
    for form in ("compile", "export"):
        by_length = TrainingStep(step.net, ByLength(), 0.1)
        arguments = (x, y) if form == "compile" else (tmp_path / "step.pt2",)
        with pytest.raises(ValueError, match=r"cost must be one that torch\.export can trace"):
            getattr(by_length, form)(*arguments)
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor; got list"):
        step.compile(x, [1.0])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="path must lead into a folder that exists"):
        step.compile(x, y, path=tmp_path / "nowhere" / "step.pt2")
    with pytest.raises(ValueError, match=r"path must end in \.pt2; got"):
        step.compile(x, y, path=tmp_path / "step")
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of autocast"):
        step.compile(x, y)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler: install no-such-compiler, or"):
        step.compile(x, y)


def test_nothing_that_compiles_is_imported_before_it_is_asked_for() -> None:
    source = """
import sys, torch
before = set(sys.modules)
from manual_bp import Linear, QuadraticCost, TrainingStep
step = TrainingStep(torch.nn.Sequential(Linear(3, 2)), QuadraticCost(), 0.1)
step.epoch(torch.rand(4, 3), torch.rand(4, 2), torch.arange(4), 2)
new = [name for name in set(sys.modules) - before if name.startswith("torch._inductor.codegen")]
assert "torch._inductor.compile_fx" not in sys.modules and not new, new
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def trains(step: TrainingStep, batches: int = 100, **tolerances: float) -> None:
    tolerances = {"rtol": 1e-8, "atol": 1e-10} | tolerances
    options = {name: value for name, value in step._plan.descent._asdict().items() if value}
    reference = Reference(step.net, step.cost, 0.1, **options)
    compiled: Any = step.compile(*batch(step.net, step.cost, 4))
    for number in range(batches):
        x, y = batch(step.net, step.cost, (4, 1, 9)[number % 3])
        torch.testing.assert_close(compiled(x, y), reference(x, y), rtol=1e-6, atol=1e-7)
        if step.grad_norm is not None:
            torch.testing.assert_close(compiled.grad_norm, reference.grad_norm)
    assert_follows(step.net, reference.net, **tolerances)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("cost", "descent"),
    list(zip([*COSTS, Autograd()], DESCENTS + DESCENTS[:2], strict=True)),
    ids=str,
)
def test_every_cost_compiles(cost: Cost, descent: dict[str, Any]) -> None:
    trains(TrainingStep(network(), cost, 0.1, **descent))


@pytest.mark.compiles
def test_what_reads_a_weight_does_so_before_its_update() -> None:
    """Also what the compiler inlines where it is used: sums of few terms, as in a narrow layer."""
    parts = Linear(4, 3), Softplus(2.0, 25.0), Linear(3, 1), Tanh(), Linear(1, 4), Softplus()
    trains(TrainingStep(nn.Sequential(*parts).double(), QuadraticCost(), 0.1))


@pytest.mark.compiles
def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "torch": torch, "Linear": Linear, "Sigmoid": Sigmoid, "QuadraticCost": QuadraticCost,
        "TrainingStep": TrainingStep,
    }  # fmt: skip
    for code in re.findall(r"^```python compiles\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        exec(code, names)
    assert names["costs"].shape == (100,)
    torch.testing.assert_close(names["cost"], names["compiled"](names["x"][:10], names["y"][:10]))


@pytest.mark.compiles
@pytest.mark.parametrize("max_norm", [None, 0.1])
@every_rule
def test_every_rule_and_clipping_compile(rule: dict[str, Any], max_norm: float | None) -> None:
    trains(TrainingStep(network(), QuadraticCost(), 0.1, max_norm=max_norm, **rule))


@pytest.mark.compiles
def test_every_activation_compiles() -> None:
    parts = [part for each in ACTIVATIONS for part in (Linear(4, 4), copy.deepcopy(each))]
    net = nn.Sequential(nn.ReLU(), *parts).double()
    trains(TrainingStep(net, QuadraticCost(), 0.1))


@pytest.mark.compiles
@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.bias", "2.bias"], ["4.weight"]])
def test_frozen_parameters_stay(names: list[str]) -> None:
    net = network()
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    before = [net.get_parameter(name).clone() for name in names]
    trains(TrainingStep(net, QuadraticCost(), 0.1, **DESCENT))
    for name, value in zip(names, before, strict=True):
        assert torch.equal(net.get_parameter(name), value)


@pytest.mark.compiles
@pytest.mark.parametrize("sizes", [(7, 5, 3), (200, 300, 100, 10)])
def test_float32_compiles_for_products_of_any_size(sizes: tuple[int, ...]) -> None:
    step = TrainingStep(network(sizes=sizes, dtype=torch.float32), QuadraticCost(), 0.1)
    trains(step, batches=3, rtol=1e-6, atol=1e-7)


@pytest.mark.compiles
def test_a_transposed_weight_and_a_layer_without_bias_compile() -> None:
    net = network(bias=False)
    net[2].weight = nn.Parameter(net.get_parameter("2.weight").detach().t().contiguous().t())
    trains(TrainingStep(net, QuadraticCost(), 0.1))


@pytest.mark.compiles
def test_updates_are_right_where_they_cannot_be_made_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_lowering, "product", lambda: None)
    trains(TrainingStep(network(), QuadraticCost(), 0.1, **DESCENT))


@pytest.mark.compiles
def test_kernels_for_cuda_graphs_compute_the_step() -> None:
    """Compiled for the CPU, and not captured."""
    step = TrainingStep(network(), QuadraticCost(), 0.1, **DESCENT)
    reference = Reference(step.net, step.cost, 0.1, **DESCENT)
    x, y = batch(step.net, step.cost, 4)
    run = _captured._compiled_pass(step._plan, x, y)
    for _ in range(3):
        with torch.no_grad():
            cost = run(x, y, torch.tensor(0.1, dtype=x.dtype))
        torch.testing.assert_close(cost, reference(x, y))
    assert_follows(step.net, reference.net)
