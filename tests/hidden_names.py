"""The core of the suite, run with private names of PyTorch hidden: `python -m tests.hidden_names`.

The arguments are names to hide, one after the other. A name is hidden from `manual_bp._torch` only,
because PyTorch itself needs it: in that file, `getattr` does not find it. For each name and each
question, one line is printed with the outcome: "right", "refused" or "wrong". The traceback of a
wrong one goes to stderr.
"""

import ast
import importlib
import importlib.util
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.func import functionalize, hessian, jacfwd, jvp, vmap
from torch.func import grad as func_grad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

FILE = Path(__file__).parents[1] / "manual_bp" / "_torch.py"
Question = Callable[[Any], None]
# The layers must work without any of the names; what the others ask about may refuse.
LAYERS: list[Question] = []
OTHERS: list[Question] = []


def names() -> list[str]:
    """The private names that `_torch.py` looks up: the second argument of getattr and _need."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(FILE.read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "_need"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                found[str(name.value)] = None
    return list(found)


def load(*hidden: str, wrong: dict[str, Any] | None = None) -> Any:
    """The package, imported again with some names hidden, or wrong replacements in `_torch`."""

    def see(owner: Any, name: str, *default: Any) -> Any:
        if name not in hidden:
            return getattr(owner, name, *default)
        if default:
            return default[0]
        raise AttributeError(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "manual_bp"]:
        del sys.modules[name]
    spec: Any = importlib.util.spec_from_file_location("manual_bp._torch", FILE)
    module: Any = importlib.util.module_from_spec(spec)
    module.getattr = see
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    vars(module).update(wrong or {})
    return importlib.import_module("manual_bp")


def ask(question: Question, package: Any) -> str:
    torch.manual_seed(0)
    try:
        question(package)
    except RuntimeError as error:
        refusals = ("torch must have the private name", "this version of PyTorch")
        if any(refusal in str(error) for refusal in refusals):
            return "refused"
        traceback.print_exc()
        return "wrong"
    except Exception:
        traceback.print_exc()
        return "wrong"
    return "right"


def of_layers(question: Question) -> Question:
    LAYERS.append(question)
    return question


def of_others(question: Question) -> Question:
    OTHERS.append(question)
    return question


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def refuses(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        if message not in str(error):
            raise
    else:
        raise AssertionError(f"nothing raised: {message}")


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def networks(package: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network of our layers and of PyTorch's."""
    ours = nn.Sequential(package.Linear(3, 4), package.Sigmoid(), package.Linear(4, 2)).double()
    theirs = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


def loss(a: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (a - y).square().sum() / len(y)


def pairs(package: Any) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Any]]:
    """Our functions, PyTorch's, and arguments."""
    z, y = leaf(3, 4), torch.rand(3, 4, dtype=torch.float64)
    arguments = leaf(2, 3), leaf(4, 3), leaf(4)
    activations: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Any]] = {
        name: (getattr(package, name), theirs, (z,))
        for name, theirs in dict[str, Any](
            {
                "sigmoid": torch.sigmoid,
                "tanh": torch.tanh,
                "relu": F.relu,
                "leaky_relu": F.leaky_relu,
                "softplus": F.softplus,
            }
        ).items()
    }
    return activations | {
        "linear": (package.linear, F.linear, arguments),
        "linear of three dimensions": (package.linear, F.linear, (leaf(2, 2, 3), *arguments[1:])),
        "linear_sigmoid": (
            package.linear_sigmoid,
            lambda *abc: torch.sigmoid(F.linear(*abc)),
            arguments,
        ),
        "quadratic": (package.quadratic_cost, loss, (z, y)),
        "sigmoid cross-entropy": (
            package.sigmoid_cross_entropy_cost,
            lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(y),
            (z, y),
        ),
        "softmax cross-entropy": (
            package.softmax_cross_entropy_cost,
            F.cross_entropy,
            (z, y / y.sum(1, keepdim=True)),
        ),
        "softmax cross-entropy of classes": (
            package.softmax_cross_entropy_cost,
            F.cross_entropy,
            (z, torch.tensor([0, 3, 1])),
        ),
    }


def derivatives(call: Callable[..., Tensor], arguments: Any) -> list[Tensor]:
    """Of first and of second order."""
    wanted = [t for t in arguments if t.requires_grad]
    output = call(*arguments)
    first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]
    return [output, *first, *second]


@of_layers
def values_and_derivatives(package: Any) -> None:
    for ours, theirs, arguments in pairs(package).values():
        same(derivatives(ours, arguments), derivatives(theirs, arguments))


@of_layers
def forward_mode(package: Any) -> None:
    for ours, theirs, arguments in pairs(package).values():
        tangents = []
        for call in (ours, theirs):
            with forward_ad.dual_level():
                first = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
                tangents.append(forward_ad.unpack_dual(call(first, *arguments[1:])).tangent)
        same(*tangents)


@of_layers
def transforms(package: Any) -> None:
    def transformed(net: Any) -> list[Any]:
        def total(x: Tensor) -> Tensor:
            return net(x).square().sum()  # type: ignore[no-any-return]

        x, v = (torch.linspace(0, n, 6, dtype=torch.float64).reshape(2, 3) for n in (1, 2))
        return [
            vmap(net)(x),
            func_grad(total)(x),
            vmap(func_grad(total))(x),
            jvp(net, (x,), (v,))[1],
            hessian(total)(x),
            jacfwd(jacfwd(total))(x),
            functionalize(func_grad(total))(x),
        ]

    for ours, theirs in zip(*map(transformed, networks(package)), strict=True):
        same(ours, theirs)


@of_layers
def fused_under_transforms(package: Any) -> None:
    _, theirs, (a, w, b) = pairs(package)["linear_sigmoid"]

    def transformed(call: Any) -> Any:
        def total(a: Tensor) -> Tensor:
            return call(a, w, b).square().sum()  # type: ignore[no-any-return]

        return [vmap(func_grad(total))(a), hessian(total)(a), functionalize(func_grad(total))(a)]

    same(transformed(package.linear_sigmoid), transformed(theirs))


@of_layers
def batched_gradients(package: Any) -> None:
    for ours, theirs, arguments in pairs(package).values():
        found = []
        for call in (ours, theirs):
            output = call(*arguments)
            upstream = torch.stack([torch.ones_like(output), 2 * torch.ones_like(output)])
            found += torch.autograd.grad(output, arguments[0], upstream, is_grads_batched=True)
        same(*found)


@of_layers
def under_autocast(package: Any) -> None:
    x = torch.randn(5, 3)
    found = []
    for net in networks(package):
        net.float()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        output.float().square().sum().backward()
        found.append([output, *gradients(net)])
    assert found[0][0].dtype is torch.bfloat16
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-3)


@of_layers
def in_place(package: Any) -> None:
    z = leaf(3, 4)
    for name in ("relu", "leaky_relu"):
        found = []
        for call in (getattr(package, name), getattr(F, name)):
            a = call(z * 1, inplace=True)
            found.append([a, *torch.autograd.grad(a.square().sum(), z)])
        same(*found)
        with torch.no_grad():
            a = z.clone()
            getattr(package, name)(a, inplace=True)
            same(a, getattr(F, name)(z))
        tangents = [
            jvp(lambda z, c=call: c(z * 1, inplace=True), (z,), (torch.ones_like(z),))[1]
            for call in (getattr(package, name), getattr(F, name))
        ]
        same(*tangents)


@of_layers
def outputs_changed_in_place(package: Any) -> None:
    for name in ("linear", "linear of three dimensions"):
        ours, theirs, arguments = pairs(package)[name]
        same(*(
            torch.autograd.grad(call(*arguments).mul_(2).square().sum(), arguments)
            for call in (ours, theirs)
        ))  # fmt: skip
    changed = package.sigmoid(leaf(3)).mul_(2)
    refuses(changed.sum().backward, "modified by an inplace operation")


@of_layers
def checkpoints(package: Any) -> None:
    x = torch.randn(2, 2, 3, dtype=torch.float64)

    def keep_products(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(keep_products)

    for options in (
        {"use_reentrant": False},
        {"use_reentrant": True},
        {"use_reentrant": False, "context_fn": contexts},
    ):
        ours, theirs = networks(package)
        fused = nn.Sequential(package.LinearSigmoid(3, 4), package.Linear(4, 2)).double()
        fused.load_state_dict({
            key.replace("2.", "1."): value for key, value in theirs.state_dict().items()
        })  # fmt: skip
        for net in (ours, theirs, fused):
            checkpoint(net, x.clone().requires_grad_(), **options).square().sum().backward()
        same(gradients(ours), gradients(theirs))
        same(gradients(fused), gradients(theirs))


@of_layers
def jit_trace(package: Any) -> None:
    ours, theirs = networks(package)
    x = torch.randn(2, 3, dtype=torch.float64)
    traced = torch.jit.trace(ours, (x,))
    torch.jit.save(traced, io.BytesIO())
    traced(x).sum().backward()
    theirs(x).sum().backward()
    same(gradients(ours), gradients(theirs))


@of_layers
def overridden_functions(package: Any) -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func.__name__

    ones = torch.ones(2, 3)
    assert package.linear(ones, ones.as_subclass(Loud)) == "linear"
    refuses(lambda: package.sigmoid(torch.ones(2).to_sparse()), "must be a dense tensor")


@of_layers
def buffers_and_missing_biases(package: Any) -> None:
    ours, theirs = package.Linear(3, 2, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, dtype=torch.float64)
    same(ours(x), theirs(x))
    weight = ours.weight.detach()
    del ours.weight
    ours.register_buffer("weight", weight)
    same(ours(x), theirs(x))


def summed(trace: Any) -> list[Tensor | None]:
    """∂C/∂w and ∂C/∂b of each layer."""
    return [grad for layer in trace for grad in (layer.grad_w, layer.grad_b)]


@of_others
def explicit_backprop(package: Any) -> None:
    ours, theirs = networks(package)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    trace = package.backprop(ours, x, y, package.QuadraticCost())
    loss(theirs(x), y).backward()
    same(summed(trace), gradients(theirs))


@of_others
def backprop_past_hooks(package: Any) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for register in (
        lambda net: net[1].register_forward_hook(lambda *_: None),
        lambda net: net[1].register_forward_pre_hook(lambda *_: None),
        lambda net: net[1].register_full_backward_hook(lambda *_: None),
        lambda net: net[1].register_full_backward_pre_hook(lambda *_: None),
        lambda net: net[0].weight.register_hook(lambda g: 2 * g),
        lambda net: net[0].weight.register_post_accumulate_grad_hook(lambda _: None),
    ):
        ours, _ = networks(package)
        register(ours)
        refuses(
            lambda net=ours: package.backprop(net, x, y, package.QuadraticCost()),  # type: ignore[misc]
            "must have no hooks",
        )


@of_others
def trace_changed_since(package: Any) -> None:
    ours, _ = networks(package)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    trace = package.backprop(ours, x, y, package.QuadraticCost())
    trace.layers[0].delta.zero_()
    refuses(trace.per_sample_norms, "must still be those of the pass")


def per_sample(net: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """Each sample's own gradient, by autograd."""
    rows = [
        torch.autograd.grad(loss(net(a[None]), b[None]), list(net.parameters()))
        for a, b in zip(x, y, strict=True)
    ]
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


def clipped(grads: list[Tensor], most: float) -> list[Tensor]:
    norms = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)
    factors = (most / norms).clamp(max=1) / len(norms)
    return [torch.einsum("n,n...->...", factors, g) for g in grads]


@of_others
def recorded_gradients(package: Any) -> None:
    for shape in ((5, 3), (5, 2, 3)):
        for net in networks(package):
            x, y = torch.randn(shape, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
            if x.ndim == 3:
                y = y[:, None].expand(5, 2, 2)
            with package.record(net) as trace:
                loss(net(x), y).backward()
            expected = per_sample(net, x, y)
            found = trace.per_sample_grads()
            same([found[name] for name, _ in net.named_parameters()], expected)
            found = trace.clipped_grads(0.1)
            same([found[name] for name, _ in net.named_parameters()], clipped(expected, 0.1))
            same(summed(trace), gradients(net))
            assert trace.elsewhere == ()
            assert [str(a) for layer in trace for a in layer.activations] == ["Sigmoid()"]
            same(trace.layers[0].a, torch.sigmoid(trace.layers[0].z))


class RunsAgain(Function):
    """Runs a module in backward again, and backward() there: no graph of the pass shows it."""

    @staticmethod
    def forward(ctx: Any, module: Any, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x.detach())
        return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.Variable._execution_engine.run_backward(
                (ctx.module(x),), (grad,), False, False, (), True, True
            )
        return None, x.grad


class Hiding(nn.Module):
    def __init__(self, layer: nn.Module, hidden: nn.Module) -> None:
        super().__init__()
        self.layer, self.hidden = layer, hidden

    def forward(self, x: Tensor) -> Tensor:
        return RunsAgain.apply(self.hidden, self.layer(x))  # type: ignore[no-any-return]


@of_others
def gradients_from_elsewhere(package: Any) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    normed = nn.Sequential(package.Linear(3, 4), nn.LayerNorm(4)).double()
    hiding = Hiding(package.Linear(3, 4), nn.LayerNorm(4)).double()
    for net in (normed, hiding):
        with package.record(net) as trace:
            net(x).square().sum().div(5).backward()
        assert len(trace.elsewhere) == 2
        refuses(partial(trace.clipped_grads, 1.0), "must have the whole gradient")


@of_others
def recorded_and_changed_in_place(package: Any) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for kind in (package.Linear, nn.Linear):
        for shape in ((5, 3), (5, 1, 3)):
            linear = kind(3, 2).double()
            with package.record(linear) as trace:
                z = linear(x.reshape(shape))
                loss(z.mul_(2).reshape(5, 2), y).backward()
            same(trace.layers[0].z.reshape(5, 2), F.linear(x, linear.weight, linear.bias).detach())
            same(summed(trace), gradients(linear))
            with torch.no_grad():
                linear.weight.mul_(2)
            refuses(trace.diagnostics, "must still be those of the pass")


@of_others
def training(package: Any) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    ours, theirs = networks(package)
    step = package.TrainingStep(ours, package.QuadraticCost(), 0.5, momentum=0.9)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.5, momentum=0.9)
    for number in range(4):
        if number == 2:
            for net in (ours, theirs):
                weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
                net[0].weight = weight
            step = package.TrainingStep(ours, package.QuadraticCost(), 0.5)
            optimizer = torch.optim.SGD(theirs.parameters(), 0.5)
        if number == 3:  # noticed by the same step
            for net in (ours, theirs):
                net[2].bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
            optimizer = torch.optim.SGD(theirs.parameters(), 0.5)
        optimizer.zero_grad()
        cost = loss(theirs(x), y)
        cost.backward()
        same(step(x, y), cost.detach())
        optimizer.step()
        same(list(ours.parameters()), list(theirs.parameters()))


@of_others
def training_where_it_cannot(package: Any) -> None:
    ours, _ = networks(package)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    step = package.TrainingStep(ours, package.QuadraticCost(), 0.5)
    refuses(lambda: vmap(step)(x[:, None], y[:, None]), "outside of torch.func's transforms")
    with torch.autocast("cpu"):
        refuses(lambda: step(x, y), "autocast")


@of_others
def conversion(package: Any) -> None:
    _, model = networks(package)
    x = torch.randn(5, 3, dtype=torch.float64)
    before = model(x)
    package.convert(model)
    assert [type(m) for m in model] == [package.Linear, package.Sigmoid, package.Linear]
    same(model(x), before)
    package.restore(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Sigmoid, nn.Linear]


@of_others
def fusing(package: Any) -> None:
    seen: list[Any] = []
    register: Any
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        _, model = networks(package)
        register(model[1], lambda *args: seen.append(args[1]))
        package.convert(model, fuse=True)
        assert type(model[1]) is package.Sigmoid
    for register in (
        nn.Module.register_full_backward_hook, nn.Module.register_full_backward_pre_hook,
    ):  # fmt: skip
        _, model = networks(package)
        register(model[0], lambda *_: None)
        package.convert(model, fuse=True)
        assert type(model[1]) is package.Sigmoid
    _, model = networks(package)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    package.convert(model, fuse=True)
    handle.remove()
    assert type(model[1]) is package.Sigmoid
    shared = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()).double()
    shared.append(shared[0])
    package.convert(shared, fuse=True)
    assert type(shared[0]) is package.Linear


@of_others
def verdicts(package: Any) -> None:
    verify = importlib.import_module(f"{package.__name__}.verify")

    class Cube(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * grad  # type: ignore[no-any-return]

    class Wrong(Cube):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x * grad  # type: ignore[no-any-return]

    samples = [(torch.randn(3, 2, dtype=torch.float64),)]
    options: Any = {
        "only": ["gradients_match_reference"],
        "slow": False,
        "supports": (),
    }
    assert verify.check_function(Cube, samples, lambda x: x**3, **options).ok
    assert not verify.check_function(Wrong, samples, lambda x: x**3, **options).ok


def main(hidden: Sequence[str]) -> None:
    for name in hidden:
        package = load(name)
        for question in (*LAYERS, *OTHERS):
            print(name, question.__name__, ask(question, package), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
