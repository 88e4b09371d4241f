"""Functions and modules that are wrong on purpose, by kind of mistake, and their right twins."""

from manual_bp.verify.mutants import (
    aliases,
    arguments,
    batches,
    bias,
    caches,
    calls,
    compiler,
    edges,
    far_out,
    first_order,
    global_state,
    graphs,
    layouts,
    module_state,
    modules,
    needs_input_grad,
    operators,
    orders,
    precision,
    shapes,
    side_effects,
    uninformative_samples,
    upstream,
)
from manual_bp.verify.mutants._mutant import DECLARED, DECLARED_TWINS, Mutant, Twin

__all__ = ["MUTANTS", "TWINS", "Mutant", "Twin"]

_KINDS = (
    first_order,
    needs_input_grad,
    upstream,
    shapes,
    layouts,
    uninformative_samples,
    side_effects,
    global_state,
    aliases,
    calls,
    caches,
    graphs,
    orders,
    batches,
    precision,
    bias,
    compiler,
    edges,
    far_out,
    modules,
    module_state,
    arguments,
    operators,
)

MUTANTS: tuple[Mutant, ...] = tuple(
    mutant for kind in _KINDS for mutant in DECLARED if mutant.kind == kind.__name__
)
TWINS: tuple[Twin, ...] = tuple(
    twin for kind in _KINDS for twin in DECLARED_TWINS if twin.kind == kind.__name__
)
