"""Backpropagation written out by hand, for PyTorch.

    Linear                           a drop-in `nn.Module`; as a function: linear
    Sigmoid, Tanh, ReLU, LeakyReLU, Softplus
                                     likewise; sigmoid, tanh, relu, leaky_relu, softplus
    LinearSigmoid                    Linear and Sigmoid as one; linear_sigmoid
    QuadraticCost                    on output activations a; as a function: quadratic_cost
    SigmoidCrossEntropyCost          on weighted inputs z; sigmoid_cross_entropy_cost
    SoftmaxCrossEntropyCost          on weighted inputs z; softmax_cross_entropy_cost
    backprop(net, x, y, cost)        BP1 to BP4 without autograd; returns a Trace
    TrainingStep(net, cost, lr)      the same and gradient descent in one, in place; fast
    EnsembleStep(nets, cost, lr)     the same for many networks of one shape at once
    record(model)                    the same Trace of any model, from a backward() of autograd
    convert(model), restore(model)   torch.nn's layers to ours, in place, and back

Each layer and cost has a `torch.autograd.Function`, which is public too: `LinearFunction` etc.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from manual_bp.backprop import backprop
from manual_bp.convert import ConversionReport, convert, restore
from manual_bp.costs._cost import Cost
from manual_bp.costs.quadratic import QuadraticCost, QuadraticCostFunction, quadratic_cost
from manual_bp.costs.sigmoid_cross_entropy import (
    SigmoidCrossEntropyCost,
    SigmoidCrossEntropyCostFunction,
    sigmoid_cross_entropy_cost,
)
from manual_bp.costs.softmax_cross_entropy import (
    SoftmaxCrossEntropyCost,
    SoftmaxCrossEntropyCostFunction,
    softmax_cross_entropy_cost,
)
from manual_bp.layers.leaky_relu import LeakyReLU, LeakyReLUFunction, leaky_relu
from manual_bp.layers.linear import Linear, LinearFunction, linear
from manual_bp.layers.linear_sigmoid import LinearSigmoid, LinearSigmoidFunction, linear_sigmoid
from manual_bp.layers.relu import ReLU, ReLUFunction, relu
from manual_bp.layers.sigmoid import Sigmoid, SigmoidFunction, sigmoid
from manual_bp.layers.softplus import Softplus, SoftplusFunction, softplus
from manual_bp.layers.tanh import Tanh, TanhFunction, tanh
from manual_bp.record import record
from manual_bp.trace import Diagnostics, LayerDiagnostics, LayerTrace, Trace

if TYPE_CHECKING:
    from manual_bp.training_step import (
        Adam,
        AdamW,
        CapturedStep,
        CompiledStep,
        EnsembleStep,
        TrainingStep,
    )

__version__ = "0.2.0"

__all__ = [
    "Adam",
    "AdamW",
    "CapturedStep",
    "CompiledStep",
    "ConversionReport",
    "Cost",
    "Diagnostics",
    "EnsembleStep",
    "LayerDiagnostics",
    "LayerTrace",
    "LeakyReLU",
    "LeakyReLUFunction",
    "Linear",
    "LinearFunction",
    "LinearSigmoid",
    "LinearSigmoidFunction",
    "QuadraticCost",
    "QuadraticCostFunction",
    "ReLU",
    "ReLUFunction",
    "Sigmoid",
    "SigmoidCrossEntropyCost",
    "SigmoidCrossEntropyCostFunction",
    "SigmoidFunction",
    "SoftmaxCrossEntropyCost",
    "SoftmaxCrossEntropyCostFunction",
    "Softplus",
    "SoftplusFunction",
    "Tanh",
    "TanhFunction",
    "Trace",
    "TrainingStep",
    "backprop",
    "convert",
    "leaky_relu",
    "linear",
    "linear_sigmoid",
    "quadratic_cost",
    "record",
    "relu",
    "restore",
    "sigmoid",
    "sigmoid_cross_entropy_cost",
    "softmax_cross_entropy_cost",
    "softplus",
    "tanh",
]

if not TYPE_CHECKING:  # else a type checker would take any name for one of the package

    def __getattr__(name: str) -> object:
        # The training step is the slowest room to import, and many programs do not use it. The
        # others cannot wait: once anything imports the module `record`, it would hide the function.
        if name not in __all__ and name != "training_step":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        room = import_module("manual_bp.training_step")
        globals().update({each: getattr(room, each) for each in room.__all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "training_step"})
