"""What operators made with `torch.library` must do in addition: the tests of `opcheck`."""

import re
import warnings

import torch

from manual_bp.verify._autograd import leaves
from manual_bp.verify._case import Sample
from manual_bp.verify._check import check
from manual_bp.verify._compare import Mismatch, NotApplicable
from manual_bp.verify._context import CheckContext


@check(for_operators=True)
def opcheck_schema(ctx: CheckContext, sample: Sample) -> None:
    """The schema tells which arguments the operator changes, and no output is an argument."""
    _opcheck(ctx, sample, "test_schema")


@check(for_operators=True)
def opcheck_autograd_registration(ctx: CheckContext, sample: Sample) -> None:
    """The backward is registered where PyTorch looks for it: with register_autograd."""
    _opcheck(ctx, sample, "test_autograd_registration")


@check(capability=True, for_operators=True)
def opcheck_faketensor(ctx: CheckContext, sample: Sample) -> None:
    """Without data, the operator gives the shapes, strides and dtypes that it gives with data."""
    _opcheck(ctx, sample, "test_faketensor")


@check(capability=True, for_operators=True, slow=True, best_sample=True)
def opcheck_aot_dispatch(ctx: CheckContext, sample: Sample) -> None:
    """Traced with dynamic shapes, the operator gives the values and gradients of eager mode."""
    _opcheck(ctx, sample, "test_aot_dispatch_dynamic")


def _opcheck(ctx: CheckContext, sample: Sample, test: str) -> None:
    """Run one test of `opcheck`. That something is not registered is a refusal."""
    if ctx.case.operator is None:
        raise NotApplicable("the case is no operator of torch.library")
    ctx.comparisons += 1
    try:
        with warnings.catch_warnings(action="ignore"):
            arguments = ctx.case.nested_inputs(leaves(sample))
            torch.library.opcheck(ctx.case.operator, arguments, test_utils=test)
    except Exception as error:
        cause = error.__cause__ or error
        if re.search("no (fake impl|autograd formula)( was)? registered", str(cause)):
            raise cause from None
        raise Mismatch(" ".join(str(cause).split())) from None
