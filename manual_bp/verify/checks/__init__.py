"""The checks. `CHECKS` lists them in the order in which they run."""

from manual_bp.verify._check import Check
from manual_bp.verify.checks import (
    aliases,
    batches,
    bias,
    calls,
    compiler,
    cost,
    edges,
    first_order,
    forward_mode,
    global_state,
    graphs,
    layouts,
    module_state,
    modules,
    operators,
    orders,
    precision,
    preconditions,
    shapes,
    side_effects,
    upstream,
)

_FILES = (
    preconditions,
    global_state,
    first_order,
    layouts,
    cost,
    upstream,
    shapes,
    side_effects,
    aliases,
    calls,
    graphs,
    orders,
    forward_mode,
    batches,
    precision,
    bias,
    compiler,
    edges,
    modules,
    module_state,
    operators,
)

CHECKS: tuple[Check, ...] = tuple(
    value for file in _FILES for value in vars(file).values() if isinstance(value, Check)
)
CAPABILITIES = frozenset(check.name for check in CHECKS if check.capability)
"""What a case may declare in `supports`: the names of the checks that need not pass otherwise."""
