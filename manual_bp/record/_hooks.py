"""Forward hooks that are in a module while a block lasts, and in no copy of the module.

Copies and pickles are made from a module's state. While a hook is there, the module has a
`__getstate__` that leaves it out. If a class copies its modules in another way, the copy of a hook
does nothing.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from manual_bp._torch import forward_hooks, without_forward_hooks

_lock = threading.Lock()


class Hook:
    """A forward hook, or the copy of one, which does nothing.

    Args:
        see: Called with the module, its arguments, its keyword arguments and its output; or
            without the third, in another thread, while the hook is being added or removed.
    """

    def __init__(self, see: Callable[..., None] | None) -> None:
        self.see = see

    def __call__(self, *call: Any) -> None:
        if self.see is not None and not is_compiling():
            self.see(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)

    def add(self, module: nn.Module, *, prepend: bool) -> Callable[[], None]:
        """Put the hook into a module; returns the call that removes it."""
        with _lock:  # else PyTorch may give the hooks of two threads one number, and lose one
            handle = module.register_forward_hook(self, prepend=prepend, with_kwargs=True)
        own = vars(module)
        # copy and pickle look for both on the object before its class. A class that defines the
        # second (parametrized modules do) is not asked for its state.
        own["__getstate__"] = partial(_state, module)
        if hasattr(type(module), "__deepcopy__"):
            own["__deepcopy__"] = partial(_deepcopy, module)

        def remove() -> None:
            handle.remove()
            if not any(isinstance(hook, Hook) for hook in list(forward_hooks(module).values())):
                own.pop("__getstate__", None)
                own.pop("__deepcopy__", None)

        return remove


def _state(module: Any) -> Any:
    kind: Any = type(module)
    state = kind.__getstate__(module)
    return _without_hooks(state) if isinstance(state, dict) else state


def _deepcopy(module: Any, memo: Any) -> Any:
    copied = type(module).__deepcopy__(module, memo)
    if copied is not module and isinstance(copied, nn.Module):
        copied.__dict__ = _without_hooks(vars(copied))
    return copied


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module as they are outside the block."""
    kept = {k: v for k, v in state.items() if k not in ("__getstate__", "__deepcopy__")}
    return without_forward_hooks(kept, lambda hook: isinstance(hook, Hook))
