"""Functions and modules that are wrong on purpose, each with the check that must find it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify._case import Case
from manual_bp.verify._make_case import function_case, module_case


@dataclass(frozen=True)
class Mutant:
    """A mistake, a case that makes it, and the check meant to find it."""

    name: str
    mistake: str
    caught_by: str
    case: Case


IN, OUT = 3, 4
_BATCH_OF_A = (0, None, None)


def _randn(g: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=dtype)


def _operands(g: Generator, *leading: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return (
        _randn(g, *leading, IN, dtype=dtype),
        _randn(g, OUT, IN, dtype=dtype),
        _randn(g, OUT, dtype=dtype),
    )


def _linear_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [_operands(g, 5)]


def _complex_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [_operands(g, 5, dtype=torch.complex128)]


def _square_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3), _randn(g, 3, 3), _randn(g, 3))]


def _stacked_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [_operands(g, 5), _operands(g, 2, 5)]


def _elementwise_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3),)]


def _pair_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3), _randn(g, 5, 3))]


def _scale_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3), _randn(g, 3))]


def _dropout_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(_randn(g, 5, 3), torch.rand(5, 3, generator=g) < 0.8, 0.2)]


def _uneven_samples(g: Generator) -> list[tuple[Any, ...]]:
    small = 0.85 + 0.05 * torch.rand(40, 2, generator=g, dtype=torch.float64)
    return [(torch.cat([torch.full((1, 2), 256.0, dtype=torch.float64), small]),)]


def _far_samples(g: Generator) -> list[tuple[Any, ...]]:
    return [(20 + _randn(g, 50, 6),)]


# Linear: wrong gradients


class _Linear(Function):
    """z = a @ w.mT + b with right gradients, plainly written."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(a, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        ctx.save_for_backward(a, w)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(0)


class _ExtraMean(_Linear):
    """∂C/∂w over N."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a / len(a), delta.sum(0)


class _MeanBias(_Linear):
    """∂C/∂b averaged."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.mean(0)


class _NoBiasGradient(_Linear):
    """∂C/∂b missing."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, None


class _FlippedSign(_Linear):
    """∂C/∂a negated."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return -delta @ w, delta.mT @ a, delta.sum(0)


class _SlightlyLarge(_Linear):
    """∂C/∂a times 1.001."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return 1.001 * (delta @ w), delta.mT @ a, delta.sum(0)


class _FirstRowOnly(_Linear):
    """∂C/∂w of one row."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta[:1].mT @ a[:1], delta.sum(0)


class _WeightNotTransposed(_Linear):
    """w for wᵀ, where the shape allows it."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        is_square = w.shape[0] == w.shape[1]
        return delta @ (w.mT if is_square else w), delta.mT @ a, delta.sum(0)


class _GradientTransposed(_Linear):
    """∂C/∂w transposed, where the shape allows it."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        is_square = w.shape[0] == w.shape[1]
        return delta @ w, a.mT @ delta if is_square else delta.mT @ a, delta.sum(0)


class _NoConjugate(_Linear):
    """∂C/∂a right, ∂C/∂w without the conjugate."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w.conj(), delta.mT @ a, delta.sum(0)


class _Float32RoundTrip(_Linear):
    """∂C/∂w by way of float32."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = (delta.float().mT @ a.float()).to(a.dtype)
        return delta @ w, grad_w, delta.sum(0)


class _NegatedBias(_Linear):
    """z = a @ w.mT - b, and the gradients of that."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(a, w, -b)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, -delta.sum(0)


_WRONG_GRADIENTS = (
    Mutant(
        "negated_bias",
        "forward subtracts b, and backward agrees with it",
        "forward_matches_reference",
        function_case(_NegatedBias, _linear_samples, F.linear),
    ),
    Mutant(
        "extra_mean",
        "dC/dw is divided by the number of rows once more",
        "gradients_match_reference",
        function_case(_ExtraMean, _linear_samples, F.linear),
    ),
    Mutant(
        "mean_bias",
        "dC/db is the mean over rows, not the sum",
        "finite_differences",
        function_case(_MeanBias, _linear_samples),
    ),
    Mutant(
        "no_bias_gradient",
        "dC/db is None though b requires a gradient",
        "gradients_match_reference",
        function_case(_NoBiasGradient, _linear_samples, F.linear),
    ),
    Mutant(
        "no_bias_gradient_unreferenced",
        "dC/db is None though b requires a gradient, and there is no reference",
        "finite_differences",
        function_case(_NoBiasGradient, _linear_samples),
    ),
    Mutant(
        "flipped_sign",
        "dC/da has the wrong sign",
        "finite_differences",
        function_case(_FlippedSign, _linear_samples),
    ),
    Mutant(
        "slightly_large",
        "dC/da is 0.1 % too large",
        "gradients_match_reference",
        function_case(_SlightlyLarge, _linear_samples, F.linear),
    ),
    Mutant(
        "slightly_large_unreferenced",
        "dC/da is 0.1 % too large, and there is no reference",
        "finite_differences",
        function_case(_SlightlyLarge, _linear_samples),
    ),
    Mutant(
        "first_row_only",
        "dC/dw keeps the first row and drops the others",
        "gradients_match_reference",
        function_case(_FirstRowOnly, _linear_samples, F.linear),
    ),
    Mutant(
        "weight_not_transposed",
        "dC/da uses w for its transpose, which a square w lets pass",
        "finite_differences",
        function_case(_WeightNotTransposed, _square_samples, F.linear),
    ),
    Mutant(
        "gradient_transposed",
        "dC/dw is transposed, which a square w lets pass",
        "gradients_match_reference",
        function_case(_GradientTransposed, _square_samples, F.linear),
    ),
    Mutant(
        "no_conjugate",
        "dC/dw lacks the conjugate of a, so complex tensors get a wrong gradient",
        "gradients_match_reference",
        function_case(_NoConjugate, _complex_samples, F.linear),
    ),
    Mutant(
        "no_conjugate_unreferenced",
        "dC/dw lacks the conjugate of a, and there is no reference",
        "finite_differences",
        function_case(_NoConjugate, _complex_samples),
    ),
    Mutant(
        "float32_round_trip",
        "dC/dw is computed in float32 and cast back to float64",
        "gradients_match_reference",
        function_case(_Float32RoundTrip, _linear_samples, F.linear),
    ),
)


# Linear: what is asked for


class _CrossedSaves(_Linear):
    """Each operand saved for its own gradient, which needs the other."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        needs_a, needs_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if needs_a else None, w if needs_w else None)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        needs_a, needs_w, needs_b = ctx.needs_input_grad
        return (
            delta @ w if needs_a else None,
            delta.mT @ a if needs_w else None,
            delta.sum(0) if needs_b else None,
        )


class _BiasAsksForWeight(_Linear):
    """needs_input_grad read one place off."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        needs_a, needs_w, _ = ctx.needs_input_grad
        return (
            delta @ w if needs_a else None,
            delta.mT @ a if needs_w else None,
            delta.sum(0) if needs_w else None,
        )


class _SavesForFrozen(_Linear):
    """Both operands saved, whatever is needed."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        needs_a, needs_w, needs_b = ctx.needs_input_grad
        return (
            delta @ w if needs_a else None,
            delta.mT @ a if needs_w else None,
            delta.sum(0) if needs_b else None,
        )


_WHAT_IS_ASKED_FOR = (
    Mutant(
        "crossed_saves",
        "a is saved when dC/da is asked for, w when dC/dw is; each needs the other",
        "requires_grad_subsets",
        function_case(_CrossedSaves, _linear_samples, F.linear),
    ),
    Mutant(
        "bias_asks_for_weight",
        "dC/db is None when w is frozen, as its needs_input_grad is read one place off",
        "requires_grad_subsets",
        function_case(_BiasAsksForWeight, _linear_samples, F.linear),
    ),
    Mutant(
        "ignores_needs",
        "needs_input_grad is ignored: everything is saved, every product computed",
        "frugal",
        function_case(_Linear, _linear_samples, F.linear, supports=("frugal",)),
    ),
    Mutant(
        "saves_for_frozen",
        "a is saved though w is frozen",
        "frugal",
        function_case(_SavesForFrozen, _linear_samples, F.linear, supports=("frugal",)),
    ),
)


# The upstream gradient


def _as_stored(t: Tensor) -> Tensor:
    last = t.storage_offset() + t.numel()
    is_readable = t.untyped_storage().nbytes() >= last * t.element_size()
    strides = torch.empty(t.shape, device="meta").stride()
    return t.as_strided(t.shape, strides) if is_readable else t


class _ReadsMemoryInOrder(_Linear):
    """delta read as though it were contiguous."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = _as_stored(delta)
        return delta @ w, delta.mT @ a, delta.sum(0)


class _ViewsUpstream(_Linear):
    """delta viewed flat."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        rows = delta.view(-1).view(delta.shape)
        return rows @ w, rows.mT @ a, rows.sum(0)


class _OneRowOfExpanded(_Linear):
    """∂C/∂b of one row, where all rows are the same memory."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_b = delta[0] if delta.stride(0) == 0 else delta.sum(0)
        return delta @ w, delta.mT @ a, grad_b


class _StumblesOverUndefined(_Linear):
    """Asks for undefined gradients and does not expect them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)


class _UndefinedAsOne(_Linear):
    """Takes an undefined gradient for 1."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        if delta is None:
            delta = a.new_ones(len(a), len(w))
        return delta @ w, delta.mT @ a, delta.sum(0)


class _ScaledByFirst(_Linear):
    """All gradients times the first component of delta."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        first = delta.flatten()[0]
        return first * (delta @ w), first * (delta.mT @ a), first * delta.sum(0)


class _ClipsUpstream(_Linear):
    """delta clipped to [-1, 1]."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = delta.clamp(-1, 1)
        return delta @ w, delta.mT @ a, delta.sum(0)


class _IgnoresUpstream(Function):
    """C = ½‖y − a‖², with the gradient of C whatever is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, y: Tensor) -> Any:
        return (a - y).square().sum() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_cost: Any) -> Any:
        del grad_cost
        a, y = ctx.saved_tensors
        return a - y, y - a


def _quadratic_cost(a: Tensor, y: Tensor) -> Tensor:
    return (a - y).square().sum() / 2


_UPSTREAM = (
    Mutant(
        "reads_memory_in_order",
        "backward reads the upstream gradient as contiguous, so a transposed one is scrambled",
        "upstream_layouts",
        function_case(_ReadsMemoryInOrder, _linear_samples, F.linear),
    ),
    Mutant(
        "views_upstream",
        "backward calls view on the upstream gradient, which fails unless it is contiguous",
        "upstream_layouts",
        function_case(_ViewsUpstream, _linear_samples, F.linear),
    ),
    Mutant(
        "one_row_of_expanded",
        "dC/db counts one row when the upstream gradient is expanded over rows",
        "upstream_layouts",
        function_case(_OneRowOfExpanded, _linear_samples, F.linear),
    ),
    Mutant(
        "stumbles_over_undefined",
        "set_materialize_grads(False), but backward cannot take None",
        "upstream_undefined",
        function_case(_StumblesOverUndefined, _linear_samples, F.linear),
    ),
    Mutant(
        "undefined_as_one",
        "an undefined upstream gradient is taken for 1, not for 0",
        "upstream_undefined",
        function_case(_UndefinedAsOne, _linear_samples, F.linear),
    ),
    Mutant(
        "scaled_by_first",
        "every gradient is multiplied by the first component of the upstream gradient",
        "linear_in_upstream",
        function_case(_ScaledByFirst, _linear_samples, F.linear),
    ),
    Mutant(
        "clips_upstream",
        "the upstream gradient is clipped to [-1, 1]",
        "linear_in_upstream",
        function_case(_ClipsUpstream, _linear_samples, F.linear),
    ),
    Mutant(
        "ignores_upstream",
        "a cost takes its upstream gradient to be 1",
        "linear_in_upstream",
        function_case(_IgnoresUpstream, _pair_samples, _quadratic_cost),
    ),
)


# Shapes


class _StacksRows(_Linear):
    """Forward row by row."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        return torch.stack([F.linear(row, w, b) for row in a])


class _MeanTimesCount(_Linear):
    """∂C/∂b as mean times count."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.mean(0) * len(delta)


class _Squeezes(_Linear):
    """∂C/∂b from a squeezed delta."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.squeeze().sum(0)


class _CorrectsForOneRow(_Linear):
    """∂C/∂w with a stray n - 1."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        others = len(delta) - 1
        return delta @ w, delta.mT @ a * others / max(others, 1), delta.sum(0)


class _SumsOneSample(_Linear):
    """∂C/∂b of a single sample, summed over its components."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = torch.outer(delta, a) if delta.ndim == 1 else delta.mT @ a
        return delta @ w, grad_w, delta.sum(0).expand(len(w))


class _FirstOfStack(_Linear):
    """∂C/∂w of the first matrix of a stack."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        return (
            delta @ w,
            grad_w if grad_w.ndim == 2 else grad_w[0],
            delta.flatten(0, -2).sum(0),
        )


class _LeadingKept(_Linear):
    """∂C/∂w and ∂C/∂b left unsummed over a stack."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(-2)


class _UnsummedBias(_Linear):
    """delta itself for ∂C/∂b."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta


class _ReturnsFloat32(_Linear):
    """∂C/∂a in float32."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return (delta @ w).float(), delta.mT @ a, delta.sum(0)


_SHAPES = (
    Mutant(
        "stacks_rows",
        "forward stacks its rows, which fails when there are none",
        "no_rows",
        function_case(
            _StacksRows, _linear_samples, F.linear, supports=("no_rows",), in_dims=_BATCH_OF_A
        ),
    ),
    Mutant(
        "mean_times_count",
        "dC/db is the mean times the number of rows: NaN for no rows",
        "no_rows",
        function_case(
            _MeanTimesCount, _linear_samples, F.linear, supports=("no_rows",), in_dims=_BATCH_OF_A
        ),
    ),
    Mutant(
        "squeezes",
        "dC/db comes from a squeezed upstream gradient, which loses a lone row",
        "one_row",
        function_case(
            _Squeezes, _linear_samples, F.linear, supports=("one_row",), in_dims=_BATCH_OF_A
        ),
    ),
    Mutant(
        "corrects_for_one_row",
        "dC/dw is zero for one row, by way of n - 1",
        "one_row",
        function_case(
            _CorrectsForOneRow,
            _linear_samples,
            F.linear,
            supports=("one_row",),
            in_dims=_BATCH_OF_A,
        ),
    ),
    Mutant(
        "sums_one_sample",
        "dC/db of one sample without rows is summed over its components",
        "one_dimensional",
        function_case(
            _SumsOneSample,
            _linear_samples,
            F.linear,
            supports=("one_dimensional",),
            in_dims=_BATCH_OF_A,
        ),
    ),
    Mutant(
        "no_one_dimensional",
        "backward fails on one sample without rows",
        "one_dimensional",
        function_case(
            _Linear, _linear_samples, F.linear, supports=("one_dimensional",), in_dims=_BATCH_OF_A
        ),
    ),
    Mutant(
        "first_of_stack",
        "dC/dw of a three-dimensional input takes the first matrix, not the sum",
        "three_dimensional",
        function_case(
            _FirstOfStack,
            _linear_samples,
            F.linear,
            supports=("three_dimensional",),
            in_dims=_BATCH_OF_A,
        ),
    ),
    Mutant(
        "leading_kept",
        "dC/dw and dC/db keep the leading dimension; the engine sums it away unasked",
        "raw_backward",
        function_case(_LeadingKept, _stacked_samples, F.linear, supports=("three_dimensional",)),
    ),
    Mutant(
        "unsummed_bias",
        "dC/db is returned with its rows; the engine sums them away unasked",
        "raw_backward",
        function_case(_UnsummedBias, _linear_samples, F.linear),
    ),
    Mutant(
        "returns_float32",
        "dC/da is returned in float32 for a float64 input",
        "raw_backward",
        function_case(_ReturnsFloat32, _linear_samples, F.linear),
    ),
)


# Strides of the arguments


def _by_memory(value: Tensor) -> Tensor:
    """What is read from a pointer by somebody who takes the rows to follow one another."""
    memory = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    places = torch.arange(value.numel()) + value.storage_offset()
    return memory[places % memory.numel()].view(value.shape)


class _Product(Function):
    """x * y with right gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * y, delta * x


class _ReadsByMemory(_Product):
    """The saved arguments taken for contiguous."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = map(_by_memory, ctx.saved_tensors)
        return delta * y, delta * x


class _SharesStrides(_Product):
    """y read by the strides of x: right as long as both have the same."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * (y if y.stride() == x.stride() else _by_memory(y)), delta * x


class _StridesOfArgument(_Product):
    """∂C/∂x written by the strides of x, of which an expanded one shares its rows."""

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        grad_x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        for row, value in zip(grad_x, delta * y, strict=True):
            row.copy_(value)
        return grad_x, delta * x


class _ForwardByMemory(_Product):
    """The value, too, is right for contiguous arguments only."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Any:
        return _by_memory(x) * y


_STRIDES = tuple(
    Mutant(name, mistake, "argument_layouts", function_case(wrong, _pair_samples, torch.mul))
    for name, mistake, wrong in (
        ("reads_by_memory", "backward takes its saved arguments for contiguous", _ReadsByMemory),
        (
            "shares_strides",
            "backward reads one argument by the strides of the other",
            _SharesStrides,
        ),
        (
            "strides_of_argument",
            "a gradient is given the strides of its argument, so that rows of an expanded one meet",
            _StridesOfArgument,
        ),
        ("forward_by_memory", "forward takes an argument for contiguous", _ForwardByMemory),
    )
)


# Samples in which a mistake does not show


class _Seventeen(Function):
    """y = x ⊙ x with a gradient 17 times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 34 * x * delta


_BLIND = (
    Mutant(
        "seen_on_nothing",
        "a gradient is 17 times too large, and no sample has elements",
        "informative_samples",
        function_case(_Seventeen, [(torch.ones(0, 3),)], torch.square, in_dims=(0,)),
    ),
    Mutant(
        "seen_at_zero",
        "a gradient is 17 times too large, and zero at all samples",
        "informative_samples",
        function_case(_Seventeen, [(torch.zeros(5, 3),)], torch.square),
    ),
    Mutant(
        "seen_on_one_element",
        "dC/db is a mean where a sum belongs, of one row with one element",
        "informative_samples",
        function_case(_MeanBias, [(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1))], F.linear),
    ),
    Mutant(
        "seen_by_the_bias_only",
        "dC/dw over N, and all samples have inputs of zero, so that dC/dw is zero",
        "informative_samples",
        function_case(
            _ExtraMean, [(torch.zeros(5, IN), torch.ones(OUT, IN), torch.ones(OUT))], F.linear
        ),
    ),
    Mutant(
        "seen_detached",
        "a gradient is missing, and the reference has none either",
        "informative_samples",
        function_case(
            lambda x: x.detach() ** 2, _elementwise_samples, lambda x: x.detach().square()
        ),
    ),
)


# Memory


class _ScratchInput(_Linear):
    """∂C/∂a written over a."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        return a.copy_(delta @ w).clone(), grad_w, delta.sum(0)


class _DecaysWeight(_Linear):
    """w changed in backward."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        gradients = delta @ w, delta.mT @ a, delta.sum(0)
        w.data.mul_(0.999)
        return gradients


class _ZeroesUpstream(_Linear):
    """delta zeroed after use."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        gradients = delta @ w, delta.mT @ a, delta.sum(0)
        delta.data.zero_()
        return gradients


class _Sigmoid(Function):
    """a = σ(z) with a right gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a * (1 - a)


class _ScalesUpstreamInPlace(_Sigmoid):
    """∂C/∂z written over grad_a."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a.mul_(a * (1 - a))


class _OverwritesSavedOutput(_Sigmoid):
    """σ' written over the saved σ."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a.data.mul_(1 - a)


class _Relu(Function):
    """a = max(z, 0) with a right gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, grad_a, 0)


class _ReluOverInput(_Relu):
    """The input clamped in place, then saved."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.clamp_(min=0).clone()


class _KeepsOnCtx(_Linear):
    """Operands kept as attributes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        ctx.a, ctx.w, _ = inputs

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta @ ctx.w, delta.mT @ ctx.a, delta.sum(0)


class _KeepsInListOnCtx(_Linear):
    """Operands kept in a list on ctx."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        ctx.operands = list(inputs[:2])

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.operands
        return delta @ w, delta.mT @ a, delta.sum(0)


class _KeepsOutput(_Sigmoid):
    """Output kept as an attribute: a cycle."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        ctx.out = output

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        return grad_a * ctx.out * (1 - ctx.out)


class _SavesData(_Linear):
    """Operands saved without their version counters."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        del output
        a, w, _ = inputs
        ctx.save_for_backward(a.data, w.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, delta.mT @ a, delta.sum(0)


_MEMORY = (
    Mutant(
        "scratch_input",
        "backward uses the saved input as scratch space",
        "writes_nothing",
        function_case(_ScratchInput, _linear_samples, F.linear),
    ),
    Mutant(
        "decays_weight",
        "backward changes the saved weight in place",
        "writes_nothing",
        function_case(_DecaysWeight, _linear_samples, F.linear),
    ),
    Mutant(
        "zeroes_upstream",
        "backward zeroes the upstream gradient after use",
        "writes_nothing",
        function_case(_ZeroesUpstream, _linear_samples, F.linear),
    ),
    Mutant(
        "scales_upstream_in_place",
        "backward multiplies the upstream gradient in place and returns it",
        "writes_nothing",
        function_case(_ScalesUpstreamInPlace, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "overwrites_saved_output",
        "backward writes over the saved output, behind the version counter",
        "writes_nothing",
        function_case(_OverwritesSavedOutput, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "relu_over_input",
        "forward clamps its input in place, then saves it",
        "writes_nothing",
        function_case(_ReluOverInput, _elementwise_samples, torch.relu),
    ),
    Mutant(
        "keeps_on_ctx",
        "inputs are kept as attributes of ctx",
        "saves_nothing_on_ctx",
        function_case(_KeepsOnCtx, _linear_samples, F.linear),
    ),
    Mutant(
        "keeps_in_list_on_ctx",
        "inputs are kept in a list on ctx",
        "saves_nothing_on_ctx",
        function_case(_KeepsInListOnCtx, _linear_samples, F.linear),
    ),
    Mutant(
        "keeps_output",
        "the output is kept on ctx, a cycle that keeps the graph alive",
        "no_leak",
        function_case(_KeepsOutput, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "saves_data",
        "inputs are saved as .data, so a later change in place goes unnoticed",
        "stale_inputs_raise",
        function_case(_SavesData, _linear_samples, F.linear),
    ),
    Mutant(
        "stale_on_ctx",
        "inputs are kept on ctx, so a later change in place goes unnoticed",
        "stale_inputs_raise",
        function_case(_KeepsOnCtx, _linear_samples, F.linear),
    ),
)


# Repetition


class _AccumulatesOnCtx(_Linear):
    """∂C/∂w added to that of the last backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.grad_w = 0

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        ctx.grad_w = ctx.grad_w + delta.mT @ a
        return delta @ w, ctx.grad_w, delta.sum(0)


class _SpendsItsState(_Linear):
    """A list emptied by the first backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.scales = [1.0]

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return ctx.scales.pop() * (delta @ w), delta.mT @ a, delta.sum(0)


_BUFFERS: dict[torch.Size, Tensor] = {}


class _SharedBuffer(_Linear):
    """∂C/∂w in a buffer shared by all backwards."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        grad_w = delta.mT @ a
        buffer = _BUFFERS.setdefault(grad_w.shape, torch.empty_like(grad_w))
        if buffer.dtype != grad_w.dtype or buffer.device != grad_w.device:
            buffer = _BUFFERS[grad_w.shape] = torch.empty_like(grad_w)
        return delta @ w, buffer.copy_(grad_w), delta.sum(0)


def _unseeded_mask(t: Tensor) -> Tensor:
    generator = Generator(t.device)
    generator.seed()
    return torch.rand(t.shape, generator=generator, device=t.device) < 0.5


class _UnseededDropout(Function):
    """Dropout whose mask no seed decides."""

    @staticmethod
    def forward(a: Tensor) -> Any:
        mask = _unseeded_mask(a)
        return a * mask * 2, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del inputs
        _, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Any, _: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grad_y * mask * 2


def _unseeded_dropout(a: Tensor) -> Any:
    apply: Any = _UnseededDropout.apply
    return apply(a)[0]


class _NoisyBackward(_Sigmoid):
    """A backward that rounds at random."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (a,) = ctx.saved_tensors
        return grad_a * a * (1 - a) * (1 + 1e-6 * _unseeded_mask(a))


class _Dropout(Function):
    """Dropout by a given mask, scaled as for p = 0.5."""

    @staticmethod
    def forward(a: Tensor, mask: Tensor, p: float) -> Any:
        del p
        return a * mask / 0.5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Any) -> None:
        del output
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grad_y * mask / 0.5, None, None


def _dropout(a: Tensor, mask: Tensor, p: float) -> Tensor:
    return a * mask / (1 - p)


class _OnceWhenTied(_Product):
    """One gradient when both arguments are one tensor."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.is_tied = inputs[0] is inputs[1]

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        return delta * y, None if ctx.is_tied else delta * x


class _KeyedByMemory(_Product):
    """Gradients in a table keyed by address."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        x, y = ctx.saved_tensors
        table = {x.data_ptr(): delta * y, y.data_ptr(): delta * x}
        return table.pop(x.data_ptr()), table.pop(y.data_ptr(), None)


class _KeptOnClass(Function):
    """What backward needs is kept on the class."""

    kept: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        _KeptOnClass.kept = x.detach().clone()
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return 2 * _KeptOnClass.kept * delta


_SCRATCH = torch.empty(4096, dtype=torch.float64)


class _KeptInBuffer(Function):
    """The output kept in one buffer for all calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        y = x.detach().exp()
        _SCRATCH[: y.numel()] = y.flatten()
        ctx.shape = y.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        kept = _SCRATCH[: delta.numel()].view(ctx.shape).to(delta.dtype, copy=True)
        return kept * delta


class _KeptOnStack(Function):
    """What backward needs is kept on a stack, whose top is the last call's."""

    stack: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
        _KeptOnStack.stack.append(x.detach().clone())
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
        return 2 * _KeptOnStack.stack.pop() * delta


class _MaskOnModule(nn.Module):
    """A ReLU that keeps its mask on itself."""

    mask: Tensor

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        layer = self

        class Masked(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Any:  # noqa: ARG004
                layer.mask = x > 0
                return x * layer.mask

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, delta: Any) -> Any:  # noqa: ARG004
                return delta * layer.mask

        return Masked.apply(input)


_REPETITION = (
    Mutant(
        "kept_on_class",
        "what backward needs is kept on the class, and overwritten by the next call",
        "interleaved_calls",
        function_case(_KeptOnClass, _elementwise_samples, torch.square),
    ),
    Mutant(
        "kept_in_buffer",
        "the output is kept in one buffer for all calls",
        "interleaved_calls",
        function_case(_KeptInBuffer, _elementwise_samples, torch.exp),
    ),
    Mutant(
        "kept_on_stack",
        "what backward needs is kept on a stack: wrong unless the last call comes back first",
        "interleaved_calls",
        function_case(_KeptOnStack, _elementwise_samples, torch.square),
    ),
    Mutant(
        "mask_on_module",
        "a module keeps its mask on itself",
        "interleaved_calls",
        module_case(_MaskOnModule, _elementwise_samples, nn.ReLU),
    ),
    Mutant(
        "accumulates_on_ctx",
        "dC/dw adds up over the backwards of one graph",
        "repeatable_backward",
        function_case(_AccumulatesOnCtx, _linear_samples, F.linear),
    ),
    Mutant(
        "spends_its_state",
        "the first backward uses up state that the second needs",
        "repeatable_backward",
        function_case(_SpendsItsState, _linear_samples, F.linear),
    ),
    Mutant(
        "shared_buffer",
        "dC/dw is returned in a buffer that the next backward writes over",
        "repeatable_backward",
        function_case(_SharedBuffer, _linear_samples, F.linear),
    ),
    Mutant(
        "unseeded_dropout",
        "dropout draws its mask from a generator of its own that nothing seeds",
        "deterministic",
        function_case(_unseeded_dropout, _elementwise_samples),
    ),
    Mutant(
        "noisy_backward",
        "two backwards of the same graph differ in the sixth digit",
        "deterministic",
        function_case(_NoisyBackward, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "dropout_for_one_half",
        "dropout scales by 2, whatever p is given",
        "forward_matches_reference",
        function_case(_Dropout, _dropout_samples, _dropout),
    ),
    Mutant(
        "once_when_tied",
        "one gradient of two is dropped when both arguments are the same tensor",
        "tied_inputs",
        function_case(_OnceWhenTied, _pair_samples, torch.mul),
    ),
    Mutant(
        "keyed_by_memory",
        "gradients are kept by the address of their input, so tied inputs overwrite each other",
        "tied_inputs",
        function_case(_KeyedByMemory, _pair_samples, torch.mul),
    ),
)


# Higher orders, forward mode and transforms


class _SavesDetached(_Linear):
    """Operands detached before they are used."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.detach() for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


class _SavesPrime(Function):
    """a = σ(z), saving σ', which autograd does not know to depend on z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Any:
        a = torch.sigmoid(z)
        ctx.save_for_backward(a * (1 - a))
        return a

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (prime,) = ctx.saved_tensors
        return grad_a * prime


class _CubeGradient(Function):
    """3 x² delta with right derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, delta: Tensor) -> Any:
        return 3 * x.square() * delta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x * delta * v, 3 * x.square() * v

    @staticmethod
    def jvp(ctx: Any, dx: Any, ddelta: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x * delta * dx + 3 * x.square() * ddelta


class _CubeGradientDropsCurvature(_CubeGradient):
    """No second derivative by x."""

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        x, _ = ctx.saved_tensors
        return None, 3 * x.square() * v


class _CubeGradientDropsThird(_CubeGradient):
    """No third derivative by x."""

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 6 * x.detach() * delta * v, 3 * x.square() * v


class _CubeGradientWrongJvp(_CubeGradient):
    """3 for 6 in the jvp alone."""

    @staticmethod
    def jvp(ctx: Any, dx: Any, ddelta: Any) -> Any:
        x, delta = ctx.saved_tensors
        return 3 * x * delta * dx + 3 * x.square() * ddelta


class _Cube(Function):
    """x³, its gradient a Function of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * dx


def _cube_by(gradient: Any) -> Any:
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradient.apply(x, delta)

    return type("_Cube", (_Cube,), {"backward": staticmethod(backward)})


def _cube(x: Tensor) -> Tensor:
    return x**3


class _SigmoidWrongJvp(_Sigmoid):
    """σ for σ' in the jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        _Sigmoid.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, dz: Any) -> Any:
        (a,) = ctx.saved_tensors
        return dz * a


class _LinearJvpWithoutBias(_Linear):
    """The tangent of b dropped."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _Linear.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, da: Any, dw: Any, db: Any) -> Any:
        del db
        a, w = ctx.saved_tensors
        return da @ w.mT + a @ dw.mT


class _Centred(Function):
    """x - mean(x), whose batch rule centres over the batch as well."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x - x.mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        del ctx
        return delta - delta.mean()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info
        apply: Any = _Centred.apply
        return apply(x), in_dims[0]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean()


class _RunningSum(Function):
    """x.cumsum(0), whose batch rule misplaces the batch."""

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.cumsum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        del ctx
        return delta.flip(0).cumsum(0).flip(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> Any:
        del info
        apply: Any = _RunningSum.apply
        return apply(x), in_dims[0]


def _running_sum(x: Tensor) -> Tensor:
    return x.cumsum(0)


class _ScaleGradient(Function):
    """Σ delta a, whose batch rule sums over the batch as well."""

    @staticmethod
    def forward(delta: Tensor, a: Tensor) -> Any:
        return (delta * a).flatten(0, -2).sum(0) if a.ndim > 1 else delta * a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Any) -> Any:
        delta, a = ctx.saved_tensors
        return v * a, v * delta

    @staticmethod
    def vmap(info: Any, in_dims: Any, delta: Tensor, a: Tensor) -> Any:
        delta, a = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((delta, a), in_dims, strict=True)
        )
        apply: Any = _ScaleGradient.apply
        return apply(delta, a), None


class _Scale(Function):
    """a * w, its weight gradient a Function of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, w: Tensor) -> Any:
        return a * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        apply: Any = _ScaleGradient.apply
        return delta * w, apply(delta, a)


_TRANSFORMS = (
    Mutant(
        "saves_detached",
        "backward detaches what it saved, so second derivatives lack terms",
        "double_backward",
        function_case(_SavesDetached, _linear_samples, F.linear, supports=("double_backward",)),
    ),
    Mutant(
        "saves_prime",
        "an intermediate of forward is saved, so second derivatives are zero",
        "double_backward",
        function_case(
            _SavesPrime, _elementwise_samples, torch.sigmoid, supports=("double_backward",)
        ),
    ),
    Mutant(
        "saves_prime_undeclared",
        "second derivatives are not supported, but come out zero instead of refused",
        "double_backward",
        function_case(_SavesPrime, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "drops_curvature",
        "the double backward returns None where a second-order term belongs",
        "double_backward",
        function_case(
            _cube_by(_CubeGradientDropsCurvature),
            _elementwise_samples,
            _cube,
            supports=("double_backward",),
        ),
    ),
    Mutant(
        "drops_third_order",
        "first and second derivatives are right, the third lacks a term",
        "third_order",
        function_case(
            _cube_by(_CubeGradientDropsThird),
            _elementwise_samples,
            _cube,
            supports=("double_backward", "third_order"),
        ),
    ),
    Mutant(
        "wrong_jvp",
        "the jvp multiplies by the sigmoid, not by its derivative",
        "forward_ad",
        function_case(
            _SigmoidWrongJvp,
            _elementwise_samples,
            torch.sigmoid,
            supports=("double_backward", "forward_ad"),
        ),
    ),
    Mutant(
        "jvp_without_bias",
        "the jvp forgets the tangent of b",
        "forward_ad",
        function_case(
            _LinearJvpWithoutBias,
            _linear_samples,
            F.linear,
            supports=("double_backward", "forward_ad"),
        ),
    ),
    Mutant(
        "wrong_jvp_of_gradient",
        "jvp and backward are right, but the jvp of the backward is not",
        "forward_over_reverse",
        function_case(
            _cube_by(_CubeGradientWrongJvp),
            _elementwise_samples,
            _cube,
            supports=("double_backward", "third_order", "forward_ad", "forward_over_reverse"),
        ),
    ),
    Mutant(
        "vmap_over_everything",
        "the batch rule takes the mean over the batch as well",
        "vmap",
        function_case(_Centred, _elementwise_samples, _centred, supports=("vmap",), in_dims=(0,)),
    ),
    Mutant(
        "vmap_along_batch",
        "the batch rule sums along the batch where each sample should be summed",
        "vmap",
        function_case(
            _RunningSum, _elementwise_samples, _running_sum, supports=("vmap",), in_dims=(0,)
        ),
    ),
    Mutant(
        "shared_weight_gradient",
        "under vmap every sample gets the weight gradient of the whole batch",
        "per_sample_gradients",
        function_case(
            _Scale,
            _scale_samples,
            torch.mul,
            supports=("vmap", "per_sample_gradients"),
            in_dims=(0, None),
        ),
    ),
)


# Dtypes


class _PromotesFloat32(_Sigmoid):
    """Forward with a constant in float64."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        one = torch.ones(z.shape[-1], dtype=torch.float64, device=z.device)
        return one / (1 + torch.exp(-z))


class _OnlyFloat64(_Linear):
    """Backward with a cast to float64."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w.double(), delta.mT @ a, delta.sum(0)


class _AddsRowByRow(Function):
    """x.sum(0) in a loop."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        total = torch.zeros_like(x[0])
        for row in x:
            total = total + row
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        return delta.expand(ctx.shape)


def _sum_of_rows(x: Tensor) -> Tensor:
    return x.sum(0)


class _SumsThenDivides(Function):
    """The mean square, by way of a sum that float16 cannot hold."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.square().sum() / x.numel()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return delta * 2 * (x / x.numel())


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


class _AlwaysFloat16(_Linear):
    """float16 under autocast, whatever dtype the region asks for."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor) -> Any:
        z = F.linear(a, w, b)
        return z.half() if torch.is_autocast_enabled(a.device.type) else z

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        delta = delta.to(a.dtype)
        return delta @ w, delta.mT @ a, delta.sum(0)


class _GradientInUpstreamDtype(_Linear):
    """Backward computes in the dtype of the upstream gradient, and stays there."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = (t.to(delta.dtype) for t in ctx.saved_tensors)
        return delta @ w, delta.mT @ a, delta.sum(0)


_DTYPES = (
    Mutant(
        "promotes_float32",
        "a constant in float64 turns a float32 output into float64",
        "float32",
        function_case(_PromotesFloat32, _elementwise_samples, torch.sigmoid, supports=("float32",)),
    ),
    Mutant(
        "only_float64",
        "backward casts one operand to float64 and fails for float32",
        "float32",
        function_case(_OnlyFloat64, _linear_samples, F.linear, supports=("float32",)),
    ),
    Mutant(
        "adds_row_by_row",
        "rows are added one by one in bfloat16, where small ones vanish beside the sum",
        "bfloat16",
        function_case(
            _AddsRowByRow, _uneven_samples, _sum_of_rows, supports=("float32", "bfloat16")
        ),
    ),
    Mutant(
        "sums_then_divides",
        "the mean is a sum divided afterwards, and the sum overflows float16",
        "float16",
        function_case(
            _SumsThenDivides, _far_samples, _mean_square, supports=("float32", "float16")
        ),
    ),
    Mutant(
        "fails_outside_autocast",
        "forward is cast by autocast, and backward, outside the region, meets two dtypes",
        "autocast",
        function_case(_Linear, _linear_samples, F.linear, supports=("float32", "autocast")),
    ),
    Mutant(
        "gradient_in_upstream_dtype",
        "under autocast, gradients of float32 inputs are returned in bfloat16",
        "autocast",
        function_case(
            _GradientInUpstreamDtype, _linear_samples, F.linear, supports=("float32", "autocast")
        ),
    ),
    Mutant(
        "always_float16",
        "the output is float16 under autocast, whatever dtype the region asks for",
        "autocast",
        function_case(_AlwaysFloat16, _linear_samples, F.linear, supports=("float32", "autocast")),
    ),
)


# Compiler and export


class _LooksAtValues(_Sigmoid):
    """Forward with a branch on a value."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        if z.sum().item() > 0:
            return 1 / (1 + torch.exp(-z))
        return torch.sigmoid(z)


class _CubeWithJvp(_Cube):
    """Right, with a jvp, which the compiler refuses."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * delta


def _other_when_compiled(a: Tensor, w: Tensor, b: Tensor) -> Any:
    apply: Any = _Linear.apply
    return F.linear(a, w) if torch.compiler.is_compiling() else apply(a, w, b)


def _cut_when_compiled(a: Tensor, w: Tensor, b: Tensor) -> Any:
    apply: Any = _Linear.apply
    return F.linear(a, w.detach(), b) if torch.compiler.is_compiling() else apply(a, w, b)


def _five_rows_when_compiled(x: Tensor) -> Any:
    apply: Any = _Sigmoid.apply
    rows = 5 if torch.compiler.is_compiling() else len(x)
    return apply(x).sum(0) / rows


def _mean_sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x).mean(0)


def _other_when_exported(a: Tensor, w: Tensor, b: Tensor) -> Any:
    apply: Any = _Linear.apply
    return F.linear(a, w) if torch.compiler.is_exporting() else apply(a, w, b)


_COMPILER = (
    Mutant(
        "looks_at_values",
        "forward branches on a value, which the compiler refuses",
        "compile",
        function_case(_LooksAtValues, _elementwise_samples, torch.sigmoid, supports=("compile",)),
    ),
    Mutant(
        "jvp_when_compiled",
        "the Function defines a jvp, which the compiler refuses",
        "compile",
        function_case(
            _CubeWithJvp, _elementwise_samples, _cube, supports=("forward_ad", "compile")
        ),
    ),
    Mutant(
        "other_when_compiled",
        "the branch for the compiler forgets b",
        "compile",
        function_case(_other_when_compiled, _linear_samples, F.linear, supports=("compile",)),
    ),
    Mutant(
        "cut_when_compiled",
        "compiled outputs are right, but the gradient of w is cut",
        "compile",
        function_case(_cut_when_compiled, _linear_samples, F.linear, supports=("compile",)),
    ),
    Mutant(
        "five_rows_when_compiled",
        "the number of rows of the example is fixed in compiled code",
        "compile_dynamic",
        function_case(
            _five_rows_when_compiled,
            _elementwise_samples,
            _mean_sigmoid,
            supports=("compile", "compile_dynamic"),
            in_dims=(0,),
        ),
    ),
    Mutant(
        "other_when_exported",
        "the branch for export forgets b",
        "export",
        function_case(_other_when_exported, _linear_samples, F.linear, supports=("export",)),
    ),
)


# Values at the edges


class _ReluOneAtZero(_Relu):
    """relu'(0) = 1."""

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z >= 0, grad_a, 0)


class _Absolute(_Relu):
    """|z| with the derivative 1 at 0."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z.abs()

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return torch.where(z >= 0, grad_a, -grad_a)


class _FlatBeyond15(_Relu):
    """σ with σ' = 0 for |z| > 15."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        a = torch.sigmoid(z)
        return torch.where(z.abs() > 15, 0, grad_a * a * (1 - a))


class _OverflowingPrime(_Relu):
    """σ' as a ratio of exponentials."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        e = torch.exp(-z)
        return grad_a * e / (1 + e) ** 2


class _OverflowingSoftplus(_Relu):
    """log(1 + e^z), written as it stands."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.log1p(torch.exp(z))

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * torch.sigmoid(z)


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


class _ReluByProduct(_Relu):
    """relu as z (z > 0), which is NaN at -∞."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return z * (z > 0)


class _TanhByProduct(_Relu):
    """tanh whose gradient divides by z and multiplies again."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, grad_a: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grad_a * (1 - torch.tanh(z) ** 2) + 0 * z


_EDGES = (
    Mutant(
        "relu_one_at_zero",
        "the derivative of ReLU at 0 is 1, where PyTorch has 0",
        "at_zero",
        function_case(_ReluOneAtZero, _elementwise_samples, torch.relu),
    ),
    Mutant(
        "absolute_one_at_zero",
        "the derivative of the absolute value at 0 is 1, where PyTorch has 0",
        "at_zero",
        function_case(_Absolute, _elementwise_samples, torch.abs),
    ),
    Mutant(
        "flat_beyond_15",
        "the derivative of the sigmoid is set to zero for |z| > 15",
        "large_values",
        function_case(_FlatBeyond15, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "overflowing_prime",
        "the derivative of the sigmoid is a ratio of exponentials: NaN for a large negative z",
        "large_values",
        function_case(_OverflowingPrime, _elementwise_samples, torch.sigmoid),
    ),
    Mutant(
        "overflowing_softplus",
        "softplus takes the exponential first and overflows",
        "large_values",
        function_case(_OverflowingSoftplus, _elementwise_samples, _softplus),
    ),
    Mutant(
        "relu_by_product",
        "ReLU multiplies z by a mask: NaN at minus infinity",
        "infinite_values",
        function_case(
            _ReluByProduct, _elementwise_samples, torch.relu, supports=("infinite_values",)
        ),
    ),
    Mutant(
        "tanh_by_product",
        "the gradient of tanh adds 0 * z: NaN at infinity",
        "infinite_values",
        function_case(
            _TanhByProduct, _elementwise_samples, torch.tanh, supports=("infinite_values",)
        ),
    ),
)


# Modules


class _DoubledWeight(_Linear):
    """∂C/∂w doubled."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, 2 * delta.mT @ a, delta.sum(0)


def _apply(function: Any, module: nn.Linear, a: Tensor) -> Any:
    return function.apply(a, module.weight, module.bias)


class _DoubledModule(nn.Linear):
    """A linear layer with a wrong weight gradient and a right input gradient."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_DoubledWeight, self, input)


class _Shifted(nn.Linear):
    """A linear layer of shifted inputs, its shift not in the state_dict."""

    shift: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("shift", torch.randn(in_features), persistent=False)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_Linear, self, input - self.shift)


class _HoldsLambda(nn.Linear):
    """A linear layer with a lambda for an attribute."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.activation: Any = lambda z: z

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return self.activation(_apply(_Linear, self, input))


class _ClosesOverItself(nn.Linear):
    """A linear layer whose copies call the original."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.call: Any = lambda a: _apply(_Linear, self, a)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return self.call(input)


class _ForgetsTraining(nn.Linear):
    """A linear layer whose copies have weights of their own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ForgetsTraining":
        copied = _ForgetsTraining(self.in_features, self.out_features).to(self.weight)
        memo[id(self)] = copied
        return copied

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_Linear, self, input)


class _PlainOffset(nn.Linear):
    """A linear layer with an offset that is no buffer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.offset = torch.full((out_features,), 0.5, dtype=torch.float64)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_Linear, self, input) + self.offset


class _IgnoresDtype(nn.Linear):
    """A linear layer that drops the dtype it is given."""

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        del dtype
        super().__init__(in_features, out_features, device=device)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_Linear, self, input)


class _TakesNoDtype(nn.Linear):
    """A linear layer that cannot be given a dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _apply(_Linear, self, input)


class _Thaws(nn.Linear):
    """A linear layer that sets requires_grad back."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        if isinstance(self.weight, nn.Parameter):
            self.weight.requires_grad = True
        return _apply(_Linear, self, input)


class _FrozenCutsInput(nn.Linear):
    """A linear layer without any gradient when its weight is frozen."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        with torch.set_grad_enabled(self.weight.requires_grad and torch.is_grad_enabled()):
            return _apply(_Linear, self, input)


class _Halves(nn.Linear):
    """A linear layer that halves its output in training."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        z = super().forward(input)
        return z / 2 if self.training else z


class _HalvesWithGradient(nn.Linear):
    """A linear layer that takes grad mode for training."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        z = _apply(_Linear, self, input)
        return z / 2 if torch.is_grad_enabled() else z


_REFERENCE = partial(nn.Linear, IN, OUT)

_MODULES = (
    Mutant(
        "doubled_module",
        "a module's weight gradient is doubled; gradcheck of its input does not see it",
        "gradients_match_reference",
        module_case(partial(_DoubledModule, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "doubled_module_unreferenced",
        "a module's weight gradient is doubled, and there is no reference",
        "finite_differences",
        module_case(partial(_DoubledModule, IN, OUT), _elementwise_samples),
    ),
    Mutant(
        "unsaved_buffer",
        "a buffer is missing from the state_dict",
        "state_dict",
        module_case(partial(_Shifted, IN, OUT), _elementwise_samples),
    ),
    Mutant(
        "holds_lambda",
        "a lambda attribute makes the module impossible to pickle",
        "pickle",
        module_case(partial(_HoldsLambda, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "closes_over_itself",
        "a copy of the module still computes with the weights of the original",
        "deepcopy",
        module_case(partial(_ClosesOverItself, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "forgets_training",
        "a copy of the module starts with new weights",
        "deepcopy",
        module_case(partial(_ForgetsTraining, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "plain_offset",
        "a plain tensor attribute stays in float64 when the module is cast",
        "to_dtype",
        module_case(partial(_PlainOffset, IN, OUT), _elementwise_samples),
    ),
    Mutant(
        "ignores_dtype",
        "the module takes a dtype and ignores it",
        "factory_kwargs",
        module_case(
            partial(_IgnoresDtype, IN, OUT),
            _elementwise_samples,
            _REFERENCE,
            supports=("factory_kwargs",),
        ),
    ),
    Mutant(
        "takes_no_dtype",
        "the module cannot be given a dtype, though it is declared",
        "factory_kwargs",
        module_case(
            partial(_TakesNoDtype, IN, OUT),
            _elementwise_samples,
            _REFERENCE,
            supports=("factory_kwargs",),
        ),
    ),
    Mutant(
        "thaws",
        "forward sets requires_grad back on a frozen weight",
        "frozen_parameters",
        module_case(partial(_Thaws, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "frozen_cuts_input",
        "a frozen weight cuts the gradient of the input as well",
        "frozen_parameters",
        module_case(partial(_FrozenCutsInput, IN, OUT), _elementwise_samples, _REFERENCE),
    ),
    Mutant(
        "training_by_grad_mode",
        "the module takes grad mode for training, so eval() changes nothing",
        "train_eval",
        module_case(
            partial(_HalvesWithGradient, IN, OUT), _elementwise_samples, partial(_Halves, IN, OUT)
        ),
    ),
)


MUTANTS: tuple[Mutant, ...] = (
    *_WRONG_GRADIENTS,
    *_WHAT_IS_ASKED_FOR,
    *_UPSTREAM,
    *_SHAPES,
    *_STRIDES,
    *_BLIND,
    *_MEMORY,
    *_REPETITION,
    *_TRANSFORMS,
    *_DTYPES,
    *_COMPILER,
    *_EDGES,
    *_MODULES,
)
