from typing import Any

import pytest
import torch

from experiments.benchmark import layers
from experiments.benchmark.contender import Contender, InexactError
from experiments.benchmark.layers import calls, forward_and_backward, networks
from experiments.benchmark.measure import peak_bytes
from experiments.benchmark.problem import problem
from manual_bp import Linear, LinearSigmoid, Sigmoid
from manual_bp.layers._activation import ACTIVATIONS


def by_name(contenders: list[Contender]) -> dict[str, Contender]:
    return {contender.name: contender for contender in contenders}


def test_networks_are_what_their_names_say() -> None:
    nets = networks(problem((6, 5, 4), 3, "cpu").net)
    assert [type(m) for m in nets["torch"]] == [torch.nn.Linear, torch.nn.Sigmoid] * 2
    assert [type(m) for m in nets["Linear, Sigmoid"]] == [Linear, Sigmoid] * 2
    assert [type(m) for m in nets["LinearSigmoid"]] == [LinearSigmoid] * 2


def test_every_activation_is_called() -> None:
    assert list(calls("cpu"))[:3] == ["linear", "Linear", "linear_sigmoid"]
    assert len(calls("cpu")) == 3 + len(ACTIVATIONS)


def test_all_networks_have_the_same_gradients() -> None:
    for contender in forward_and_backward(problem((6, 5, 4), 3, "cpu")):
        contender.check()
        assert len(contender.results()) == 4


def test_a_network_with_other_gradients_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        nets = networks(*arguments)
        torch.nn.init.zeros_(nets["LinearSigmoid"][0].get_parameter("weight"))
        return nets

    monkeypatch.setattr(layers, "networks", wrong)
    contenders = by_name(forward_and_backward(problem((6, 5, 4), 3, "cpu")))
    contenders["Linear, Sigmoid"].check()
    with pytest.raises(InexactError, match="inexact: off by "):
        contenders["LinearSigmoid"].check()


@pytest.mark.skipif(
    not hasattr(torch.autograd.Function, "boxed_grads_call"), reason="needs torch 2.13"
)
@pytest.mark.parametrize("sizes", [(256,) * 5, (16,) * 5], ids=["weights", "activations"])
def test_the_fused_layer_holds_no_more_memory_than_pytorchs_pair(sizes: tuple[int, ...]) -> None:
    """Where weights fill the memory, and where activations do."""
    contenders = by_name(forward_and_backward(problem(sizes, 128, "cpu")))
    for contender in contenders.values():
        contender.check()
    peaks = {name: peak_bytes(contender.call, "cpu") for name, contender in contenders.items()}
    # PyTorch's own peak varies by a small gradient or two with the order in which it frees them.
    half_an_activation = 128 * sizes[0] * 4 / 2
    assert peaks["LinearSigmoid"] <= peaks["torch"] + half_an_activation
