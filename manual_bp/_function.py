"""How a hand-written `torch.autograd.Function` is called: in the cheapest form that works.

PyTorch calls Functions in several ways, and each needs a different form:

- `torch.func` (vmap, grad, jvp, hessian ...) needs `setup_context` separate from `forward`.
- Eager code accepts that form too, but then binds the signature with `inspect` at every call: some
  16 µs, against 6 µs for a Function whose `forward` takes `ctx`. `Function.apply` also checks for
  transforms, for another 1.3 µs; where there are none, the `apply` of its base class is enough.
- `torch.compile` refuses a Function that defines `jvp`. And it does not notice when a tensor that a
  Function saved is changed in place later: the gradients would be silently wrong. So that form
  saves copies. They cost nothing: inductor removes the copy of anything that does not change.
- `torch.jit.trace` can neither save a Function nor trace one that works in place; forward mode
  within forward mode loses the derivatives of any Function; and `torch.func.functionalize` refuses
  them all. These three get the bare forward, which PyTorch differentiates.
- `torch.func` inside a compiled region gives a Function the wrong `needs_input_grad` (gradients
  are then silently zero), and supports neither its vmap nor its jvp. `torch.export` cuts it out
  of autograd's graph. Both get the bare forward too.

So each Function here is written once, in the first form, and `as_callable` derives the others. For
the same reason, PyTorch must be able to differentiate every forward everywhere.
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

    If it has a `backward_boxed` as well, that gets its gradient in a list, where PyTorch supports
    this (2.13 and later). Once the gradient is taken out of the list, nothing else holds it, so it
    can be freed before the backward ends. Compiled autograd refuses such a Function.

    The forms are variables of the closure, because the compiler can follow those but not an
    attribute of a Function class.
    """
    setup_context = function.setup_context
    eager = _with_ctx_in_forward(function, setup_context, **_boxed_form(function))
    no_jvp = staticmethod(Function.jvp)
    compiled = _with_ctx_in_forward(function, _on_copies(setup_context), jvp=no_jvp)
    apply_eager = super(Function, eager).apply

    def call(*args: object) -> Any:
        if not (is_compiling() or transforms_are_active() or is_tracing()):
            return apply_eager(*args)
        if _needs_bare_forward():
            return function.forward(*args)
        return compiled.apply(*_repeats_as_views(args)) if is_compiling() else function.apply(*args)

    return call


def _needs_bare_forward() -> bool:
    if is_compiling():
        return is_exporting() or transforms_are_active()
    return _a_transform_refuses_functions() if transforms_are_active() else is_tracing()


def _a_transform_refuses_functions() -> bool:
    """Whether an active transform does not support Functions.

    Two do not: forward mode within forward mode, as in jacfwd(jacfwd(f)), and functionalize.
    """
    kinds = functorch_transforms()
    return kinds.count("Jvp") > 1 or "Functionalize" in kinds


def _repeats_as_views(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, with a view for each repeated tensor: the compiler refuses one given twice."""
    distinct: list[Any] = []
    for arg in args:
        is_repeat = isinstance(arg, Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if is_repeat else arg)
    return distinct


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


def save_for_forward_ad(ctx: Any, *tensors: Tensor) -> bool:
    """`ctx.save_for_forward`, but only where forward-mode AD may be on: it takes 0.3 µs.

    Returns whether it may be. If so, the backward must save the same tensors, needed or not: under
    vmap, PyTorch keeps one list of batch dimensions for both.
    """
    may_be_on = _forward_ad_may_be_on()
    if may_be_on:
        ctx.save_for_forward(*tensors)
    return may_be_on


def _forward_ad_may_be_on() -> bool:
    return forward_ad_level() >= 0


def hand_over(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a public function through the `__torch_function__` of an argument or of a mode.

    In this way FX's proxies record the call as one step of their graph, and subclasses of Tensor
    can override it, just as for PyTorch's own functions.
    """
    result: Tensor = handle_torch_function(function, args, *args)
    return result


def is_nested(value: object) -> bool:
    """Whether it is a nested tensor, asked without calling any `__torch_function__`."""
    if not isinstance(value, Tensor):
        return False
    with below_modes():
        return value.is_nested


def is_watched() -> bool:
    """Whether a TorchDispatchMode sees each operation, and may keep its result.

    Checkpointing with a policy does so. What it keeps must not be overwritten.
    """
    return not is_compiling() and count_dispatch_modes() > 0


def may_overwrite_results_of(t: Tensor) -> bool:
    """Whether results computed from t may be changed in place: nothing differentiates them."""
    return not (
        torch.is_grad_enabled()
        or is_compiling()
        or transforms_are_active()
        or _forward_ad_may_be_on()
        or is_mapped_by_autograd(t)
    )


def release_saved(ctx: Any) -> None:
    """Free the saved tensors before the backward ends, unless the graph is retained."""
    if not is_compiling():
        ctx.maybe_clear_saved_tensors()


def call_in_place(call: Callable[..., Tensor], z: Tensor, *options: object) -> Tensor:
    """Call `call(z, *options)`, which overwrites z since its last option, inplace, is True.

    Only plain eager code lets a Function overwrite its input. Elsewhere, the result is copied into
    z. It is computed from a copy of z, because PyTorch's own derivative may need the old z. The
    bare forward overwrites z itself: a functionalised copy_ has no derivative.
    """
    if (
        is_compiling() or transforms_are_active() or _forward_ad_may_be_on()
    ) and not _needs_bare_forward():
        return z.copy_(call(z.clone(), *options[:-1], False))
    a = call(z, *options)
    return a if torch.is_grad_enabled() else z  # without a graph, a is detached from z


def has_concrete_values(value: Tensor) -> bool:
    """Whether a tensor's values can be read: it is neither traced, transformed nor a subclass."""
    return (
        type(value) in (Tensor, Parameter)
        and not is_compiling()
        and not transforms_are_active()
        and not is_watched()
    )
