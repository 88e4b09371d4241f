"""The table of activations for the tests that run for all of them: a new one needs a row here."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from manual_bp import LeakyReLU, ReLU, Sigmoid, Softplus, Tanh
from manual_bp.layers._formula import torch_base


class Facts(NamedTuple):
    """An activation, and what tests cannot derive from its class.

    module: The class.
    options: Options other than the defaults, with which a determines σ'(z).
    saves: What is saved for the backward, "a" or "z".
    slope: σ'(z) with the default options, for a number z.
    """

    module: Any
    options: tuple[float, ...]
    saves: str
    slope: Callable[[float], float]

    @property
    def call(self) -> Any:
        return self.module.function

    @property
    def name(self) -> str:
        return self.call.__name__  # type: ignore[no-any-return]

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(F, self.name)  # type: ignore[no-any-return]

    @property
    def reference_module(self) -> Any:
        return torch_base(self.module)

    @property
    def has_in_place(self) -> bool:
        return "inplace" in signature(self.call).parameters

    def make(self, **inplace: bool) -> Any:
        """A module of ours with options other than the defaults."""
        return self.module(*self.options, **inplace)

    def make_reference(self, **inplace: bool) -> Any:
        """The module of torch.nn with the same options."""
        return self.reference_module(*self.options, **inplace)


def bell(t: float) -> float:
    """The derivative of the logistic function, in a form that does not cancel."""
    return math.exp(-abs(t)) / (1 + math.exp(-abs(t))) ** 2


TABLE = [
    Facts(Sigmoid, (), "a", bell),
    Facts(Tanh, (), "a", lambda z: 4 * bell(2 * z)),
    Facts(ReLU, (), "a", lambda z: float(z > 0)),
    Facts(LeakyReLU, (0.2,), "z", lambda z: 1.0 if z > 0 else 0.01),
    Facts(Softplus, (2.0, 25.0), "z", lambda z: 1 / (1 + math.exp(-z)) if z <= 20 else 1.0),
]
IN_PLACE = [facts for facts in TABLE if facts.has_in_place]
