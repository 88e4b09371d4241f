"""The sample inputs with which PyTorch's developers test it: values, gradients and errors.

Every installation has them, in torch.testing._internal, but they are no public API: if a later
PyTorch moves them, this file fails.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import convert, linear
from tests.activations import TABLE
from tests.helpers import assert_same, error

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings(action="ignore"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OURS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.linear": linear,
} | {
    op.name: activation.call
    for op in op_db
    for activation in TABLE
    if op.name in (activation.name, f"nn.functional.{activation.name}")
}
MODULES = {
    f"nn.{kind.__name__}": kind
    for kind in (nn.Linear, *(activation.reference_module for activation in TABLE))
}
OPS: list[Any] = [op for op in op_db if op.name in OURS]
MODULE_INFOS: list[Any] = [info for info in module_db if info.module_cls in MODULES.values()]

# Rounding of a product of several terms; for float64, the tolerance of all these tests.
TOLERANCE = {
    torch.float16: 4e-3,
    torch.complex32: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
}
REFUSED_VECTOR = r"w must have shape \(out, in\); got \(\d+,\)"
FINE = [torch.float64, torch.complex128]
# Where PyTorch computes with more digits and rounds once, ours rounds after each operation: the
# exact answer shows whether that costs too much accuracy.
EXACT = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex32: torch.complex128,
}


def assert_close(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype is their.dtype
        tolerance = TOLERANCE.get(our.dtype, 0)
        finite = their[their.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        atol = tolerance * scale / 100 if our.dtype in FINE else tolerance * scale
        torch.testing.assert_close(our, their, rtol=tolerance, atol=atol, equal_nan=True)


def assert_as_exact(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for our, their, right in zip(ours, theirs, exact, strict=True):
        if their.isfinite().all():  # otherwise there is no error to compare
            assert error(our, right) <= 2 * error(their, right) + torch.finfo(our.dtype).eps


def derivatives(
    call: Callable[[], Tensor],
    wanted: list[Tensor],
    order: int,
    weights: torch.dtype | None = None,
) -> list[Tensor]:
    """A value, its gradients and their gradients, with random weights of a dtype."""
    value = call()
    found = [value.detach()]
    if not wanted:
        return found
    torch.manual_seed(1)
    values, upstream = [value], [torch.randn_like(value, dtype=weights).to(value.dtype)]
    for _ in range(order):
        grads: Any = [None] * len(wanted)
        if values:  # a constant slope has no graph, or one whose derivatives are 0
            grads = torch.autograd.grad(
                values, wanted, upstream, create_graph=True, allow_unused=True
            )
        found += [
            torch.zeros_like(t) if g is None else g.detach()
            for t, g in zip(wanted, grads, strict=True)
        ]
        upstream = [torch.randn_like(t) for t in wanted]
        kept = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        values, upstream = [grads[i] for i in kept], [upstream[i] for i in kept]
    return found


def differentiable(values: Sequence[Any]) -> list[Tensor]:
    return [t for t in values if isinstance(t, Tensor) and t.requires_grad]


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def samples(op: Any, device: torch.device, dtype: torch.dtype, grads: bool) -> list[Any]:
    """PyTorch's samples; those of a million elements, which take most of the time, in float32."""
    with warnings.catch_warnings(action="ignore"):
        found = list(op.sample_inputs(device, dtype, requires_grad=grads))
        found += op.reference_inputs(device, dtype, requires_grad=grads)
    return [s for s in found if dtype is torch.float32 or s.input.numel() < 100_000]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_functions(op: Any, device: torch.device) -> None:
    """Every dtype and sample that PyTorch lists; one kind is refused, as documented."""
    ours, theirs = OURS[op.name], op.op
    trained = op.supported_backward_dtypes(device.type)
    count = 0
    for dtype in sorted(op.supported_dtypes(device.type), key=str):
        for sample in samples(op, device, dtype, dtype in trained):
            arguments = (sample.input, *sample.args)
            if ours is linear and arguments[1].ndim == 1:  # among the samples since 2.15
                with pytest.raises(ValueError, match=REFUSED_VECTOR):
                    ours(*arguments, **sample.kwargs)
                continue
            wanted = differentiable(arguments)
            found, expected = (
                derivatives(
                    lambda: call(*arguments, **sample.kwargs),  # noqa: B023
                    wanted,
                    order=2 if dtype in FINE else 1,
                )
                for call in (ours, theirs)
            )
            assert_close(found, expected)
            if dtype in EXACT:
                finer = [in_dtype(t, EXACT[dtype]) for t in arguments]
                exact = derivatives(
                    lambda: theirs(*finer, **sample.kwargs),  # noqa: B023
                    differentiable(finer),
                    order=1,
                    weights=expected[0].dtype,
                )
                assert_as_exact(found, expected, exact)
            count += 1
    assert count >= 20


@pytest.mark.parametrize("op", [op for op in OPS if op.inplace_variant], ids=lambda op: op.name)
def test_in_place_variants(op: Any, device: torch.device) -> None:
    if "inplace" not in signature(OURS[op.name]).parameters:
        pytest.skip(f"{op.name}_ is a method of Tensor; torch.nn has no such option")
    for sample in samples(op, device, torch.float64, True):
        found, expected = (
            derivatives(
                lambda: call(sample.input.clone(), *sample.args, **sample.kwargs),  # noqa: B023
                [sample.input],
                order=2,
            )
            for call in (
                lambda *a, **k: OURS[op.name](*a, inplace=True, **k),
                op.inplace_variant,
            )
        )
        assert_close(found, expected)


@pytest.mark.parametrize("info", MODULE_INFOS, ids=lambda info: info.name)
@pytest.mark.parametrize("training", [True, False])
def test_modules(info: Any, training: bool, device: torch.device) -> None:
    """Every dtype, constructor and input that PyTorch's ModuleInfo lists, without exception."""
    count = 0
    for dtype in info.dtypes:
        inputs = info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=True, training=training
        )
        for given in inputs:
            made = given.constructor_input
            theirs = info.module_cls(*made.args, **made.kwargs).to(device, dtype).train(training)
            ours = copy.deepcopy(theirs)
            (change,) = convert(ours).changed
            assert isinstance(change.after(*made.args, **made.kwargs), info.module_cls)
            arguments, options = given.forward_input.args, given.forward_input.kwargs
            leaves = differentiable([*arguments, *options.values()])
            found, expected = (
                derivatives(
                    lambda: module(*arguments, **options),  # noqa: B023
                    [*leaves, *module.parameters()],
                    order=2 if dtype in FINE else 1,
                )
                for module in (ours, theirs)
            )
            assert_close(found, expected)
            count += 1
    assert count >= 3


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


WRONG: dict[str, tuple[str, tuple[Any, ...]]] = {
    "too few columns": ("nn.functional.linear", (ones(5, 2), ones(4, 3))),
    "no dimension": ("nn.functional.linear", (torch.ones(()), ones(4, 3))),
    "bias too long": ("nn.functional.linear", (ones(5, 3), ones(4, 3), ones(5))),
    "weight of three dimensions": ("nn.functional.linear", (ones(5, 3), ones(2, 4, 3))),
    "another dtype": ("nn.functional.linear", (ones(5, 3), ones(4, 3, dtype=torch.float64))),
    "bias of another dtype": (
        "nn.functional.linear",
        (ones(5, 3), ones(4, 3), ones(4, dtype=torch.float64)),
    ),
    "integers and floats": ("nn.functional.linear", (ones(5, 3).long(), ones(4, 3))),
    "a list for linear": ("nn.functional.linear", ([[1.0]], ones(4, 3))),
    "a list for sigmoid": ("sigmoid", ([1.0],)),
    "a number for tanh": ("tanh", (1.0,)),
    "None for relu": ("nn.functional.relu", (None,)),
    "truth values for relu": ("nn.functional.relu", (ones(3, dtype=torch.bool),)),
    "complex numbers for relu": ("nn.functional.relu", (ones(3, dtype=torch.complex64),)),
    "integers for leaky_relu": ("nn.functional.leaky_relu", (ones(3).long(),)),
    "complex numbers for leaky_relu": (
        "nn.functional.leaky_relu",
        (ones(3, dtype=torch.complex64),),
    ),
    "integers for softplus": ("nn.functional.softplus", (ones(3).long(),)),
    "complex numbers for softplus": ("nn.functional.softplus", (ones(3, dtype=torch.complex64),)),
    "sparse weight, with bias": (
        "nn.functional.linear",
        (ones(5, 3), ones(4, 3).to_sparse(), ones(4).to_sparse()),
    ),
}

# What PyTorch accepts and ours refuse: (call, arguments, why, the message).
EXPLAINED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    # A bias broadcast to all neurons is more likely a mistake than intended.
    "bias of one element": (
        "nn.functional.linear",
        (ones(5, 3), ones(4, 3), ones(1)),
        r"b must have shape \(4,\), the first size of w; got \(1,\)",
    ),
    # The weights of one neuron without its dimension: no nn.Linear can have them.
    "weight of one dimension": (
        "nn.functional.linear",
        (ones(5, 3), ones(3)),
        r"w must have shape \(out, in\); got \(3,\)",
    ),
    # The formulas are for dense tensors.
    "sparse input": (
        "nn.functional.linear",
        (ones(5, 3).to_sparse(), ones(4, 3)),
        "a must be a dense tensor; got layout torch.sparse_coo",
    ),
    "sparse input of relu": (
        "nn.functional.relu",
        (ones(5, 3).to_sparse(),),
        "z must be a dense tensor; got layout torch.sparse_coo",
    ),
    # Below 0, the sign of a no longer tells the sign of z, and a is all that is kept.
    "negative slope below 0": (
        "nn.functional.leaky_relu",
        (ones(3), -0.5),
        "negative_slope must be at least 0; got -0.5",
    ),
    # ln(2) / 0: infinite everywhere.
    "beta of 0": ("nn.functional.softplus", (ones(3), 0), "beta must not be 0; got 0"),
}


def reference(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = next(op.op for op in OPS if op.name == name)
    return found


@pytest.mark.parametrize("case", WRONG)
def test_what_pytorch_refuses_is_refused(case: str) -> None:
    name, arguments = WRONG[case]
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        reference(name)(*arguments)
    with pytest.raises((TypeError, ValueError), match=r"must (have|be) "):
        OURS[name](*arguments)


@pytest.mark.parametrize("case", EXPLAINED)
def test_what_is_refused_beyond_pytorch(case: str) -> None:
    name, arguments, message = EXPLAINED[case]
    assert isinstance(reference(name)(*arguments), Tensor)
    with pytest.raises((TypeError, ValueError), match=message):
        OURS[name](*arguments)


def test_all_of_pytorchs_samples_are_found() -> None:
    assert {op.name for op in OPS} == set(OURS)
    assert {info.name for info in MODULE_INFOS} == set(MODULES)


def test_complex_linear_matches_pytorchs(device: torch.device) -> None:
    options: Any = {"dtype": torch.complex128, "device": device, "requires_grad": True}
    a, w, b = torch.randn(5, 3, **options), torch.randn(4, 3, **options), torch.randn(4, **options)
    found, expected = (
        derivatives(lambda: call(a, w, b), [a, w, b], 2)  # noqa: B023
        for call in (linear, F.linear)
    )
    assert_same(found, expected)
