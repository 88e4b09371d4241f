"""What the tests of several layers and costs share."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from manual_bp.verify import CAPABILITIES, function_case, module_case
from manual_bp.verify._case import Case

Call = Callable[..., Tensor]

# float64 gradients agree up to rounding; a mistake of 0.1 % is ten million times larger.
RTOL, ATOL = 1e-10, 1e-13

# For the finite differences of gradcheck, which are accurate to about 1e-9 here.
CHECK: Any = {"rtol": 1e-6, "atol": 1e-8}

MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}

# The oldest PyTorch supported. docs/compatibility.md says what differs there.
IS_OLDEST = torch.__version__.startswith("2.11.")
differs_on_the_oldest = pytest.mark.xfail(IS_OLDEST, reason="PyTorch 2.11, see the docs")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "offset": lambda t: torch.cat([t[:1], t])[1:] if t.ndim else t,
    "constant": lambda t: t.flatten()[0].expand(t.shape) if t.numel() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
}


# Capabilities that complex numbers lack: they have no reduced precision and no order.
NOT_FOR_COMPLEX = {
    "autocast",
    "bfloat16",
    "factory_kwargs",
    "float16",
    "float32",
    "infinite_values",
}


def activation_cases(
    call: Any, reference: Call, module: Any, reference_module: Any, *, is_complex: bool = False
) -> list[Case]:
    """The cases of an activation for the verification kit: all capabilities, on every device."""

    def draw(generator: torch.Generator) -> Any:
        return [(torch.randn(5, 3, generator=generator, dtype=torch.float64),)]

    def draw_complex(generator: torch.Generator) -> Any:
        return [(torch.randn(5, 3, generator=generator, dtype=torch.complex128),)]

    supports = CAPABILITIES - {"factory_kwargs"}
    options: Any = {"in_dims": (0,)}
    cases = [module_case(module, draw, reference_module, supports=supports, **options)]
    for device in ("cpu", "cuda"):
        options["device"] = device
        cases.append(function_case(call, draw, reference, supports=supports, **options))
        if is_complex:
            options |= {"supports": CAPABILITIES - NOT_FOR_COMPLEX}
            name = f"complex_{call.__name__}"
            cases.append(function_case(call, draw_complex, reference, name=name, **options))
            del options["supports"]
    return cases


def leaf(tensor: Tensor) -> Tensor:
    """A leaf with the same values and strides that requires a gradient."""
    return tensor.detach().requires_grad_()


def is_differentiable(argument: object) -> bool:
    return isinstance(argument, Tensor) and (argument.is_floating_point() or argument.is_complex())


def gradients(
    call: Call, arguments: Sequence[Any], upstream: Tensor, **options: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output of a call, and the gradient of every argument that requires one."""
    output = call(*arguments)
    wanted = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    return output, list(torch.autograd.grad(output, wanted, upstream, **options))


def assert_same(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float = RTOL, atol: float = ATOL
) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=rtol, atol=atol)


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Hide all objects from the garbage collector but those made within.

    To go through all objects of a process that runs the whole suite takes a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def error(found: Tensor, right: Tensor) -> float:
    """The relative error of a tensor, against the right one in a finer dtype."""
    size = right.norm()
    difference: float = ((found.to(right.dtype) - right).norm() / size).item() if size else 0.0
    return difference


def assert_matches(
    ours: Call, reference: Call, arguments: Sequence[Any], upstream: Tensor | None = None
) -> None:
    """Value and gradients equal the reference's, for a random upstream gradient."""
    arguments = [leaf(t) if is_differentiable(t) else t for t in arguments]
    if upstream is None:
        upstream = torch.randn_like(reference(*arguments))
    our_output, our_gradients = gradients(ours, arguments, upstream)
    output, expected = gradients(reference, arguments, upstream)
    assert_same([our_output, *our_gradients], [output, *expected])


def assert_gradchecks(call: Call, arguments: Sequence[Any]) -> None:
    """Checks first and second derivatives in all modes of PyTorch's gradcheck."""
    arguments = [leaf(t) if is_differentiable(t) else t for t in arguments]
    assert gradcheck(
        call,
        arguments,
        check_undefined_grad=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        **CHECK,
    )
    assert gradgradcheck(
        call,
        arguments,
        check_undefined_grad=True,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        **CHECK,
    )


class Operations(TorchDispatchMode):
    """The names of the kernels that ran within the region."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def matrix_products(self) -> int:
        return sum(name in MATRIX_PRODUCTS for name in self.names)


def backward_operations(call: Call, arguments: Sequence[Any]) -> Operations:
    """The kernels that the backward of a call runs."""
    output = call(*arguments)
    upstream = torch.randn_like(output)
    wanted = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    operations = Operations()
    with operations:
        torch.autograd.grad(output, wanted, upstream)
    return operations


class Cut(Function):
    """Passes its input on, but no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def assert_undefined_gradient_costs_nothing(call: Call, arguments: Sequence[Any]) -> None:
    arguments = [leaf(t) if is_differentiable(t) else t for t in arguments]
    cut = Cut.apply(call(*arguments))
    upstream = torch.ones_like(cut)
    wanted = [t for t in arguments if is_differentiable(t)]
    operations = Operations()
    with operations:
        found = torch.autograd.grad(cut, wanted, upstream, allow_unused=True)
    assert found == (None,) * len(wanted)
    assert operations.names == []


def nodes(output: Tensor) -> Counter[str]:
    """The number of nodes of each kind in the graph of an output."""
    seen: set[Any] = set()
    queue: list[Any] = [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [below for below, _ in node.next_functions]
    return Counter(type(node).__name__ for node in seen)


def saved_tensors(call: Call, arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that a call saves for its backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(*arguments)
    assert output.requires_grad
    return saved


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def assert_no_derivative_kernel(call: Call, arguments: Sequence[Any]) -> None:
    """The backward runs ordinary operations only, none of PyTorch's derivative kernels."""
    arguments = [leaf(t) if is_differentiable(t) else t for t in arguments]
    names = backward_operations(call, arguments).names
    assert names
    assert not [name for name in names if name.endswith("_backward")]


def logged_in(folder: Path) -> Any:
    """Everything that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def logged_below(folder: Path) -> dict[str, Any]:
    """The same for each folder in a folder, by its name; "." is the folder itself."""
    places = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    return {str(place.relative_to(folder)): logged_in(place) for place in sorted(places)}


def refusal(main: Callable[[Sequence[str]], int], arguments: Sequence[str], capsys: Any) -> str:
    """What a program prints on stderr when it refuses its options with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said: str = capsys.readouterr().err
    return said
