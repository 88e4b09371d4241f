"""Contenders for a step of training: forward, backward, and gradient descent on one batch.

All of them train a copy of one network of linear layers and sigmoids by the quadratic cost, with
the same data, numbers and learning rate, in float32; and give the cost of the batch as well.
"""

import copy
import importlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.contending import FLOAT32, allowance, is_installed, sigmoid_network
from experiments.measuring import Timed
from manual_bp import QuadraticCost, TrainingStep

LEARNING_RATE = 0.1

Parameters = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Problem:
    """A network of PyTorch's, of which each contender trains a copy, and a batch for it."""

    net: nn.Sequential
    x: Tensor
    y: Tensor
    threads: int = 1

    @property
    def w(self) -> list[Tensor]:
        """The weights, from the input on."""
        return [layer.weight.detach() for layer in self._linear_layers]

    @property
    def b(self) -> list[Tensor]:
        """The biases, from the input on."""
        return [layer.bias.detach() for layer in self._linear_layers]

    @property
    def _linear_layers(self) -> list[nn.Linear]:
        return [module for module in self.net if isinstance(module, nn.Linear)]


@dataclass(frozen=True)
class Contender:
    """One way to make the step.

    parameters: Gives weights and biases in turn, as they are now; None if none are learned.
    """

    timed: Timed
    parameters: Callable[[], Parameters] | None


def problem(sizes: Sequence[int], batch: int, device: str, threads: int = 1) -> Problem:
    """A network of these sizes, and random data."""
    net = sigmoid_network(sizes, device)
    x, y = torch.rand(batch, sizes[0]), torch.rand(batch, sizes[-1])
    return Problem(net, x.to(device), y.to(device), threads)


def torch_contenders(task: Problem) -> dict[str, Contender]:
    """Those that need nothing but PyTorch, and compile nothing."""
    return {
        "ours": _ours(task),
        "torch, SGD": _autograd(task),
        "bare products": bare_products(task),
    }


def memory_contenders(task: Problem) -> dict[str, Callable[[], object]]:
    """A step that starts with nothing but its parameters: its buffers are made within."""

    def ours() -> object:
        return TrainingStep(net, QuadraticCost(), LEARNING_RATE)(task.x, task.y)

    net = copy.deepcopy(task.net)
    autograd = _autograd(task).timed.call
    autograd()
    return {"ours": ours, "torch, SGD": autograd}


@dataclass(frozen=True)
class Passes:
    """Forward and backward apart.

    counted: Forward, and backward, of autograd.
    timed: These two, and the bare products of each.
    """

    counted: tuple[Callable[[], object], Callable[[], object]]
    timed: dict[str, Timed]


def passes(task: Problem) -> Passes:
    """Forward and backward of one network, the input wanting no gradient."""
    net = copy.deepcopy(task.net)
    parameters = list(net.parameters())
    graph = _cost(net, task.x, task.y)

    def forward() -> object:
        return _cost(net, task.x, task.y)

    def backward() -> object:
        return torch.autograd.grad(graph, parameters, retain_graph=True)

    products_forward, products_backward = _products(task)
    timed = {
        "products, forward": Timed(products_forward),
        "products, backward": Timed(products_backward),
        "autograd, forward": Timed(forward),
        "autograd, backward": Timed(backward),
    }
    return Passes((forward, backward), timed)


def contenders(task: Problem) -> dict[str, Contender]:
    """Ours first, and the bare matrix products last; between, all peers that are there."""
    found = {"ours": _ours(task)}
    if task.x.is_cuda:
        found["ours, captured"] = _ours(task, captured=True)
    found |= {
        "torch, SGD": _autograd(task),
        "torch, fused SGD": _autograd(task, fused=True),
    }
    for needs, peer in PEERS.items():
        if _is_there(needs, task.x.device.type):
            found |= peer(task)
    return found | {"bare products": bare_products(task)}


def left_out(device: str) -> list[str]:
    """What is missing for a peer, which so does not contend."""
    return [needs for needs in PEERS if not _is_there(needs, device)]


def _is_there(needs: str, device: str) -> bool:
    if needs == "a C++ compiler":
        return any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    if device != "cpu":
        return False
    return all(is_installed(name) for name in needs.split(" and "))


def require_same(task: Problem, all_of_them: dict[str, Contender]) -> None:
    """Check that every contender's first call leads where autograd and SGD lead in float64.

    Raises:
        AssertionError: One of them is elsewhere; the message names it.
    """
    for name, contender in all_of_them.items():
        if contender.parameters is None:
            continue
        before = contender.parameters()
        rtol = allowance(len(task.w), max(len(task.x), *(n for w in task.w for n in w.shape)))
        contender.timed.call()
        contender.timed.wait()
        after = contender.parameters()
        expected = _expected(task, contender.timed.each)
        for found, old, right in zip(after, before, expected, strict=True):
            # It is what was learned that must be right; but each step rounds the parameter, too.
            change = np.abs(right - old).max()
            atol = rtol * change + 16 * FLOAT32 * contender.timed.each * np.abs(right).max()
            np.testing.assert_allclose(found, right, rtol=0, atol=atol, err_msg=name)


def _expected(task: Problem, steps: int) -> Parameters:
    net = copy.deepcopy(task.net).double()
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        _cost(net, task.x.double(), task.y.double()).backward()
        optimizer.step()
    return _values(net)


def _cost(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return F.mse_loss(net(x), y, reduction="sum") / (2 * len(x))


def _values(net: nn.Module) -> Parameters:
    # Copies, for the parameters change in place.
    return [p.detach().cpu().numpy().copy() for p in net.parameters()]


def _ours(task: Problem, *, captured: bool = False) -> Contender:
    net = copy.deepcopy(task.net)
    step: Any = TrainingStep(net, QuadraticCost(), LEARNING_RATE)
    if captured:
        step = step.cuda_graph(task.x, task.y)
    return Contender(Timed(partial(step, task.x, task.y)), partial(_values, net))


def _autograd(task: Problem, *, fused: bool = False) -> Contender:
    net = copy.deepcopy(task.net)
    return _by_autograd(task, net, partial(_cost, net), fused)


def _by_autograd(
    task: Problem, net: nn.Module, cost: Callable[[Tensor, Tensor], Any], fused: bool
) -> Contender:
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, fused=fused or None)

    def step() -> object:
        found = cost(task.x, task.y)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that gradients are no part of what was there before
        return found

    return Contender(Timed(step), partial(_values, net))


def _compiled(task: Problem) -> dict[str, Contender]:
    net = copy.deepcopy(task.net)
    cost = torch.compile(partial(_cost, net), dynamic=False)
    return {"torch.compile, fused SGD": _by_autograd(task, net, cost, True)}


def bare_products(task: Problem) -> Contender:
    """Nothing but the products of forward, BP2 and BP4, with the bias, into tensors made before."""
    forward, backward = _products(task)

    def products() -> None:
        forward()
        backward()

    return Contender(Timed(products), None)


def _products(task: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    w, b = ([t.clone() for t in tensors] for tensors in (task.w, task.b))
    a = [task.x, *(task.x.new_empty(len(task.x), size) for size in map(len, w))]
    delta = [torch.randn_like(each) for each in a[1:]]
    forth = [(b[l], a[l], w[l].mT, a[l + 1]) for l in range(len(w))]
    back = [(delta[l], w[l], delta[l - 1]) for l in range(len(w) - 1, 0, -1)]
    update = [(w[l], delta[l].mT, a[l]) for l in range(len(w))]

    def forward() -> None:
        for bias, a_prev, w_t, z in forth:
            torch.addmm(bias, a_prev, w_t, out=z)

    def backward() -> None:
        for above, weight, below in back:
            torch.mm(above, weight, out=below)
        for weight, delta_t, a_prev in update:
            weight.addmm_(delta_t, a_prev, alpha=-1e-12)

    return forward, backward


def _of_numpy(task: Problem) -> dict[str, Contender]:
    # copy(), for NumPy would write to the memory of the task's own tensors.
    x, y = task.x.numpy(), task.y.numpy()
    w, b = ([t.numpy().copy() for t in tensors] for tensors in (task.w, task.b))
    a = [x, *(np.empty((len(x), size), np.float32) for size in map(len, w))]
    delta, slope = ([np.empty_like(each) for each in a[1:]] for _ in range(2))
    grad_w = [np.empty_like(each) for each in w]
    rate, half, one = map(np.float32, (LEARNING_RATE / len(x), 0.5 / len(x), 1))

    def error_(l: int) -> None:
        np.subtract(one, a[l + 1], out=slope[l])
        np.multiply(slope[l], a[l + 1], out=slope[l])
        np.multiply(delta[l], slope[l], out=delta[l])

    def step() -> object:
        for l in range(len(w)):
            z = a[l + 1]
            np.matmul(a[l], w[l].T, out=z)
            np.add(z, b[l], out=z)
            np.negative(z, out=z)
            np.exp(z, out=z)
            np.add(z, one, out=z)
            np.reciprocal(z, out=z)
        np.subtract(a[-1], y, out=delta[-1])
        cost = half * np.vdot(delta[-1], delta[-1])
        error_(len(w) - 1)
        for l in range(len(w) - 1, -1, -1):
            if l:
                np.matmul(delta[l], w[l], out=delta[l - 1])
            np.subtract(b[l], rate * delta[l].sum(0), out=b[l])
            np.matmul(delta[l].T, a[l], out=grad_w[l])
            np.multiply(grad_w[l], rate, out=grad_w[l])
            np.subtract(w[l], grad_w[l], out=w[l])
            if l:
                error_(l - 1)
        return cost

    def parameters() -> Parameters:
        return [each.copy() for pair in zip(w, b, strict=True) for each in pair]

    return {"NumPy": Contender(Timed(step), parameters)}


def _of_jax(task: Problem) -> dict[str, Contender]:
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    precision = {"highest": "highest", "high": "high", "medium": "default"}
    jax.config.update(
        "jax_default_matmul_precision", precision[torch.get_float32_matmul_precision()]
    )
    x, y = jnp.asarray(task.x.numpy()), jnp.asarray(task.y.numpy())

    def cost(parameters: Any) -> Any:
        a = x
        for w, b in parameters:
            a = jax.nn.sigmoid(a @ w.T + b)
        return ((a - y) ** 2).sum() / (2 * len(x))

    def step(parameters: Any, _: Any = None) -> tuple[Any, Any]:
        found, gradients = jax.value_and_grad(cost)(parameters)
        new = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, parameters, gradients)
        return new, found

    length = _steps_in_a_scan(task)

    def scan(parameters: Any) -> tuple[Any, Any]:
        found: tuple[Any, Any] = jax.lax.scan(step, parameters, None, length=length)
        return found

    def contender(function: Any, each: int, *, at_once: bool = True) -> Contender:
        run = jax.jit(function, donate_argnums=0)
        state = [[(jnp.array(w.numpy()), jnp.array(b.numpy())) for w, b in pairs]]

        def call() -> None:
            state[0], _ = run(state[0])
            if at_once:
                wait()

        def wait() -> None:
            jax.block_until_ready(state[0])

        def parameters() -> Parameters:
            return [np.array(each) for pair in state[0] for each in pair]

        return Contender(Timed(call, each, wait), parameters)

    pairs = list(zip(task.w, task.b, strict=True))
    return {
        "jax.jit": contender(step, 1),
        "jax.jit, not waited for": contender(step, 1, at_once=False),
        f"jax.lax.scan, {length} steps": contender(scan, length),
    }


def _steps_in_a_scan(task: Problem) -> int:
    """Of a small network many, so that their start does not count; of a large one a few."""
    operations = 6 * len(task.x) * sum(w.numel() for w in task.w)
    return max(2, min(200, round(3e9 / operations)))


def _of_onnxruntime(task: Problem) -> dict[str, Contender]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    step = TrainingStep(copy.deepcopy(task.net), QuadraticCost(), LEARNING_RATE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    # Between two runs its threads shall leave the cores to others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Which of PyTorch's own extensions it does without is nothing to anybody here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            step.export_onnx(path)
        model = path.read_bytes()
    providers = ["CPUExecutionProvider"]

    def session() -> Any:
        return onnxruntime.InferenceSession(model, options, providers=providers)

    batch = {"x": task.x.numpy(), "y": task.y.numpy(), "lr": np.array(LEARNING_RATE, np.float32)}
    values = {name: p.detach().numpy() for name, p in step.net.named_parameters()}
    return {
        "onnxruntime": _onnx_with_arrays(session(), batch, values),
        "onnxruntime, bound": _onnx_bound(session(), batch, values),
    }


def _onnx_with_arrays(session: Any, batch: dict[str, Any], values: dict[str, Any]) -> Contender:
    """As its users call it: arrays in, arrays out."""
    state = dict(values)
    outputs = ["cost", *(f"new.{name}" for name in state)]

    def call() -> object:
        cost, *new = session.run(outputs, batch | state)
        state.update(zip(state, new, strict=True))
        return cost

    return Contender(Timed(call), lambda: [value.copy() for value in state.values()])


def _onnx_bound(session: Any, batch: dict[str, Any], values: dict[str, Any]) -> Contender:
    """As fast as it goes: from one set of buffers into the other, and back."""
    new_value: Any = importlib.import_module("onnxruntime").OrtValue.ortvalue_from_numpy
    # Of copies, whose memory an OrtValue takes as its own.
    here, there = (
        {name: new_value(value.copy()) for name, value in values.items()} for _ in range(2)
    )
    bindings = []
    for source, target in ((here, there), (there, here)):
        binding = session.io_binding()
        for name, value in batch.items():
            binding.bind_ortvalue_input(name, new_value(value))
        for name in values:
            binding.bind_ortvalue_input(name, source[name])
            binding.bind_ortvalue_output(f"new.{name}", target[name])
        binding.bind_output("cost")
        bindings.append((binding, target))
    last = [here]

    def call() -> None:
        binding, target = bindings[0]
        session.run_with_iobinding(binding)
        bindings.reverse()
        last[0] = target

    return Contender(Timed(call), lambda: [value.numpy().copy() for value in last[0].values()])


PEERS: dict[str, Callable[[Problem], dict[str, Contender]]] = {
    "a C++ compiler": _compiled,
    "numpy": _of_numpy,
    "jax": _of_jax,
    "onnxruntime and onnxscript": _of_onnxruntime,
}
