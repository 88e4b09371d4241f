"""Arguments keep the strides that the samples give them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manual_bp.verify import check_function
from manual_bp.verify._autograd import copied, leaves

BASE = torch.arange(48.0, dtype=torch.float64).view(6, 8)
LAYOUTS = {
    "dense": BASE,
    "strided": BASE[:, ::2],
    "transposed part": BASE.T[1:5],
    "expanded": BASE[:1].expand(3, 8),
    "shifted": BASE[3:5, 1:4],
    "conjugated": BASE.to(torch.complex128)[:, ::2].conj(),
    "empty": BASE[:0],
}


@pytest.mark.parametrize("value", LAYOUTS.values(), ids=LAYOUTS)
def test_a_leaf_is_a_copy_with_the_same_strides(value: Tensor) -> None:
    (leaf,) = leaves((value,))
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.stride() == value.stride()
    assert torch.equal(leaf, value)
    assert leaf.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() or not len(value)
    low = copied(value.real, dtype=torch.float32)
    assert low.dtype is torch.float32
    assert low.stride() == value.real.stride()
    assert torch.equal(low, value.real.float())


def test_a_function_that_views_its_transposed_argument_gets_it_transposed() -> None:
    def rows(generator: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.randn(4, 3, generator=generator).T,)]

    def viewing(x: Tensor) -> Tensor:
        return x.T.view(-1).sin()

    report = check_function(viewing, rows, lambda x: x.T.reshape(-1).sin(), slow=False)
    # It refuses other strides, and only that is said.
    assert [outcome.check for outcome in report.failures] == ["argument_layouts"]


def test_expanded_arguments_raise_no_alarm() -> None:
    def rows(generator: torch.Generator) -> list[tuple[Any, ...]]:
        return [(torch.randn(1, 3, generator=generator).expand(4, 3),)]

    check_function(torch.tanh, rows, torch.tanh, slow=False).raise_if_failed()
