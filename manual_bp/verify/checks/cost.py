"""What a backward costs."""

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from manual_bp._torch import seeing_operators
from manual_bp.verify._autograd import gradients_of, leaves, positions, subsets
from manual_bp.verify._case import Call, Sample
from manual_bp.verify._check import check
from manual_bp.verify._compare import Mismatch
from manual_bp.verify._context import CheckContext

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}


@check(capability=True, only_if_declared=True)
def frugal(ctx: CheckContext, sample: Sample) -> None:
    """For every subset of gradients, no more matrix products or saved bytes than the reference."""
    upstream = ctx.upstream(ctx.reference, sample)
    places = positions(sample)
    for wanted in subsets(places):
        names = ", ".join(map(ctx.label, wanted))
        for what, measure in (
            ("matrix products in backward", _matrix_products),
            ("bytes saved for backward", _saved_bytes),
        ):
            ours = measure(ctx.call, leaves(sample, wanted), upstream)
            theirs = measure(ctx.reference, leaves(sample, wanted), upstream)
            ctx.comparisons += 1
            if ours > theirs:
                raise Mismatch(
                    f"{what} when only {names} require gradients: expected at most {theirs}, as "
                    f"the reference, got {ours}"
                    + ("" if wanted == places else "\ndiagnosis: ctx.needs_input_grad is not used")
                )


def _matrix_products(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    result = call(*arguments)
    seen: list[str] = []
    with seeing_operators(seen.append):
        gradients_of(result, arguments, upstream)
    return sum(name in _MATRIX_PRODUCTS for name in seen)


def _saved_bytes(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    del upstream
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output that holds its own graph would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*arguments)
    del result
    return sum(saved.values())
