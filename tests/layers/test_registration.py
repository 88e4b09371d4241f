"""What registers an activation, and what is refused there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import ReLU, convert
from manual_bp.layers._activation import ACTIVATIONS, Activation
from tests.record.recording import Doing, recorded


@pytest.fixture(autouse=True)
def known() -> Iterator[list[Any]]:
    """What is registered before the test, and again after it."""
    known = list(ACTIVATIONS)
    yield known
    ACTIVATIONS[:] = known


def elu(z: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(z, alpha)


@pytest.mark.parametrize("base", [None, nn.Module, ReLU])
def test_without_a_class_of_torch_nn_it_is_refused(base: Any, known: list[Any]) -> None:
    bases = (Activation,) if base is None else (base,) if base is ReLU else (Activation, base)
    with pytest.raises(TypeError, match=r"Mine must have the torch\.nn class that it replaces"):
        type("Mine", bases, {}, function=elu)
    assert known == ACTIVATIONS


def test_without_a_function_of_the_same_name_in_pytorch_it_is_refused(known: list[Any]) -> None:
    def my_elu(z: Tensor, alpha: float = 1.0) -> Tensor:
        return F.elu(z, alpha)

    with pytest.raises(ValueError, match=r"the function of ELU must have the name of PyTorch's"):
        type("ELU", (Activation, nn.ELU), {}, function=my_elu)
    assert known == ACTIVATIONS


def define() -> Any:
    class ELU(Activation, nn.ELU, function=elu):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return elu(input, self.alpha)

    return ELU


def test_a_class_defined_again_takes_the_place_of_the_one_before(known: list[Any]) -> None:
    define()
    second = define()
    assert [*known, second] == ACTIVATIONS
    trace = recorded(Doing(nn.Linear(4, 3), nn.ELU()), torch.randn(5, 4))
    assert [type(activation) for activation in trace["fc"].activations] == [second]
    model = nn.Sequential(nn.ELU())
    assert not convert(model).left
    assert type(model[0]) is second


def gelu(z: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(z, approximate=approximate)


@pytest.mark.parametrize("does", [nn.GELU("tanh"), lambda z: F.gelu(z, approximate="tanh")])
def test_record_sees_an_option_that_is_a_string(does: Any) -> None:
    class GELU(Activation, nn.GELU, function=gelu):
        pass

    (found,) = recorded(Doing(nn.Linear(4, 3), does), torch.randn(5, 4))["fc"].activations
    assert type(found) is GELU
    assert found.approximate == "tanh"
