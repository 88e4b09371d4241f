"""How one hand-written `torch.autograd.Function` is called: the cheapest way the moment allows.

PyTorch has several callers, and each wants another form of a Function:

- `torch.func` (vmap, grad, jvp, hessian ...) asks for `setup_context` apart from `forward`.
- Eager code takes that form too, but then binds the signature by `inspect` at every call: some
  16 µs, against 6 µs for a Function whose `forward` takes `ctx`. `Function.apply` then takes care
  of transforms, another 1.3 µs, where there are none: its base's `apply` does without.
- `torch.compile` refuses any Function that defines `jvp`. And what a Function saves there follows
  later changes in place, without an error: the gradients would be silently wrong. So that form
  saves copies. They cost nothing: inductor leaves out each copy of what does not change.
- `torch.jit.trace` cannot save a Function, nor trace one that works in place; a second forward mode
  within a first loses the derivatives of any Function; and `torch.func.functionalize` refuses all
  of them. All three are given the bare forward, whose derivatives are PyTorch's.
- `torch.func` inside a compiled region tells a Function the wrong `needs_input_grad` (gradients
  are then silently zero) and can neither batch it nor push it forward. `torch.export` cuts it out
  of the graph that autograd sees. Both are given the bare forward, likewise.

So each Function here is written once, in the first form; `as_callable` derives the others. For the
same reason every forward must be differentiable everywhere by PyTorch too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction
from torch.compiler import is_compiling, is_exporting
from torch.nn import Parameter
from torch.overrides import handle_torch_function

# Private names, asked at every call because they are cheap. Should they go, the answer given here
# leads to the way that works everywhere and only costs more.
transforms_are_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
any_autocast_is_on: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# Under is_grads_batched=True, which maps backwards in a way of its own.
_is_mapped_by_autograd: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda _: True
)
# Leaves autograd out of every operation inside, where no_grad only tells it to record nothing: the
# operations of a small step are so short that this is a twentieth of it.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", torch.no_grad
)
# Leaves modes like that of record out of what they need not see, each call of which takes 2 µs.
below_modes: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "DisableTorchFunction", nullcontext
)
# Of all modules, as register_module_forward_hook registers them.
has_global_hooks: Callable[[], bool] = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)
# Should these two go, what they serve goes with them: nested forward mode and functionalize, and
# torch.jit.trace.
_transforms: Callable[[], Any] = getattr(torch._C._functorch, "get_interpreter_stack", tuple)
_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)


def as_callable(function: Any) -> Callable[..., Tensor]:
    """The call of a Function written with `setup_context`, `backward` and `jvp`.

    One that has a `backward_boxed` as well is given its gradient in a list, where PyTorch can do
    that (from 2.13 on): taken out of there, nobody else holds it, and it can be deleted before the
    backward ends. Compiled autograd refuses such a Function.

    The forms are variables of the closure, because the compiler follows those and does not follow
    an attribute of a Function class.
    """
    setup_context = function.setup_context
    eager = _with_ctx_in_forward(function, setup_context, **_boxed_form(function))
    no_jvp = staticmethod(Function.jvp)
    compiled = _with_ctx_in_forward(function, _on_copies(setup_context), jvp=no_jvp)
    apply_eager = super(Function, eager).apply

    def call(*args: object) -> Any:
        if _wants_the_bare_forward():
            return function.forward(*args)
        if is_compiling():
            return compiled.apply(*_apart(args))
        return function.apply(*args) if transforms_are_active() else apply_eager(*args)

    return call


def version(t: Tensor) -> int:
    """A number that changes when the tensor is written to in place."""
    try:
        return t._version
    except RuntimeError:  # inference tensors have none
        return 0


def is_foreign(node: object) -> bool:
    """Whether a node of autograd's graph is of a Function of somebody else's, written in Python.

    Its backward may do anything, such as run a part of the model again and call backward() there.
    """
    function = getattr(type(node), "_forward_cls", Function)
    return isinstance(node, BackwardCFunction) and not function.__module__.startswith(
        f"{__package__}."
    )


def _wants_the_bare_forward() -> bool:
    if is_compiling():
        return is_exporting() or transforms_are_active()
    return _no_function_can_pass() if transforms_are_active() else _is_tracing()


def _no_function_can_pass() -> bool:
    """Whether a transform is active that no Function gets through.

    These are forward mode within forward mode, as in jacfwd(jacfwd(f)), and functionalize.
    """
    kinds = [interpreter.key() for interpreter in _transforms() or ()]
    known = torch._C._functorch.TransformType
    return kinds.count(known.Jvp) > 1 or known.Functionalize in kinds


def _apart(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, a tensor that comes twice as a view of itself: the compiler refuses twins."""
    apart: list[Any] = []
    for arg in args:
        is_twin = isinstance(arg, Tensor) and any(arg is other for other in apart)
        apart.append(arg.view_as(arg) if is_twin else arg)
    return apart


def _with_ctx_in_forward(function: Any, setup_context: Callable[..., None], **others: Any) -> Any:
    function_forward = function.forward

    def forward(ctx: Any, *args: object) -> Any:
        output = function_forward(*args)
        setup_context(ctx, args, output)
        return output

    form = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(Function.setup_context),
    }
    return type(function.__name__, (function,), form | others)


def _boxed_form(function: Any) -> dict[str, Any]:
    if hasattr(function, "backward_boxed") and hasattr(Function, "boxed_grads_call"):
        return {"backward": staticmethod(function.backward_boxed), "boxed_grads_call": True}
    return {}


def _on_copies(setup_context: Callable[..., None]) -> Callable[..., None]:
    def setup_context_on_copies(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
        setup_context(ctx, tuple(_copy(arg) for arg in args), output.clone())

    return setup_context_on_copies


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def save_for_forward(ctx: Any, *tensors: Tensor) -> bool:
    """`ctx.save_for_forward`, but only where forward-mode AD may ask for it: it takes 0.3 µs.

    Returns whether it may. Then the backward must save the same, needed or not: under vmap PyTorch
    keeps one list of batch dimensions for the two.
    """
    may_be_on = _forward_ad_may_be_on()
    if may_be_on:
        ctx.save_for_forward(*tensors)
    return may_be_on


def _forward_ad_may_be_on() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


def hand_over(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a public function as an argument's `__torch_function__`, or a mode, wants it called.

    So do FX's proxies record the call as one step of their graph, and subclasses of Tensor have
    their say, just as with PyTorch's own functions.
    """
    result: Tensor = handle_torch_function(function, args, *args)
    return result


def is_nested(value: object) -> bool:
    """Whether it is a nested tensor, asked so that no `__torch_function__` hears of it."""
    if not isinstance(value, Tensor):
        return False
    with below_modes():
        return value.is_nested


def is_watched() -> bool:
    """Whether somebody sees each operation that runs, and may keep what it gave.

    Checkpointing by a policy does: what it keeps must not be written over behind its back.
    """
    return not is_compiling() and _count_dispatch_modes() > 0


def may_write_over_what_was_made_of(t: Tensor) -> bool:
    """Whether in-place operations give the same as others: nobody differentiates or maps them."""
    return not (
        torch.is_grad_enabled()
        or is_compiling()
        or transforms_are_active()
        or _forward_ad_may_be_on()
        or _is_mapped_by_autograd(t)
    )


def release_saved(ctx: Any) -> None:
    """Let go of what was saved before the backward ends, unless another is to come."""
    if not is_compiling():
        ctx.maybe_clear_saved_tensors()


def in_place(call: Callable[..., Tensor], z: Tensor, *options: object) -> Tensor:
    """Call `call(z, *options, True)`, which writes over z; or do what amounts to the same.

    Only plain eager code lets a Function write over its input. Elsewhere its result is copied
    there; it is computed from a copy too, because PyTorch's own derivative may want z as it was.
    The bare forward writes over z itself: a functionalised copy_ has no derivative.
    """
    if not _wants_the_bare_forward() and (
        is_compiling() or transforms_are_active() or _forward_ad_may_be_on()
    ):
        return z.copy_(call(z.clone(), *options, False))
    a = call(z, *options, True)
    return a if torch.is_grad_enabled() else z  # without a graph, a is detached from z


def values_are_at_hand(value: Tensor) -> bool:
    """Whether a tensor has values to look at: it is neither traced, transformed nor a subclass."""
    return (
        type(value) in (Tensor, Parameter)
        and not is_compiling()
        and not transforms_are_active()
        and not is_watched()
    )


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region hands them to a matrix product; unchanged outside of one.

    The cast must stand before the Function, as a step of its own: a backward runs outside the
    region, so a Function that cast inside would meet gradients of another dtype than it saved.
    """
    return _cast(tensors, torch.get_autocast_dtype) if any_autocast_is_on() else tensors


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    # Asked once for each graph, since the compiler of PyTorch 2.11 cannot trace it.
    return torch.amp.is_autocast_available(device_type)


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A region in which the products of such tensors are what their dtype says."""
    device_type = t.device.type
    if any_autocast_is_on() and _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_to_float32(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autocast region hands them to a loss: in float32; unchanged outside."""
    return _cast(tensors, lambda _: torch.float32) if any_autocast_is_on() else tensors


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
        and _has_autocast(tensor.device.type)
        and torch.is_autocast_enabled(tensor.device.type)
    )
