"""What is saved and what is computed: frozen arguments, checkpoints, hooks, tied weights."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from experiments.benchmark.measure import peak_bytes
from manual_bp import Linear, LinearSigmoid, QuadraticCost, ReLU, convert
from tests.compatibility.subjects import (
    IN,
    Subject,
    every_layer_with_weights,
    every_subject,
)
from tests.helpers import (
    assert_matches,
    assert_same,
    backward_operations,
    is_differentiable,
    is_same_memory,
    leaf,
    only_new_objects,
    saved_tensors,
)


def leaves(arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [leaf(t) if is_differentiable(t) else t for t in arguments]


@every_subject
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(subject: Subject, use_reentrant: bool, device: torch.device) -> None:
    def checkpointed(*arguments: Tensor) -> Tensor:
        found: Tensor = checkpoint(subject.ours, *arguments, use_reentrant=use_reentrant)
        return found

    results = []
    arguments = subject.arguments(device=device)
    upstream = torch.randn_like(subject.ours(*arguments))
    for call in (checkpointed, subject.theirs):
        given = leaves(arguments)
        output = call(*given)
        output.backward(upstream)  # the reentrant mode refuses torch.autograd.grad
        results.append([output.detach(), *[t.grad for t in given if t.grad is not None]])
    ours, theirs = results
    assert len(ours) > 1
    assert_same(ours, theirs)


@pytest.mark.parametrize("leading", [(5,), (2, 5)], ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_checkpoint_with_a_policy_keeps_the_matrix_products(
    leading: tuple[int, ...], fuse: bool, device: torch.device
) -> None:
    """What the policy keeps is not overwritten."""
    products = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default}

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        keep = operation in products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        output: Any = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
        output.pow(2).sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid())
    net = net.double().to(device)
    theirs = copy.deepcopy(net)
    convert(net, fuse=fuse)
    x = torch.randn(*leading, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert_same(gradients(net, x), gradients(theirs, x))


def test_checkpoint_with_a_policy_notices_overwritten_products() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(2, 5, 4, requires_grad=True)
    expected = torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))
    convert(net)

    def policy(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    try:
        output: Any = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(output.pow(2).sum(), list(net.parameters()))
    except RuntimeError as error:
        assert "has been mutated" in str(error)  # noqa: PT017 (either is right, as in PyTorch)
    else:
        assert_same(found, expected, rtol=1e-5, atol=1e-6)


@every_subject
def test_saved_tensors_hooks(subject: Subject, device: torch.device) -> None:
    """The backward uses what the hooks return: here copies, or tensors moved elsewhere."""

    def packed(*arguments: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: (t.dtype, t.to(torch.float64).numpy(force=True)), back):
            return subject.ours(*arguments)

    def back(kept: Any) -> Tensor:
        dtype, values = kept
        return torch.from_numpy(values).to(device, dtype)

    def elsewhere(*arguments: Tensor) -> Tensor:
        with save_on_cpu():
            return subject.ours(*arguments)

    arguments = subject.arguments(device=device)
    for call in (packed, elsewhere):
        assert_matches(call, subject.theirs, arguments)


@every_layer_with_weights
def test_frozen_subsets(subject: Subject, device: torch.device) -> None:
    """Only the matrix products of the requested gradients run, and only what they need is saved."""
    a, w, b = subject.arguments(device=device)
    for needs_a, needs_w, needs_b in product((True, False), repeat=3):
        if not (needs_a or needs_w or needs_b):
            assert subject.ours(a, w, b).grad_fn is None
            continue
        needs = (needs_a, needs_w, needs_b)
        arguments = [leaf(t) if n else t for t, n in zip((a, w, b), needs, strict=True)]
        assert backward_operations(subject.ours, arguments).matrix_products == needs_a + needs_w
        kept = saved_tensors(subject.ours, arguments)
        assert any(is_same_memory(t, a) for t in kept) == needs_w
        assert any(is_same_memory(t, w) for t in kept) == needs_a
        assert not any(is_same_memory(t, b) for t in kept)
        assert_matches(
            lambda *free: subject.ours(*fill(free, needs, (a, w, b))),  # noqa: B023
            lambda *free: subject.theirs(*fill(free, needs, (a, w, b))),  # noqa: B023
            [t for t, n in zip((a, w, b), needs, strict=True) if n],
        )


def fill(free: Any, needs: Any, arguments: Any) -> list[Tensor]:
    given = iter(free)
    return [next(given) if n else t for t, n in zip(arguments, needs, strict=True)]


@every_layer_with_weights
def test_tied_weights(subject: Subject, device: torch.device) -> None:
    """One tensor as the weight of two layers, as its own bias, and as both input and weight."""
    options: Any = {"dtype": torch.float64, "device": device}
    x, w, b = torch.randn(5, IN, **options), torch.randn(IN, IN, **options), torch.randn(IN)
    b = b.to(**options)

    def twice(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: call(call(x, w, b), w, b)

    def square(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, b: call(w, w, b)

    def row(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w: call(x, w, w[0])

    for tie, arguments in ((twice, (x, w, b)), (square, (w, b)), (row, (x, w))):
        assert_matches(tie(subject.ours), tie(subject.theirs), arguments)


def test_a_backward_of_fused_layers_needs_as_much_memory_as_that_of_pytorchs_pairs() -> None:
    """Before 2.13 half as much again, because the engine keeps the gradient that it passed on."""
    fused = nn.Sequential(*(LinearSigmoid(64, 64) for _ in range(4)))
    pairs = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Sigmoid())))
    peaks = []
    for net in (fused, pairs):
        x = torch.randn(256, 64, requires_grad=True)
        cost = net.requires_grad_(False)(x).sum()
        backward = partial(torch.autograd.grad, cost, x, retain_graph=True)
        peaks.append(peak_bytes(backward, "cpu"))
    is_boxed = hasattr(Function, "boxed_grads_call")
    assert peaks[0] / peaks[1] == pytest.approx(1 if is_boxed else 1.5, abs=0.01)


@every_subject
def test_a_retained_graph_gives_the_same_gradients_again(
    subject: Subject, device: torch.device
) -> None:
    arguments = leaves(subject.arguments(device=device))
    output = subject.ours(*arguments)
    wanted = [t for t in arguments if is_differentiable(t)]
    upstream = torch.randn_like(output)
    first = torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(output, wanted, upstream)
    assert_same(first, second, rtol=0, atol=0)


@every_subject
def test_module_hooks_see_the_values_that_pytorchs_see(
    subject: Subject, device: torch.device
) -> None:
    seen: list[Tensor] = []

    def note(_: Any, grad_input: Any, grad_output: Any) -> None:
        seen.extend((grad_input[0], grad_output[0]))

    def double(_: Any, grad_output: Any) -> Any:
        return (2 * grad_output[0],)

    inputs = leaves(subject.inputs(device=device))
    for module in subject.modules(device=device):
        module.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        module.register_full_backward_hook(note)
        module.register_full_backward_pre_hook(double)
        module(*inputs).sum().backward()
    half = len(seen) // 2
    assert half >= 3
    assert_same(seen[:half], seen[half:])


def test_thousands_of_steps_leave_no_object_behind() -> None:
    """Counts objects: anything that a step leaves behind would be there a thousand times."""
    net = nn.Sequential(Linear(3, 4), ReLU(inplace=True), LinearSigmoid(4, 2))
    cost = QuadraticCost()
    x, y = torch.randn(5, 3), torch.rand(5, 2)

    def steps(count: int) -> int:
        for _ in range(count):
            net.zero_grad()
            cost(net(x), y).backward()
        gc.collect()
        return len(gc.get_objects())

    steps(10)
    with only_new_objects():
        assert steps(1000) < 100
