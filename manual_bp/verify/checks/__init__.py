"""The checks, each a function of its own, by the question they ask; `CHECKS` is the list of them.

A check compares through its bench, raises a `Mismatch` for what is wrong and `NotApplicable` where
it has nothing to compare. Any other exception is the case's own: a refusal, if the check is of a
capability that nobody declared, else a failure.
"""

from collections.abc import Callable
from dataclasses import dataclass

from manual_bp.verify._bench import Bench
from manual_bp.verify.checks.batches import per_sample_gradients, vmap
from manual_bp.verify.checks.compiler import compile_dynamic, compiled, export
from manual_bp.verify.checks.edges import at_zero, device_parity, infinite_values, large_values
from manual_bp.verify.checks.first_order import (
    argument_layouts,
    finite_differences,
    forward_matches_reference,
    frugal,
    gradients_match_reference,
    requires_grad_subsets,
    telling_samples,
)
from manual_bp.verify.checks.manners import (
    deterministic,
    interleaved_calls,
    no_leak,
    raw_backward,
    repeatable_backward,
    saves_nothing_on_ctx,
    stale_inputs_raise,
    tied_inputs,
    writes_nothing,
)
from manual_bp.verify.checks.modules import (
    deepcopied,
    factory_kwargs,
    frozen_parameters,
    pickled,
    state_dict,
    to_dtype,
    train_eval,
)
from manual_bp.verify.checks.orders import (
    double_backward,
    forward_ad,
    forward_over_reverse,
    third_order,
)
from manual_bp.verify.checks.precision import autocast, bfloat16, float16, float32
from manual_bp.verify.checks.shapes import no_rows, one_dimensional, one_row, three_dimensional
from manual_bp.verify.checks.upstream import (
    linear_in_upstream,
    upstream_layouts,
    upstream_undefined,
)


@dataclass(frozen=True)
class Check:
    """A check by its name.

    A capability must work only where it was declared; elsewhere a refusal is no failure, a wrong
    answer is. What is no matter of right and wrong fails only where it was declared.
    """

    name: str
    run: Callable[[Bench], None]
    is_capability: bool = False
    only_if_declared: bool = False
    is_slow: bool = False
    is_for_modules: bool = False


CHECKS: tuple[Check, ...] = (
    Check("telling_samples", telling_samples),
    Check("deterministic", deterministic),
    Check("forward_matches_reference", forward_matches_reference),
    Check("argument_layouts", argument_layouts),
    Check("finite_differences", finite_differences),
    Check("gradients_match_reference", gradients_match_reference),
    Check("requires_grad_subsets", requires_grad_subsets),
    Check("frugal", frugal, is_capability=True, only_if_declared=True),
    Check("upstream_layouts", upstream_layouts),
    Check("upstream_undefined", upstream_undefined),
    Check("linear_in_upstream", linear_in_upstream),
    Check("no_rows", no_rows, is_capability=True),
    Check("one_row", one_row, is_capability=True),
    Check("one_dimensional", one_dimensional, is_capability=True),
    Check("three_dimensional", three_dimensional, is_capability=True),
    Check("raw_backward", raw_backward),
    Check("writes_nothing", writes_nothing),
    Check("saves_nothing_on_ctx", saves_nothing_on_ctx),
    Check("stale_inputs_raise", stale_inputs_raise),
    Check("no_leak", no_leak),
    Check("repeatable_backward", repeatable_backward),
    Check("interleaved_calls", interleaved_calls),
    Check("tied_inputs", tied_inputs),
    Check("double_backward", double_backward, is_capability=True),
    Check("third_order", third_order, is_capability=True),
    Check("forward_ad", forward_ad, is_capability=True),
    Check("forward_over_reverse", forward_over_reverse, is_capability=True),
    Check("vmap", vmap, is_capability=True),
    Check("per_sample_gradients", per_sample_gradients, is_capability=True),
    Check("float32", float32, is_capability=True),
    Check("bfloat16", bfloat16, is_capability=True),
    Check("float16", float16, is_capability=True),
    Check("autocast", autocast, is_capability=True),
    Check("compile", compiled, is_capability=True, is_slow=True),
    Check("compile_dynamic", compile_dynamic, is_capability=True, is_slow=True),
    Check("export", export, is_capability=True, is_slow=True),
    Check("at_zero", at_zero),
    Check("large_values", large_values),
    Check("infinite_values", infinite_values, is_capability=True, only_if_declared=True),
    Check("device_parity", device_parity),
    Check("state_dict", state_dict, is_for_modules=True),
    Check("pickle", pickled, is_for_modules=True),
    Check("deepcopy", deepcopied, is_for_modules=True),
    Check("to_dtype", to_dtype, is_for_modules=True),
    Check("factory_kwargs", factory_kwargs, is_capability=True, is_for_modules=True),
    Check("frozen_parameters", frozen_parameters, is_for_modules=True),
    Check("train_eval", train_eval, is_for_modules=True),
)
