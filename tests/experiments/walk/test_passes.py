import pytest
import torch
import torch.nn.functional as F

from experiments.networks import activations
from experiments.walk.__main__ import Config, invent
from experiments.walk.passes import one_pass, parameters
from manual_bp.layers._activation import Activation


@pytest.mark.parametrize("cost", ["quadratic", "sigmoid-cross-entropy", "softmax-cross-entropy"])
@pytest.mark.parametrize("activation", sorted(activations()))
def test_the_numbers_are_those_of_autograd_and_its_optimiser(activation: str, cost: str) -> None:
    config = Config(sizes=(4, 5, 3, 2), activation=activation, cost=cost)  # type: ignore[arg-type]
    net, x, y, c, _ = invent(config)
    net.double()
    x, y = x.double(), y.double()
    found = one_pass(net, x, y, c, 0.5)
    torch.testing.assert_close(found["a0"], x, rtol=0, atol=0)
    tensors, a = [], x
    for module in net:
        a = of_pytorch(module, a)
        a.retain_grad()
        tensors.append(a)
    loss = c(a, y)
    loss.backward()
    torch.testing.assert_close(found["cost"], loss.detach().view(1, 1))
    layers = [module for module in net if isinstance(module, torch.nn.Linear)]
    for k, layer in enumerate(layers, start=1):
        z = tensors[2 * k - 2]
        a = tensors[2 * k - 1] if 2 * k - 1 < len(tensors) else z
        torch.testing.assert_close(found[f"z{k}"], z.detach())
        torch.testing.assert_close(found[f"a{k}"], a.detach())
        torch.testing.assert_close(found[f"delta{k}"], z.grad)
        torch.testing.assert_close(found[f"grad_w{k}"], layer.weight.grad)
        torch.testing.assert_close(found[f"grad_b{k}"][0], layer.bias.grad)
        if k < len(layers):
            assert a.grad is not None
            torch.testing.assert_close(found[f"back{k}"], a.grad)
            torch.testing.assert_close(found[f"sigma_prime{k}"] * a.grad, z.grad)
    assert a.grad is not None
    torch.testing.assert_close(found["grad_a"], a.grad)
    torch.testing.assert_close(found["losses"].mean(), loss.detach())
    torch.optim.SGD(net.parameters(), 0.5).step()
    for name, new in parameters(net).items():
        torch.testing.assert_close(found[f"{name[0]}_new{name[1:]}"], new)
    torch.testing.assert_close(found["a_new"], net(x).detach())
    torch.testing.assert_close(found["cost_new"][0, 0], c(net(x), y).detach())


def of_pytorch(module: torch.nn.Module, a: torch.Tensor) -> torch.Tensor:
    """What PyTorch's own function makes of a."""
    if isinstance(module, torch.nn.Linear):
        return F.linear(a, module.weight, module.bias)
    assert isinstance(module, Activation)
    found: torch.Tensor = getattr(F, type(module).function.__name__)(a)
    return found


def test_the_net_is_left_as_it_was() -> None:
    net, x, y, cost, _ = invent(Config())
    before = [p.detach().clone() for p in net.parameters()]
    one_pass(net, x, y, cost, 3.0)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
