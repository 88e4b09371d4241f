"""How checks make the module of a case, and call it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import NotApplicable
from manual_bp.verify._context import CheckContext
from manual_bp.verify._global_state import seed_pytorch
from manual_bp.verify._lifted import same_state


def factory_of(ctx: CheckContext) -> Callable[[], nn.Module]:
    """What makes the module, for checks that need one."""
    if ctx.case.factory is None:
        raise NotApplicable("the case is a function")
    return ctx.case.factory


def new_module(
    ctx: CheckContext, sample: Sample, seed: int | None = None
) -> tuple[nn.Module, Sample]:
    """The module, made with this seed or the case's, and its inputs in a sample."""
    seed_pytorch(ctx.case.seed if seed is None else seed)
    module = factory_of(ctx)().to(ctx.case.device)
    return in_dtype_of(sample, module), inputs_in(ctx, sample)


def inputs_in(ctx: CheckContext, sample: Sample) -> Sample:
    """The inputs of the module in a sample, nested as its forward takes them."""
    return ctx.case.nested_inputs(sample[: len(sample) - ctx.case.parameters])


def in_dtype_of(sample: Sample, module: nn.Module) -> nn.Module:
    """The module in the dtype of the sample, if that has only one."""
    dtypes = {t.dtype for t in sample if is_differentiable(t) and not t.is_complex()}
    return module.to(dtypes.pop()) if len(dtypes) == 1 else module


def output_of(ctx: CheckContext, module: nn.Module, inputs: Sample) -> Any:
    """What a module computes from its state, which stays as it is, and the seed of the case."""
    with same_state(module, ctx.case.seed):
        return module(*inputs)
