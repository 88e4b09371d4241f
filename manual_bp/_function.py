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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling, is_exporting
from torch.nn import Parameter
from torch.overrides import handle_torch_function

from manual_bp._torch import (
    below_modes,
    count_dispatch_modes,
    forward_ad_level,
    functorch_transforms,
    is_mapped_by_autograd,
    is_tracing,
    transforms_are_active,
)


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

    def call_elsewhere(*args: object) -> Any:
        if _wants_the_bare_forward():
            return function.forward(*args)
        return compiled.apply(*_apart(args)) if is_compiling() else function.apply(*args)

    def call(*args: object) -> Any:
        if is_compiling() or transforms_are_active() or is_tracing():
            return call_elsewhere(*args)
        return apply_eager(*args)

    return call


def _wants_the_bare_forward() -> bool:
    if is_compiling():
        return is_exporting() or transforms_are_active()
    return _no_function_can_pass() if transforms_are_active() else is_tracing()


def _no_function_can_pass() -> bool:
    """Whether a transform is active that no Function gets through.

    These are forward mode within forward mode, as in jacfwd(jacfwd(f)), and functionalize.
    """
    kinds = functorch_transforms()
    return kinds.count("Jvp") > 1 or "Functionalize" in kinds


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
    return forward_ad_level() >= 0


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
    return not is_compiling() and count_dispatch_modes() > 0


def may_write_over_what_was_made_of(t: Tensor) -> bool:
    """Whether in-place operations give the same as others: nobody differentiates or maps them."""
    return not (
        torch.is_grad_enabled()
        or is_compiling()
        or transforms_are_active()
        or _forward_ad_may_be_on()
        or is_mapped_by_autograd(t)
    )


def release_saved(ctx: Any) -> None:
    """Let go of what was saved before the backward ends, unless another is to come."""
    if not is_compiling():
        ctx.maybe_clear_saved_tensors()


def call_in_place(call: Callable[..., Tensor], z: Tensor, *options: object) -> Tensor:
    """Call `call(z, *options)`, which writes over z: its last option, inplace, is True.

    Only plain eager code lets a Function write over its input. Elsewhere its result is copied
    there; it is computed from a copy too, because PyTorch's own derivative may want z as it was.
    The bare forward writes over z itself: a functionalised copy_ has no derivative.
    """
    if (
        is_compiling() or transforms_are_active() or _forward_ad_may_be_on()
    ) and not _wants_the_bare_forward():
        return z.copy_(call(z.clone(), *options[:-1], False))
    a = call(z, *options)
    return a if torch.is_grad_enabled() else z  # without a graph, a is detached from z


def values_are_at_hand(value: Tensor) -> bool:
    """Whether a tensor has values to look at: it is neither traced, transformed nor a subclass."""
    return (
        type(value) in (Tensor, Parameter)
        and not is_compiling()
        and not transforms_are_active()
        and not is_watched()
    )
