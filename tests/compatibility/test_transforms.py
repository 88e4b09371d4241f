"""torch.func, FX, and gradients of gradients, for every layer and cost."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from tests.compatibility.subjects import (
    Subject,
    every_layer,
    every_layer_with_weights,
    every_subject,
)
from tests.helpers import assert_gradchecks, assert_same

TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda call: grad(lambda *a: call(*a).pow(3).sum()),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda call: hessian(lambda *a: call(*a).pow(3).sum()),
    "jacfwd_of_jacrev": lambda call: jacfwd(jacrev(call)),
    "jvp": lambda call: lambda *a: jvp(lambda x: call(x, *a[1:]), a[:1], (a[0] + 1,)),
    "vjp": lambda call: lambda *a: vjp(lambda x: call(x, *a[1:]), a[0])[1](call(*a)),
}


def moved(subject: Subject) -> tuple[int | None, ...]:
    """The arguments that have a dimension of samples: all but the weights."""
    inputs = len(subject.inputs())
    return (0,) * inputs + (None,) * (len(subject.arguments()) - inputs)


@every_subject
@pytest.mark.parametrize("name", TRANSFORMS)
def test_func(subject: Subject, name: str, device: torch.device) -> None:
    arguments = subject.arguments(device=device)
    transform = TRANSFORMS[name]
    found = transform(subject.ours)(*arguments)
    assert_same(tree_leaves(found), tree_leaves(transform(subject.theirs)(*arguments)))


NESTED: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "jacfwd_of_jacfwd": lambda call: jacfwd(jacfwd(call)),
    "jacfwd_of_hessian": lambda call: jacfwd(hessian(lambda *a: call(*a).pow(3).sum())),
    "jvp_of_jvp": lambda call: (
        lambda x, *a: jvp(lambda x: jvp(lambda x: call(x, *a), (x,), (x + 1,))[1], (x,), (x - 1,))
    ),
}


@every_subject
@pytest.mark.parametrize("name", NESTED)
def test_forward_mode_within_forward_mode(
    subject: Subject, name: str, device: torch.device
) -> None:
    if name != "jvp_of_jvp" and subject.name == "sigmoid_cross_entropy_cost":
        pytest.skip("binary_cross_entropy_with_logits fails there: ZeroTensors are immutable")
    arguments = subject.arguments(device=device)
    transform = NESTED[name]
    found = transform(subject.ours)(*arguments)
    assert_same(tree_leaves(found), tree_leaves(transform(subject.theirs)(*arguments)))


@every_subject
@pytest.mark.parametrize("create_graph", [True, False])
def test_forward_over_reverse_in_eager_code(
    subject: Subject, create_graph: bool, device: torch.device
) -> None:
    arguments = subject.arguments(device=device)
    tangent = torch.randn_like(arguments[0])

    def hessian_vector_product(call: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(arguments[0].clone().requires_grad_(), tangent)
            cost = call(x, *arguments[1:]).pow(2).sum()
            (found,) = torch.autograd.grad(cost, x, create_graph=create_graph)
            product: Any = forward_ad.unpack_dual(found).tangent
            return product.detach()  # type: ignore[no-any-return]

    assert_same([hessian_vector_product(subject.ours)], [hessian_vector_product(subject.theirs)])


OVER_VMAP: dict[str, Callable[[Callable[..., Tensor], tuple[int, ...]], Callable[..., Any]]] = {
    "forward_over_reverse": lambda cost, wanted: hessian(cost, wanted),
    "reverse_over_reverse": lambda cost, wanted: jacrev(jacrev(cost, wanted), wanted),
    "functionalize": lambda cost, wanted: functionalize(grad(cost, wanted)),
    "vmap": lambda cost, wanted: (
        lambda *a: vmap(lambda _: hessian(cost, wanted)(*a))(torch.ones(2))
    ),
}


@every_subject
@pytest.mark.parametrize("name", OVER_VMAP)
def test_transforms_over_vmap(subject: Subject, name: str, device: torch.device) -> None:
    arguments = subject.arguments(device=device)
    wanted = tuple(i for i, t in enumerate(arguments) if t.is_floating_point())
    dims = moved(subject)

    def over_vmap(call: Callable[..., Tensor]) -> list[Tensor]:
        def cost(*arguments: Tensor) -> Tensor:
            return vmap(call, dims)(*arguments).pow(2).sum()

        return tree_leaves(OVER_VMAP[name](cost, wanted)(*arguments))

    assert_same(over_vmap(subject.ours), over_vmap(subject.theirs))


@every_layer
def test_gradients_of_functionalized_forward_mode(subject: Subject, device: torch.device) -> None:
    def tangent(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *a: jvp(lambda x: call(x, *a), (x,), (x + 1,))[1].pow(2).sum()

    arguments = subject.arguments(device=device)
    found, expected = (
        grad(functionalize(tangent(call)))(*arguments) for call in (subject.ours, subject.theirs)
    )
    assert_same([found], [expected])


@every_layer_with_weights
def test_transforms_under_no_grad(subject: Subject, device: torch.device) -> None:
    x, w, b = subject.arguments(device=device)
    with torch.no_grad():
        found, expected = (
            vmap(lambda x: jacfwd(lambda b: call(x, w, b))(b))(x)  # noqa: B023
            for call in (subject.ours, subject.theirs)
        )
    assert_same([found], [expected])


@every_subject
def test_per_sample_gradients(subject: Subject, device: torch.device) -> None:
    arguments = subject.arguments(device=device)
    wanted = tuple(i for i, t in enumerate(arguments) if t.is_floating_point())

    def per_sample(call: Callable[..., Tensor]) -> Callable[..., Any]:
        return vmap(grad(lambda *a: call(*a).pow(3).sum(), argnums=wanted), moved(subject))

    found = per_sample(subject.ours)(*arguments)
    assert_same(tree_leaves(found), tree_leaves(per_sample(subject.theirs)(*arguments)))


@every_subject
def test_derivatives_of_first_and_second_order(subject: Subject, device: torch.device) -> None:
    assert_gradchecks(subject.ours, subject.arguments(device=device))


@every_subject
def test_functional_call(subject: Subject, device: torch.device) -> None:
    ours, theirs = subject.modules(device=device)
    inputs = [
        t.requires_grad_() if t.is_floating_point() else t for t in subject.inputs(device=device)
    ]
    values = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    wanted = [*values.values(), *(t for t in inputs if t.requires_grad)]
    upstream = torch.randn_like(theirs(*inputs))
    found, expected = (
        torch.autograd.grad(functional_call(m, values, tuple(inputs)), wanted, upstream)
        for m in (ours, theirs)
    )
    assert found
    assert_same(found, expected)
    assert all(p.grad is None for p in ours.parameters())


@every_layer
def test_ensembles(subject: Subject, device: torch.device) -> None:
    """Several models in one call, the purpose of torch.func.stack_module_state."""
    pairs = [subject.modules(device=device) for _ in range(3)]
    (x,) = subject.inputs(device=device)
    results = []
    for models in zip(*pairs, strict=True):
        parameters, buffers = torch.func.stack_module_state(list(models))

        def run(p: Any, b: Any, x: Tensor, model: Any = models[0]) -> Tensor:
            return functional_call(model, (p, b), (x,))  # type: ignore[no-any-return]

        # Models without parameters do not differ, so map over the samples.
        dims = (0, 0, None) if parameters else (None, None, 0)
        results.append(vmap(run, dims)(parameters, buffers, x))
    assert_same([results[0]], [results[1]])


@every_subject
def test_symbolic_trace(subject: Subject, device: torch.device) -> None:
    module, _ = subject.modules(device=device)
    inputs = [
        t.requires_grad_() if t.is_floating_point() else t for t in subject.inputs(device=device)
    ]
    traced = torch.fx.symbolic_trace(module)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [subject.ours]
    for graph in (traced, pickle.loads(pickle.dumps(traced))):
        output = graph(*inputs)
        assert torch.equal(output, module(*inputs))
        assert type(output.grad_fn).__name__ == type(module(*inputs).grad_fn).__name__


@every_subject
def test_tensors_and_modes_with_a_torch_function(subject: Subject) -> None:
    class Named(Tensor):
        pass

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    arguments = subject.arguments()
    named = subject.ours(arguments[0].as_subclass(Named), *arguments[1:])
    assert type(named) is Named
    assert torch.equal(named.as_subclass(Tensor), subject.ours(*arguments))
    with Spy():
        subject.ours(*arguments)
    assert seen[0] is subject.ours


@every_layer
def test_symbolic_trace_of_a_model_matches_pytorchs(subject: Subject) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), subject.make(), torch.nn.GELU())
    x = torch.randn(5, 3)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
