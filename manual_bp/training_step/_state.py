"""What a step saves besides its network, and how that is read back."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manual_bp import _require
from manual_bp.training_step._checks import require_mapping
from manual_bp.training_step._rules import RULES, STEPS, Descent, State

_ALWAYS = ("lr", "momentum", "weight_decay", "velocities")


def saved(lr: float, descent: Descent, state: State) -> dict[str, Any]:
    """The numbers of a step, as far as they differ from their defaults, and copies of its state."""
    defaults = Descent()._asdict()
    numbers = {
        name: copy.deepcopy(value)
        for name, value in descent._asdict().items()
        if name in _ALWAYS or value != defaults[name]
    }
    rule = descent.rule
    if rule is not None:  # not the object, which torch.load would refuse
        numbers["rule"] = {"name": type(rule).__name__, "betas": rule.betas, "eps": rule.eps}
    copies = {slot: {n: t.clone() for n, t in kept.items()} for slot, kept in state.items()}
    return {"lr": lr, **numbers, **copies}


def read(state: Any, parameters: Mapping[str, Tensor]) -> tuple[Any, Descent, dict[str, Any]]:
    """The learning rate, the other numbers and the state of what `saved` returned.

    The numbers are not checked.
    """
    require_mapping("state", state)
    known = ("lr", *Descent._fields, *_slots())
    if set(_ALWAYS) - state.keys() or state.keys() - set(known):
        raise KeyError(
            f"state must have the keys {', '.join(_ALWAYS)}, and no others than "
            f"{', '.join(known)}; got {', '.join(map(str, state)) or 'none'}"
        )
    descent = {name: state[name] for name in Descent._fields if name in state}
    if "rule" in state:
        descent["rule"] = _read_rule(state["rule"])
    kept = {}
    for slot in _slots():
        if slot in state:
            require_mapping(slot, state[slot])
            kept[slot] = _copies(slot, state[slot], parameters)
    return state["lr"], Descent(**descent), kept


def _slots() -> list[str]:
    return list(dict.fromkeys(["velocities", *(s for rule in RULES.values() for s in rule.slots)]))


def _read_rule(rule: Any) -> Any:
    require_mapping("rule", rule)
    if rule.keys() != {"name", "betas", "eps"} or rule["name"] not in RULES:
        raise KeyError(
            f"rule must have the keys name, betas and eps, and a name of {', '.join(RULES)}; "
            f"got {rule}"
        )
    return RULES[rule["name"]](rule["betas"], rule["eps"])


def _copies(
    slot: str, tensors: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of saved tensors; refuse any that fits no parameter."""
    found = {}
    for name, t in tensors.items():
        place = f"{slot}[{name!r}]"
        if name not in parameters:
            raise KeyError(f"{slot}: net has no parameter {name!r}")
        _require.real(place, t)
        if slot == STEPS:
            _require.shape(place, t, (), "that of a number")
        else:
            _require.shape(place, t, parameters[name].shape, "its parameter's")
        if t.is_meta:
            raise ValueError(f"{place} must have values; got a meta tensor")
        with torch.inference_mode(False):
            found[name] = t.detach().clone()
    return found
