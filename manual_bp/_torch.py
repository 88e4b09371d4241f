"""Every private name of PyTorch that the package uses: what it is for, and what happens without it.

Each is looked up once, with a fallback. A fallback leads to the way that works everywhere and only
costs more, or to a refusal; never to a wrong number.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction


def _refuse(name: str, purpose: str) -> NoReturn:
    raise RuntimeError(
        f"torch must have the private name {name}, which manual_bp needs to {purpose}; got torch "
        f"{torch.__version__}, which has none: use a version that manual_bp supports"
    )


def _need(owner: object, name: str, purpose: str) -> Any:
    """A private attribute that nothing can replace."""
    value = getattr(owner, name, _MISSING)
    return _refuse(name, purpose) if value is _MISSING else value


_MISSING = object()
_functorch: Any = getattr(torch._C, "_functorch", None)
_pytree: Any = getattr(torch.utils, "_pytree", None)

# Private names, asked at every call because they are cheap. Should they go, the answer given here
# leads to the way that works everywhere and only costs more.
transforms_are_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
any_autocast_is_on: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# Under is_grads_batched=True, which maps backwards in a way of its own.
is_mapped_by_autograd: Callable[[Tensor], bool] = getattr(
    _functorch, "is_legacy_batchedtensor", lambda _: True
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
# Should it go, torch.jit.trace has gone with it.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)


def functorch_transforms() -> list[str]:
    """The names of the transforms of torch.func that are active, from the outermost on.

    Without it, Functions meet nested forward mode and functionalize, and PyTorch refuses.
    """
    interpreters: Any = getattr(_functorch, "get_interpreter_stack", tuple)() or ()
    return [interpreter.key().name for interpreter in interpreters]


def forward_ad_level() -> int:
    """How deep forward mode is nested; below 0 outside of it."""
    level: int = getattr(forward_ad, "_current_level", 0)
    return level


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


def tree_leaves(tree: Any) -> list[Any]:
    """All that tuples, lists, dicts and registered classes hold. Without it, refuses."""
    leaves: list[Any] = _need(_pytree, "tree_leaves", "look into nested containers")(tree)
    return leaves


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tuples, lists and dicts with other tensors. Without it, refuses."""
    return _need(_pytree, "tree_map_only", "look into nested containers")(Tensor, change, tree)


def leaf_of(node: object) -> Tensor | None:
    """The leaf whose `.grad` a node of autograd's graph adds to; None for all other nodes.

    Without the name, None for all, and `record` refuses the graph.
    """
    # A Function's context may have any attributes.
    return None if isinstance(node, BackwardCFunction) else getattr(node, "variable", None)


def node_that_made(t: Tensor) -> Any:
    """The node of autograd's graph that made a tensor, even if it was changed in place since.

    Changing a view in place gives it another node, but leaves that of its base. Without the name,
    `record` misses a layer whose output is a view that is changed in place, and says so.
    """
    base = getattr(t, "_base", None)
    return (t if base is None else base).grad_fn


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile or module.compile() made a module, whose own modules then do not show.

    Without the names, no: hooks in such a model are not called, and `record` says so.
    """
    is_wrapper = type(module).__name__ == "OptimizedModule"
    return is_wrapper or getattr(module, "_compiled_call_impl", None) is not None


_stash_object: Any = getattr(torch._C, "_stash_obj_in_tls", None)
_is_stashed: Any = getattr(torch._C, "_is_key_in_tls", None)
_stashed_object: Any = getattr(torch._C, "_get_obj_in_tls", None)
_can_carry = None not in (_stash_object, _is_stashed, _stashed_object)
_CARRIED = f"{__package__}.carried"


def carried() -> tuple[object, ...]:
    """What `carry` was given in this thread, or where the backward pass that runs here was called.

    Autograd runs passes in threads of its own: on accelerators, and where many are nested.
    """
    return _stashed_object(_CARRIED) if _can_carry and _is_stashed(_CARRIED) else ()


def carry(*objects: object) -> None:
    """Have `carried` return these, in this thread and in every backward pass called from now on."""
    if _can_carry:
        _stash_object(_CARRIED, objects)


def runs_within(token: object) -> bool:
    """Whether a token is carried here.

    Without the names, always: then what other threads bring meanwhile counts as well, which may
    refuse results, but loses none.
    """
    return not _can_carry or token in carried()


# --- For the verification kit alone.

_python_dispatch: Any = getattr(torch.utils, "_python_dispatch", None)


def seeing_operators(see: Callable[[str], object]) -> AbstractContextManager[Any]:
    """A region in which `see` gets the name of every operator that runs. Without it, refuses."""
    mode: Any = _need(_python_dispatch, "TorchDispatchMode", "count operators")

    class Seeing(mode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            see(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    return Seeing()


def expected_gradient(node: object, slot: int) -> Any:
    """The shape, dtype and device that a node of autograd's graph wants its gradient to have.

    Without it, None: the kit does not look at gradients as a backward returned them.
    """
    metadata: Any = getattr(node, "_input_metadata", None)
    return None if metadata is None else metadata[slot]
