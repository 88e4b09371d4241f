"""What the tests of record share: models, one pass, and what its trace must agree with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manual_bp import (
    LayerTrace,
    Trace,
    convert,
    record,
)
from tests.helpers import assert_same

FIELDS = ("a_prev", "z", "a", "delta", "grad_w", "grad_b")


def of(layer: LayerTrace) -> list[Tensor]:
    """Everything that a layer's trace holds, if nothing is frozen."""
    return [getattr(layer, name) for name in FIELDS]


def recorded(
    model: nn.Module,
    x: Tensor,
    cost_of: Callable[[Any], Tensor] = lambda output: output.square().sum(-1).mean(),
    **options: Any,
) -> Trace:
    """The trace of one pass; `.grad` is that of this pass alone."""
    model.zero_grad()
    with record(model, **options) as trace:
        cost_of(model(x)).backward()
    return trace


def assert_gradients_are_those_of_autograd(trace: Trace, rtol: float = 1e-10) -> None:
    """BP3 and BP4 of the pairs give what backward() left in `.grad`."""
    found: dict[Tensor, Tensor] = {}
    for layer in trace.layers:
        for parameter, grad in ((layer.w, layer.grad_w), (layer.b, layer.grad_b)):
            if parameter is not None and grad is not None:
                found[parameter] = found[parameter] + grad if parameter in found else grad
    assert found
    for parameter, grad in found.items():
        assert parameter.grad is not None
        assert grad.dtype is parameter.dtype
        assert_same([grad], [parameter.grad], rtol=rtol)


def assert_per_sample_follows(trace: Trace) -> None:
    """The mean over samples of every gradient is what backward() left in `.grad`."""
    grads = trace.per_sample_grads()
    assert grads
    for parameter, name in trace.parameter_names.items():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_same([grads[name].mean(0)], [parameter.grad])


def net_of(*modules: nn.Module, device: torch.device | None = None) -> nn.Sequential:
    return nn.Sequential(*modules).to(device, torch.float64)


def cost(output: Tensor) -> Tensor:
    return output.square().sum(-1).mean()


def samples(n: int = 5, components: int = 4) -> Tensor:
    return torch.randn(n, components, dtype=torch.float64)


def assert_same_traces(one: Trace, other: Trace) -> None:
    assert [layer.name for layer in one] == [layer.name for layer in other]
    assert one.missed == other.missed
    assert one.elsewhere == other.elsewhere
    for this, that in zip(one, other, strict=True):
        for name in ("a_prev", "z", "a", "delta"):
            assert_same([getattr(this, name)], [getattr(that, name)])
    assert_same([one.output, one.cost], [other.output, other.cost])


def two(layer: nn.Module) -> nn.Sequential:
    return net_of(layer, nn.Sigmoid(), nn.Linear(3, 2))


def converted(model: nn.Sequential, fuse: bool = False) -> nn.Sequential:
    convert(model, fuse=fuse)
    return model


class Named(nn.Linear):
    """A subclass that convert joins with ours."""


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.use_reentrant = body, nn.Linear(3, 2), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        return self.head(h)  # type: ignore[no-any-return]


class Doing(nn.Module):
    """A linear layer, and what is done with its z."""

    def __init__(self, layer: nn.Module, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.does = layer, does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.fc(x))


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("none left")


class RunsAgain(torch.autograd.Function):
    """Keeps only its input, and runs a block again in backward, in one of several ways."""

    @staticmethod
    def forward(ctx: Any, block: Any, how: str, x: Tensor) -> Tensor:
        ctx.block, ctx.how = block, how
        ctx.save_for_backward(x.detach())
        return block(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        if ctx.how == "backward":
            torch.autograd.backward(y, grad)
        elif ctx.how == "method":
            y.backward(grad)
        elif ctx.how == "engine":  # which no mode intercepts
            options = (False, False, (), True, True)
            torch.autograd.Variable._execution_engine.run_backward((y,), (grad,), *options)
        else:
            parameters = list(ctx.block.parameters())
            x.grad, *grads = torch.autograd.grad(y, [x, *parameters], grad)
            for parameter, found in zip(parameters, grads, strict=True):
                parameter.grad = found if parameter.grad is None else parameter.grad + found
        return None, None, x.grad


class WithHidden(nn.Module):
    """A block whose gradients come from a backward within backward."""

    def __init__(self, *modules: nn.Module, how: str = "backward") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block, self.how = nn.Sequential(*modules), how
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = RunsAgain.apply(self.block, self.how, h) if self.how else self.block(h)
        return self.head(h)  # type: ignore[no-any-return]
