"""Which activation of ours a function computes."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from manual_bp.layers._activation import ACTIVATIONS, Activation
from manual_bp.layers._formula import copy_as


def functions_of_activations() -> dict[Callable[..., Any], type[Activation]]:
    """Every function that computes an activation, PyTorch's or ours, in place or not."""
    return {function: kind for kind in ACTIVATIONS for function in kind.functions}


def activation_of(kind: Any, options: Sequence[Any], named: Mapping[str, Any]) -> Activation | None:
    """The activation with these options, as a module of ours that does not work in place.

    None for options that ours does not have, or that are neither numbers nor strings.
    """
    if all(isinstance(option, int | float | str) for option in (*options, *named.values())):
        return _module(kind, tuple(options), tuple(named.items()))
    return None


@lru_cache
def _module(
    kind: Any, options: tuple[float | str, ...], named: tuple[tuple[str, float | str], ...]
) -> Activation | None:
    # One for all calls: it has no state, and making a module takes longer than a call of it.
    try:
        return cast("Activation", copy_as(kind, kind(*options, **dict(named))))
    except (TypeError, ValueError):
        return None
