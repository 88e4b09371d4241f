"""Modules whose parameters backward reads again, and modules with a state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from manual_bp.verify import check_module, module_case
from tests.verify.test_run import message, status


def rows(g: Generator) -> list[tuple[Tensor]]:
    return [(torch.randn(5, 3, generator=g),)]


class Net(nn.Module):
    """w2 tanh(w1 x + b1) + b2"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def inner(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Checkpointing(Net):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


class CheckpointedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class WrongCheckpointing(Checkpointing):
    def inner(self, x: Tensor) -> Tensor:
        w = 2 * self.second.weight - self.second.weight.detach()
        return F.linear(torch.tanh(self.first(x)), w, self.second.bias)


@pytest.mark.parametrize(
    ("module", "reference"),
    [(Checkpointing, Net), (partial(CheckpointedLinear, 3, 4), partial(nn.Linear, 3, 4))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_may_checkpoint_inside(module: Any, reference: Any, dtype: torch.dtype) -> None:
    given: Any = {"slow": False, "in_dims": (0,), "dtypes": [dtype]}
    report = check_module(module, rows, reference, **given)
    report.raise_if_failed()
    for check in ("interleaved_calls", "repeatable_backward", "double_backward"):
        assert status(report, check) == "passed"


def test_a_wrong_gradient_inside_a_checkpoint_is_found() -> None:
    report = check_module(WrongCheckpointing, rows, Net, only=["gradients_match_reference"])
    assert "2 times the right one" in message(report, "gradients_match_reference")


def test_a_parameter_kept_outside_of_the_graph_is_still_found_stale() -> None:
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.w = w.data
            return F.linear(x, w)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            return grad @ ctx.w, grad.mT @ x

    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Keeps.apply(x, self.weight)

    only = ["stale_inputs_raise"]
    report = check_module(lambda: Keeping(3, 4, bias=False), rows, only=only)
    assert "after weight was changed in place" in message(report, *only)


class Tied(nn.Module):
    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        w = self.second.weight
        w = self.slope * w + (1 - self.slope) * w.detach()
        return F.linear(torch.tanh(self.first(x)), w, self.second.bias)


def test_a_tied_parameter_is_one_argument_in_all_its_places() -> None:
    assert module_case(Tied, rows).labels == (
        "input 0",
        "first.weight",
        "first.bias",
        "second.bias",
    )
    check_module(Tied, rows, Tied, slow=False).raise_if_failed()
    report = check_module(lambda: Tied(2.0), rows, Tied, only=["gradients_match_reference"])
    assert "gradient of first.weight" in message(report, "gradients_match_reference")


class Doubled(nn.Module):
    """Twice a module whose slope is right in forward, and too large in backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        result = self.module(x)
        return 2 * result - result.detach()


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "spectral norm of old": lambda: spectral_norm(nn.Linear(3, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_no_false_alarm_on_a_module_with_a_state_in_training_mode(name: str) -> None:
    check_module(STATEFUL[name], rows, STATEFUL[name], slow=False).raise_if_failed()


@pytest.mark.parametrize("name", ["batch norm", "spectral norm"])
def test_a_wrong_module_with_a_state_is_found(name: str) -> None:
    right = STATEFUL[name]
    only = ["finite_differences", "gradients_match_reference"]
    report = check_module(lambda: Doubled(right()), rows, lambda: Same(right()), only=only)
    assert {status(report, check) for check in only} == {"failed"}


class Same(Doubled):
    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def test_what_forward_made_of_the_buffers_can_be_read() -> None:
    case = module_case(lambda: nn.BatchNorm1d(3), rows, lambda: nn.BatchNorm1d(3))
    (sample,) = case.draw(Generator().manual_seed(0))
    sample = tuple(t.double() for t in sample)
    assert case.module is not None
    for _ in range(2):  # each call begins with the first state
        case.call(*sample)
        assert int(case.module.get_buffer("num_batches_tracked")) == 1
        expected = 0.1 * sample[0].mean(0)
        assert torch.allclose(case.module.get_buffer("running_mean"), expected)


class Unpicklable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.function = lambda: None


def test_a_module_is_not_at_fault_if_its_reference_cannot_be_pickled_either() -> None:
    report = check_module(Unpicklable, rows, Unpicklable, only=["pickle"])
    assert message(report, "pickle") == "the reference cannot be pickled either"
    report = check_module(Unpicklable, rows, lambda: nn.Linear(3, 4), only=["pickle"])
    assert status(report, "pickle") == "failed"
    assert status(check_module(Unpicklable, rows, only=["pickle"]), "pickle") == "failed"


def test_compiled_and_exported_modules_use_the_parameters_of_the_sample() -> None:
    only = ["gradients_match_reference", "compile", "export"]
    check_module(Net, rows, Net, only=only, supports=only[1:]).raise_if_failed()
