"""Which linear layers a block records."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from manual_bp._torch import is_compiled
from manual_bp.layers.linear_sigmoid import LinearSigmoid

Layers = Iterable[str | type[nn.Module]]
Names = Mapping[nn.Module, str]


def linear_layers(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """The linear layers among a model's modules, with their names."""
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if is_compiled(module):
            raise TypeError(
                f"model must not be compiled, since its layers then do not show; got "
                f"{type(module).__name__} {name!r}: record the model that was compiled, or "
                f"compile it later"
            )
        if isinstance(module, nn.Linear | LinearSigmoid):
            found[module] = name
    if not found:
        raise ValueError(
            f"model must have linear layers, nn.Linear or LinearSigmoid; got "
            f"{type(modules['']).__name__}, which has none"
        )
    return found


def choose(argument: str, layers: Layers, names: Names) -> Names:
    """The linear layers that an argument chooses by name, pattern or type."""
    choices = [layers] if isinstance(layers, str | type) else list(layers)
    chosen = set()
    for choice in choices:
        fitting = [layer for layer, name in names.items() if _fits(argument, choice, layer, name)]
        if not fitting:
            known = ", ".join(repr(name) for name in names.values())
            raise ValueError(
                f"{argument} must choose linear layers of the model, {known}; got {choice!r}"
            )
        chosen.update(fitting)
    return {layer: name for layer, name in names.items() if layer in chosen}


def _fits(argument: str, choice: object, layer: nn.Module, name: str) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    if isinstance(choice, type):
        return isinstance(layer, choice)
    raise TypeError(f"{argument} must be names or types; got {type(choice).__name__}")
