"""A training step, and the contenders for it.

A step is forward, backward and gradient descent on one batch, under the quadratic cost, in float32.
Parameters follow their gradients by the rule of SGD, or of Adam. All contenders start from the same
weights, and compute the cost of the batch as well.
"""

import copy
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from experiments.benchmark.contender import FLOAT32, Contender, Result, allowance
from experiments.benchmark.problem import Problem
from manual_bp import Adam, CompiledStep, EnsembleStep, QuadraticCost, TrainingStep

LEARNING_RATE = 0.1
# With Adam's usual numbers, 0.999 and 1e-8, results would depend on the rounding of 1 - 0.999 and
# of gradients near 0.
BETAS, EPS = (0.9, 0.99), 1e-2
# How many networks an ensemble has.
NETWORKS = 32

Arrays = dict[str, Any]
Parameters = Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Rule:
    """How parameters follow their gradients.

    name: As PyTorch calls it.
    ours: What makes a TrainingStep follow it.
    optimizer: Makes PyTorch's, of parameters.
    slots: How many tensors it keeps for each parameter.
    update: The new parameter, and the new ones of what is kept, from the parameter, its gradient,
        the number of the step, and what is kept. For arrays of PyTorch and JAX.
    """

    name: str
    ours: Mapping[str, Any]
    optimizer: Callable[..., torch.optim.Optimizer]
    slots: int
    update: Callable[..., tuple[Any, ...]]


def _sgd(p: Any, gradient: Any, _t: Any) -> tuple[Any, ...]:
    return (p - LEARNING_RATE * gradient,)


def _adam(p: Any, gradient: Any, t: Any, m: Any, v: Any) -> tuple[Any, ...]:
    m = m + (1 - BETAS[0]) * (gradient - m)
    v = v + (1 - BETAS[1]) * (gradient * gradient - v)
    root = (v / (1 - BETAS[1] ** t)) ** 0.5
    return p - LEARNING_RATE * (m / (1 - BETAS[0] ** t)) / (root + EPS), m, v


SGD = Rule("SGD", {}, partial(torch.optim.SGD, lr=LEARNING_RATE), 0, _sgd)
ADAM = Rule(
    "Adam",
    {"rule": Adam(betas=BETAS, eps=EPS)},
    partial(torch.optim.Adam, lr=LEARNING_RATE, betas=BETAS, eps=EPS),
    2,
    _adam,
)


def judged(
    contender: Contender, problem: Problem, parameters: Parameters, rule: Rule = SGD
) -> Contender:
    """The contender, whose first call is judged by what it learns: weights and biases in turn."""

    def results() -> list[Result]:
        contender.call()
        contender.wait()
        relative = allowance(len(problem.w), problem.longest)
        before = map(torch.detach, problem.net.parameters())
        found: list[Result] = []
        for new, old, right in zip(parameters(), before, expected(), strict=True):
            # The change is what must be right; but every step also rounds the parameter.
            change, size = (right - old).abs().max().item(), right.abs().max().item()
            allowed = relative * change + 16 * FLOAT32 * contender.each * size
            found.append(Result(torch.as_tensor(new).detach().to(right.device), right, allowed))
        return found

    def expected() -> list[Tensor]:
        """What autograd and PyTorch's optimizer learn in float64."""
        net = copy.deepcopy(problem.net).double()
        optimizer = rule.optimizer(net.parameters())
        for _ in range(contender.each):
            optimizer.zero_grad()
            cost(net, problem.x.double(), problem.y.double()).backward()
            optimizer.step()
        return list(map(torch.detach, net.parameters()))

    contender.results = results
    return contender


def cost(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The quadratic cost, the mean over samples."""
    return F.mse_loss(net(x), y, reduction="sum") / (2 * len(x))


def ours(problem: Problem, *, rule: Rule = SGD, captured: bool = False) -> list[Contender]:
    """Our TrainingStep, or its CUDA graph."""
    net = copy.deepcopy(problem.net)
    step: Any = TrainingStep(net, QuadraticCost(), LEARNING_RATE, **rule.ours)
    if captured:
        step = step.cuda_graph(problem.x, problem.y)
    name = "ours, captured" if captured else "ours"
    contender = Contender(name, partial(step, problem.x, problem.y), is_ours=True)
    return [judged(contender, problem, net.parameters, rule)]


def ours_from_scratch(problem: Problem) -> list[Contender]:
    """A new TrainingStep for each call, so that the call allocates its buffers."""
    net = copy.deepcopy(problem.net)
    new_step = partial(TrainingStep, net, QuadraticCost(), LEARNING_RATE)
    return [Contender("ours", lambda: new_step()(problem.x, problem.y), is_ours=True)]


def ours_compiled(problem: Problem, *, rule: Rule = SGD) -> list[Contender]:
    """Our step as machine code: a call for each step and, on the CPU, a call for many of them."""
    x, y = problem.x, problem.y
    nets = [copy.deepcopy(problem.net) for _ in range(2)]
    step = TrainingStep(nets[0], QuadraticCost(), LEARNING_RATE, **rule.ours)
    if x.is_cuda:
        contender = Contender("ours, compiled", partial(step.compile(x, y), x, y), is_ours=True)
        return [judged(contender, problem, nets[0].parameters, rule)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.pt2")
        call = partial(step.compile(x, y, path=path), x, y)
        of_second = CompiledStep.load(path, dict(nets[1].named_parameters()), LEARNING_RATE)
    each = many_steps(problem)
    order = torch.arange(len(x)).repeat(each)
    epoch = partial(of_second.epoch, x, y, order, len(x))
    found = [
        Contender("ours, compiled", call, is_ours=True),
        Contender(f"ours, epoch of {each} steps", epoch, each, is_ours=True),
    ]
    return [judged(c, problem, net.parameters, rule) for c, net in zip(found, nets, strict=True)]


def ours_ensemble(problem: Problem) -> list[Contender]:
    """Our step of many networks at once, in the time that it takes for each of them."""
    nets = [copy.deepcopy(problem.net) for _ in range(NETWORKS)]
    step = EnsembleStep(nets, QuadraticCost(), [LEARNING_RATE] * NETWORKS)
    call = partial(step, problem.x, problem.y)
    contender = Contender(f"ours, {NETWORKS} networks", call, is_ours=True)
    # Judged as one step, since each network takes one.
    return [replace(judged(contender, problem, nets[-1].parameters), each=NETWORKS)]


def many_steps(problem: Problem) -> int:
    """How many steps make one call of a contender that takes many: fewer of a larger network."""
    operations = 6 * len(problem.x) * sum(w.numel() for w in problem.w)
    return max(2, min(200, round(3e9 / operations)))


def autograd_whole(problem: Problem, *, rule: Rule = SGD) -> list[Contender]:
    """Forward, autograd's backward and update, compiled as one; on a GPU in a CUDA graph."""
    net = copy.deepcopy(problem.net).requires_grad_(False)
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    kept = {n: [torch.zeros_like(p) for _ in range(rule.slots)] for n, p in parameters.items()}
    steps = torch.zeros((), device=problem.x.device)

    def of_batch(values: Any, x: Tensor, y: Tensor) -> Tensor:
        found = F.mse_loss(functional_call(net, values, (x,)), y, reduction="sum")
        return found / (2 * len(x))

    def step() -> Tensor:
        gradients, found = grad_and_value(of_batch)(parameters, problem.x, problem.y)
        steps.add_(1)
        for name, value in parameters.items():
            state = (value, *kept[name])
            new = rule.update(value, gradients[name], steps, *kept[name])
            for old, changed in zip(state, new, strict=True):
                old.copy_(changed)
        result: Tensor = found
        return result

    call: Callable[[], object] = torch.compile(step, fullgraph=True, dynamic=False)
    if problem.x.is_cuda:
        call = _captured(call, [steps, *parameters.values(), *chain(*kept.values())])
    return [judged(Contender("torch, compiled whole", call), problem, net.parameters, rule)]


def _captured(call: Callable[[], object], state: list[Tensor]) -> Callable[[], object]:
    """The same call in a CUDA graph; making it leaves the state as it was."""
    before = [t.clone() for t in state]
    graph = torch.cuda.CUDAGraph()
    stream: Any = torch.cuda.Stream
    stream = stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for t, value in zip(state, before, strict=True):
        t.copy_(value)
    return graph.replay


def autograd(
    problem: Problem, *, rule: Rule = SGD, fused: bool = False, compiled: bool = False
) -> list[Contender]:
    """Autograd and an optimizer, whose kernels may be fused into one, and the cost compiled."""
    net = copy.deepcopy(problem.net)
    of_batch: Any = partial(cost, net)
    if compiled:
        of_batch = torch.compile(of_batch, dynamic=False)
    optimizer = rule.optimizer(net.parameters(), fused=fused or None)

    def step() -> object:
        found = of_batch(problem.x, problem.y)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that each call starts without gradients in memory
        return found

    name = f"torch{'.compile' * compiled}, {'fused ' * fused}{rule.name}"
    return [judged(Contender(name, step), problem, net.parameters, rule)]


def bare_products(problem: Problem) -> list[Contender]:
    """Only the products of forward, BP2 and BP4, with the biases, into preallocated tensors."""
    forward, backward = products(problem)
    return [Contender("bare products", lambda: (forward(), backward()))]


def products(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """The matrix products of forward, and those of backward."""
    w, b = ([t.clone() for t in tensors] for tensors in (problem.w, problem.b))
    x = problem.x
    a = [x, *(x.new_empty(len(x), size) for size in map(len, w))]
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


def numpy_step(problem: Problem) -> list[Contender]:
    """The four equations written out in NumPy, in place."""
    x, y = problem.x.numpy(), problem.y.numpy()
    # Copies, because NumPy would write to the memory of the problem's tensors.
    w, b = ([t.numpy().copy() for t in tensors] for tensors in (problem.w, problem.b))
    a = [x, *(np.empty((len(x), size), np.float32) for size in map(len, w))]
    delta, slope = ([np.empty_like(each) for each in a[1:]] for _ in range(2))
    grad_w = [np.empty_like(each) for each in w]
    rate, half, one = map(np.float32, (LEARNING_RATE / len(x), 0.5 / len(x), 1))

    def forward(l: int) -> None:
        z = a[l + 1]
        np.matmul(a[l], w[l].T, out=z)
        np.add(z, b[l], out=z)
        np.negative(z, out=z)
        np.exp(z, out=z)
        np.add(z, one, out=z)
        np.reciprocal(z, out=z)

    def times_slope(l: int) -> None:
        np.subtract(one, a[l + 1], out=slope[l])
        np.multiply(slope[l], a[l + 1], out=slope[l])
        np.multiply(delta[l], slope[l], out=delta[l])

    def step() -> object:
        for l in range(len(w)):
            forward(l)
        np.subtract(a[-1], y, out=delta[-1])
        cost = half * np.vdot(delta[-1], delta[-1])
        times_slope(len(w) - 1)
        for l in range(len(w) - 1, -1, -1):
            if l:
                np.matmul(delta[l], w[l], out=delta[l - 1])
            np.subtract(b[l], rate * delta[l].sum(0), out=b[l])
            np.matmul(delta[l].T, a[l], out=grad_w[l])
            np.multiply(grad_w[l], rate, out=grad_w[l])
            np.subtract(w[l], grad_w[l], out=w[l])
            if l:
                times_slope(l - 1)
        return cost

    return [judged(Contender("NumPy", step), problem, lambda: chain(*zip(w, b, strict=True)))]


# What JAX calls PyTorch's precisions of float32 products.
_JAX_PRECISION = {"highest": "highest", "high": "high", "medium": "default"}


def jax_steps(problem: Problem, *, rule: Rule = SGD) -> list[Contender]:
    """JAX: compiled; compiled and not waited for; many steps in one call; and as an epoch."""
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    precision = _JAX_PRECISION[torch.get_float32_matmul_precision()]
    jax.config.update("jax_default_matmul_precision", precision)
    x, y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())
    start = [p.numpy() for pair in zip(problem.w, problem.b, strict=True) for p in pair]

    def cost(parameters: Any, x: Any, y: Any) -> Any:
        a = x
        for w, b in zip(parameters[::2], parameters[1::2], strict=True):
            a = jax.nn.sigmoid(a @ w.T + b)
        return ((a - y) ** 2).sum() / (2 * len(x))

    def step(state: Any, rows: Any = None) -> tuple[Any, Any]:
        t, parameters, *kept = state
        batch = (x, y) if rows is None else (x[rows], y[rows])
        found, gradients = jax.value_and_grad(cost)(parameters, *batch)
        pairs = zip(parameters, gradients, *kept, strict=True)
        new = [rule.update(p, g, t + 1, *own) for p, g, *own in pairs]
        return [t + 1, *map(list, zip(*new, strict=True))], found

    def contender(name: str, function: Any, each: int = 1, *, waits: bool = True) -> Contender:
        run = jax.jit(function, donate_argnums=0)
        kept = [[jnp.zeros(p.shape, p.dtype) for p in start] for _ in range(rule.slots)]
        state = [[jnp.zeros(()), list(map(jnp.array, start)), *kept]]

        def call() -> None:
            state[0], _ = run(state[0])
            if waits:
                wait()

        def wait() -> None:
            jax.block_until_ready(state[0])

        new = Contender(name, call, each, wait)
        return judged(new, problem, lambda: map(np.array, state[0][1]), rule)

    length = many_steps(problem)
    scan = partial(jax.lax.scan, step, xs=None, length=length)
    epoch = partial(jax.lax.scan, step, xs=jnp.tile(jnp.arange(len(x)), (length, 1)))
    return [
        contender("jax.jit", step),
        contender("jax.jit, not waited for", step, waits=False),
        contender(f"jax.lax.scan, {length} steps", scan, length),
        contender(f"jax.lax.scan, epoch of {length} steps", epoch, length),
    ]


def onnxruntime_steps(problem: Problem) -> list[Contender]:
    """Our step, exported and run by onnxruntime: with arrays, and with buffers bound once."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    step = TrainingStep(copy.deepcopy(problem.net), QuadraticCost(), LEARNING_RATE)
    model = _exported(step)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    # Between runs, its threads leave the cores to others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    rate = np.array(LEARNING_RATE, np.float32)
    batch = {"x": problem.x.numpy(), "y": problem.y.numpy(), "lr": rate}
    values = {name: p.detach().numpy() for name, p in step.net.named_parameters()}
    found: list[Contender] = []
    for make in (_with_arrays, _bound):
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model, options, providers=providers)
        contender, parameters = make(session, batch, values)
        found.append(judged(contender, problem, parameters))
    return found


def _exported(step: TrainingStep) -> bytes:
    # The exporter logs which optional extensions of PyTorch it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        path = Path(folder) / "step.onnx"
        step.export_onnx(path)
        return path.read_bytes()


def _with_arrays(session: Any, batch: Arrays, values: Arrays) -> tuple[Contender, Parameters]:
    """As most people call it: arrays in, arrays out."""
    state = dict(values)
    outputs = ["cost", *(f"new.{name}" for name in state)]

    def call() -> object:
        cost, *new = session.run(outputs, batch | state)
        state.update(zip(state, new, strict=True))
        return cost

    return Contender("onnxruntime", call), state.values


def _bound(session: Any, batch: Arrays, values: Arrays) -> tuple[Contender, Parameters]:
    """As fast as it can be: from one set of buffers to another, and back."""
    new_value: Any = importlib.import_module("onnxruntime").OrtValue.ortvalue_from_numpy
    # Copies, because an OrtValue takes over the memory of its array.
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

    def call() -> None:
        session.run_with_iobinding(bindings[0][0])
        bindings.reverse()

    # The binding that ran last is the other one now.
    return Contender("onnxruntime, bound", call), lambda: [
        value.numpy() for value in bindings[1][1].values()
    ]
