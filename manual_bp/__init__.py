"""Backpropagation written out by hand, for PyTorch.

    Linear, Sigmoid                  drop-in `nn.Module`s; as functions: linear, sigmoid
    QuadraticCost                    on output activations a; as a function: quadratic_cost
    SigmoidCrossEntropyCost          on weighted inputs z; sigmoid_cross_entropy_cost
    SoftmaxCrossEntropyCost          on weighted inputs z; softmax_cross_entropy_cost
    backprop(net, x, y, cost)        BP1 to BP4 without autograd; returns a Trace

Behind each layer and cost stands a `torch.autograd.Function`, public as well: `LinearFunction`
and so on.
"""

from manual_bp.backprop import backprop
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
from manual_bp.layers.linear import Linear, LinearFunction, linear
from manual_bp.layers.sigmoid import Sigmoid, SigmoidFunction, sigmoid
from manual_bp.trace import LayerTrace, Trace

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "LayerTrace",
    "Linear",
    "LinearFunction",
    "QuadraticCost",
    "QuadraticCostFunction",
    "Sigmoid",
    "SigmoidCrossEntropyCost",
    "SigmoidCrossEntropyCostFunction",
    "SigmoidFunction",
    "SoftmaxCrossEntropyCost",
    "SoftmaxCrossEntropyCostFunction",
    "Trace",
    "backprop",
    "linear",
    "quadratic_cost",
    "sigmoid",
    "sigmoid_cross_entropy_cost",
    "softmax_cross_entropy_cost",
]
