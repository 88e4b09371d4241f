"""The forms of a Function that is written once, and who calls which."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

import manual_bp
from manual_bp import Linear, Sigmoid, _autocast, _function
from manual_bp._autocast import autocast, autocast_to_float32
from manual_bp._function import as_callable, has_concrete_values
from tests.helpers import assert_same


class Cube(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x * x * grad

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x * x * dx


cube = as_callable(Cube)


def test_eager_code_uses_the_cheap_form(monkeypatch: pytest.MonkeyPatch) -> None:
    # The slow form binds the signature of forward at every call.
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("the slow form"))
    x = torch.tensor(2.0, requires_grad=True)
    y = cube(x)
    assert y.item() == 8
    assert torch.autograd.grad(y, x)[0].item() == 12
    assert type(y.grad_fn).__name__ == "CubeBackward"


def test_a_subclass_overrides_a_call_by_its_torch_function() -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func.__name__, args[1:]

    z = torch.ones(2).as_subclass(Loud)
    assert manual_bp.leaky_relu(z, 0.5) == ("leaky_relu", (0.5, False))


def test_nothing_is_saved_for_forward_ad_outside_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context: Any = torch.autograd.function.FunctionCtx
    monkeypatch.setattr(context, "save_for_forward", lambda *_: pytest.fail("saved"))
    x, w = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2)
    manual_bp.linear(x, w)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(pytest.fail.Exception, match="saved"),
    ):
        manual_bp.linear(x, w)


def test_only_a_boxed_backward_holds_its_gradient() -> None:
    """A gradient made by the engine is freed once the backward deletes it."""
    alive: list[bool] = []

    class Watched(Cube):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return Watched.backward_boxed(ctx, [grad])

        @staticmethod
        def backward_boxed(ctx: Any, grads: list[Tensor]) -> Tensor:
            grad = grads.pop()
            watch = weakref.ref(grad)
            x = ctx.saved_tensors[0]
            found: Tensor = 3 * x * x * grad
            del grad
            alive.append(watch() is not None)
            return found

    x = torch.tensor(2.0, requires_grad=True)
    (as_callable(Watched)(x) * 2).backward()
    assert x.grad is not None
    assert x.grad.item() == 24
    assert torch.func.grad(as_callable(Watched))(torch.tensor(2.0)).item() == 12
    assert alive == [not hasattr(Function, "boxed_grads_call"), True]


def test_transforms_use_the_form_with_setup_context() -> None:
    assert torch.func.grad(cube)(torch.tensor(2.0)).item() == 12
    assert torch.func.hessian(cube)(torch.tensor(2.0)).item() == 12
    assert torch.func.vmap(torch.func.grad(cube))(torch.arange(3.0)).tolist() == [0, 3, 12]
    tangent = torch.func.jvp(cube, (torch.tensor(2.0),), (torch.tensor(1.0),))[1]
    assert tangent.item() == 12


def test_forward_mode_works_in_eager_code() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        tangent = torch.autograd.forward_ad.unpack_dual(cube(dual)).tangent
    assert tangent is not None
    assert tangent.item() == 12


def test_the_compiler_uses_the_form_without_jvp() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cube, fullgraph=True, backend="aot_eager")
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [12, 27]


def test_transforms_can_be_compiled() -> None:
    torch._dynamo.reset()
    per_sample = torch.func.vmap(torch.func.grad(cube))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    assert compiled(torch.arange(3.0)).tolist() == [0, 3, 12]


def test_fallbacks_of_private_names_give_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_function, "transforms_are_active", lambda: True)
    monkeypatch.setattr(_autocast, "any_autocast_is_on", lambda: True)
    x = torch.tensor(2.0, requires_grad=True)
    assert torch.autograd.grad(cube(x), x)[0].item() == 12
    assert autocast(x, None) == (x, None)
    assert not has_concrete_values(torch.ones(2))


def test_autocast_casts_as_pytorch_does(device: torch.device) -> None:
    tensors = [torch.ones(2, dtype=dtype, device=device) for dtype in (
        torch.float32, torch.float64, torch.float16, torch.int64, torch.complex64
    )]  # fmt: skip
    assert all(one is two for one, two in zip(autocast(*tensors), tensors, strict=True))
    with torch.autocast(device.type, torch.bfloat16):
        assert [t.dtype for t in autocast(*tensors)] == [
            torch.bfloat16, torch.float64, torch.bfloat16, torch.int64, torch.complex64
        ]  # fmt: skip
        assert [t.dtype for t in autocast_to_float32(*tensors)] == [
            torch.float32, torch.float64, torch.float32, torch.int64, torch.complex64
        ]  # fmt: skip
        with torch.autocast(device.type, enabled=False):
            assert autocast(*tensors)[0].dtype is torch.float32


def test_autocast_leaves_tensors_of_devices_without_it() -> None:
    meta = torch.ones(2, device="meta")
    with torch.autocast("cpu"):
        assert autocast(meta, "no tensor") == (meta, "no tensor")  # type: ignore[arg-type]


def test_only_plain_tensors_outside_of_transforms_have_concrete_values() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(has_concrete_values(x)) or x)(torch.ones(2))  # type: ignore[func-returns-value]
    assert seen == [False]
    assert has_concrete_values(torch.ones(2))
    assert has_concrete_values(torch.nn.Parameter(torch.ones(2)))
    assert not has_concrete_values(torch.ones(2).as_subclass(Labelled))


class Labelled(Tensor):
    pass


def network(linear: type[nn.Linear], sigmoid: type[nn.Sigmoid]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(linear(3, 4), sigmoid(), linear(4, 2)).double()


def transformed(net: nn.Module) -> dict[str, Callable[[Tensor], Any]]:
    """The transforms of torch.func, of a network whose parameters require gradients."""
    parameters: dict[str, Any] = dict(net.named_parameters())

    def loss(parameters: dict[str, Any], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).pow(3).sum()  # type: ignore[no-any-return]

    def of_input(x: Tensor) -> Tensor:
        return net(x).pow(3).sum()  # type: ignore[no-any-return]

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    return {
        "vmap": torch.func.vmap(net),
        "grad by the input": torch.func.grad(of_input),
        "grad by the parameters": lambda x: torch.func.grad(loss)(parameters, x),
        "per-sample gradients": lambda x: per_sample(parameters, x),
        "jvp": lambda x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
        "jacrev": torch.func.jacrev(net),
        "jacfwd": torch.func.jacfwd(net),
        "hessian": torch.func.hessian(of_input),
    }


@pytest.mark.parametrize("name", transformed(network(nn.Linear, nn.Sigmoid)))
@pytest.mark.parametrize("compiled", [True, False])
def test_transforms_of_a_network_match_pytorchs(
    name: str, compiled: bool, device: torch.device
) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    call = transformed(network(Linear, Sigmoid).to(device))[name]
    expected = transformed(network(nn.Linear, nn.Sigmoid).to(device))[name]
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="eager")
    assert_same(tree_leaves(call(x)), tree_leaves(expected(x)))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_network_can_still_be_trained(strict: bool) -> None:
    net, theirs = network(Linear, Sigmoid), network(nn.Linear, nn.Sigmoid)
    x = torch.randn(5, 3, dtype=torch.float64)
    exported = torch.export.export(net, (x,), strict=strict).module()
    exported(x).pow(3).sum().backward()
    theirs(x).pow(3).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in exported.named_parameters():
        assert_same([parameter.grad], [expected[name].grad])  # type: ignore[list-item]
