"""Operators of torch.library that are registered wrongly."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from manual_bp.verify._make_case import function_case
from manual_bp.verify.mutants._mutant import DECLARED, Mutant
from manual_bp.verify.mutants._samples import elementwise

_NAMESPACE = "manual_bp_mutants"


def _square(x: Tensor) -> Tensor:
    return x * x


def _square_in_place(x: Tensor) -> Tensor:
    return x.mul_(x).clone()


def _slope(ctx: Any, grad_y: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return 2 * x * grad_y


def _slope_by_values(ctx: Any, grad_y: Tensor) -> Any:
    return _slope(ctx, grad_y) if grad_y.sum().item() else torch.zeros_like(grad_y)


def _save(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _operator(
    name: str, forward: Any = _square, fake: Any = torch.empty_like, backward: Any = _slope
) -> Any:
    operator = torch.library.custom_op(f"{_NAMESPACE}::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=_save)
    return operator


class _Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    backward = staticmethod(_slope)


def _with_function_below_autograd(name: str) -> Any:
    torch.library.define(f"{_NAMESPACE}::{name}", "(Tensor x) -> Tensor")
    torch.library.impl(f"{_NAMESPACE}::{name}", "cpu")(_Square.apply)
    return getattr(getattr(torch.ops, _NAMESPACE), name)


for _name, _mistake, _check, _wrong in (
    (
        "writes_undeclared",
        "The operator changes its argument, which its schema does not say.",
        "opcheck_schema",
        _operator("writes_undeclared", forward=_square_in_place),
    ),
    (
        "backward_below_autograd",
        "The backward is a Function that the implementation for the CPU applies.",
        "opcheck_autograd_registration",
        _with_function_below_autograd("backward_below_autograd"),
    ),
    (
        "turned_fake",
        "Without data, the operator gives the shape of the transpose.",
        "opcheck_faketensor",
        _operator("turned_fake", fake=lambda x: x.new_empty(x.shape[::-1])),
    ),
    (
        "backward_reads_values",
        "The backward branches on a value, so it cannot be traced.",
        "opcheck_aot_dispatch",
        _operator("backward_reads_values", backward=_slope_by_values),
    ),
):
    DECLARED.append(
        Mutant(
            _name,
            _mistake,
            _check,
            function_case(_wrong, elementwise, torch.square),
            __name__,
        )
    )
