"""How one hand-written `torch.autograd.Function` is called: the cheapest way the moment allows.

PyTorch has several callers, and each wants another form of a Function:

- `torch.func` (vmap, grad, jvp, hessian ...) asks for `setup_context` apart from `forward`.
- Eager code takes that form too, but then binds the signature by `inspect` at every call: some
  16 µs, against 6 µs for a Function whose `forward` takes `ctx`.
- `torch.compile` refuses any Function that defines `jvp`.
- `torch.func` inside a compiled region tells a Function the wrong `needs_input_grad` (gradients
  are then silently zero) and can neither batch it nor push it forward. `torch.export` cuts it out
  of the graph that autograd sees. Both are given the bare forward, whose derivatives are PyTorch's.

So each Function here is written once, in the first form; `as_callable` derives the others. For the
same reason every forward must be differentiable everywhere by PyTorch too.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

# Two private names, asked at every call because they are cheap. Should they go, the answer "yes"
# leads to the way that works everywhere and only costs more.
_transforms_are_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
_any_autocast_is_on: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: True
)


def as_callable(function: Any) -> Callable[..., Tensor]:
    """The call of a Function written with `setup_context`, `backward` and `jvp`.

    The forms are variables of the closure, because the compiler follows those and does not follow
    an attribute of a Function class.
    """
    eager = _with_ctx_in_forward(function)
    compiled = _without_jvp(function)

    def call(*args: object) -> Any:
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() or _transforms_are_active():
                return function.forward(*args)
            return compiled.apply(*_apart(args))
        if _transforms_are_active():
            return function.apply(*args)
        return eager.apply(*args)

    return call


def _apart(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, a tensor that comes twice as a view of itself: the compiler refuses twins."""
    apart: list[Any] = []
    for arg in args:
        is_twin = isinstance(arg, Tensor) and any(arg is other for other in apart)
        apart.append(arg.view_as(arg) if is_twin else arg)
    return apart


def _with_ctx_in_forward(function: Any) -> Any:
    def forward(ctx: Any, *args: object) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    form = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(Function.setup_context),
    }
    return type(function.__name__, (function,), form)


def _without_jvp(function: Any) -> Any:
    return type(function.__name__, (function,), {"jvp": staticmethod(Function.jvp)})


def values_are_at_hand(value: Tensor) -> bool:
    """Whether a tensor has values to look at: it is neither traced, transformed nor a subclass."""
    return (
        type(value) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and not _transforms_are_active()
    )


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region hands them to a matrix product; unchanged outside of one.

    The cast must stand before the Function, as a step of its own: a backward runs outside the
    region, so a Function that cast inside would meet gradients of another dtype than it saved.
    """
    return _cast(tensors, torch.get_autocast_dtype) if _any_autocast_is_on() else tensors


def autocast_to_float32(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region hands them to a loss: in float32; unchanged outside."""
    return _cast(tensors, lambda _: torch.float32) if _any_autocast_is_on() else tensors


def _cast(
    tensors: tuple[Tensor | None, ...], dtype_for: Callable[[str], torch.dtype]
) -> tuple[Tensor | None, ...]:
    return tuple(
        tensor.to(dtype_for(tensor.device.type)) if _is_castable(tensor) else tensor
        for tensor in tensors
    )


def _is_castable(tensor: object) -> TypeGuard[Tensor]:
    # As PyTorch's own rule: float64, integers and complex numbers pass unchanged.
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and torch.amp.is_autocast_available(tensor.device.type)
        and torch.is_autocast_enabled(tensor.device.type)
    )
