"""A program that knows only the installed package.

`.ci/run` installs the wheel beside PyTorch, runs this, and has mypy and pyright check its types.
"""

from typing import assert_type

import torch
from torch import Tensor, nn

from manual_bp import (
    Cost,
    Linear,
    LinearSigmoid,
    QuadraticCost,
    Sigmoid,
    Trace,
    TrainingStep,
    backprop,
    convert,
    record,
    sigmoid,
)
from manual_bp.verify import Report, check_function, check_module

x, y = torch.rand(5, 3), torch.rand(5, 2)
net = nn.Sequential(Linear(3, 4), Sigmoid(), LinearSigmoid(4, 2))
cost: Cost = QuadraticCost()

assert_type(sigmoid(x), Tensor)
assert_type(backprop(net, x, y, cost), Trace)

with record(net) as trace:
    cost(net(x), y).backward()
assert_type(trace, Trace)
assert_type(trace.layers[0].delta, Tensor)

step = TrainingStep(net, cost, lr=0.1)
assert_type(step(x, y), Tensor)
assert_type(step.lr, float)

others = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())
assert len(convert(others).changed) == 2

report = check_module(Sigmoid, [(x.double(),)], nn.Sigmoid)
assert_type(report, Report)
assert report.ok
assert not check_function(lambda z: z.detach() * z, [(x.double(),)], torch.square).ok
