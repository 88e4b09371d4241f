"""How checks make the module of a case."""

from collections.abc import Callable

import torch
from torch import nn

from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._check import CheckContext
from manual_bp.verify._compare import NotApplicable


def factory_of(ctx: CheckContext) -> Callable[[], nn.Module]:
    if ctx.case.factory is None:
        raise NotApplicable("the case is a function")
    return ctx.case.factory


def new_module(
    ctx: CheckContext, sample: Sample, seed: int | None = None
) -> tuple[nn.Module, Sample]:
    """The module, made with this seed or the case's, and its inputs in a sample."""
    torch.manual_seed(ctx.case.seed if seed is None else seed)
    module = factory_of(ctx)().to(ctx.case.device)
    count = len(sample) - sum(1 for _ in module.named_parameters())
    return in_dtype_of(sample, module), sample[:count]


def in_dtype_of(sample: Sample, module: nn.Module) -> nn.Module:
    """The module in the dtype of the sample, if that has only one."""
    dtypes = {t.dtype for t in sample if is_differentiable(t) and not t.is_complex()}
    return module.to(dtypes.pop()) if len(dtypes) == 1 else module
