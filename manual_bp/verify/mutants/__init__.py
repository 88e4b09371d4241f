"""Functions and modules that are wrong on purpose, by kind of mistake."""

from manual_bp.verify.mutants import (
    arguments,
    batches,
    calls,
    compiler,
    edges,
    first_order,
    layouts,
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
from manual_bp.verify.mutants._mutant import DECLARED, Mutant

__all__ = ["MUTANTS", "Mutant"]

_KINDS = (
    first_order,
    needs_input_grad,
    upstream,
    shapes,
    layouts,
    uninformative_samples,
    side_effects,
    calls,
    orders,
    batches,
    precision,
    compiler,
    edges,
    modules,
    arguments,
    operators,
)

MUTANTS: tuple[Mutant, ...] = tuple(
    mutant for kind in _KINDS for mutant in DECLARED if mutant.kind == kind.__name__
)
