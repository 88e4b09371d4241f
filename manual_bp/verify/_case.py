"""What is to be judged: a call, samples of its arguments, and a reference that is trusted."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from manual_bp.verify._warnings import pytorchs_own_left_out

Sample = tuple[Any, ...]
Samples = Sequence[Sample] | Callable[[torch.Generator], Sequence[Sample]]

CAPABILITIES = frozenset(
    {
        "autocast",
        "bfloat16",
        "compile",
        "compile_dynamic",
        "double_backward",
        "export",
        "factory_kwargs",
        "float16",
        "float32",
        "forward_ad",
        "forward_over_reverse",
        "frugal",
        "infinite_values",
        "no_rows",
        "one_dimensional",
        "one_row",
        "per_sample_gradients",
        "third_order",
        "three_dimensional",
        "vmap",
    }
)


@dataclass(frozen=True)
class Case:
    """One Function or module to be judged; made by `function_case` or `module_case`.

    call: Takes the arguments of a sample; a module's parameters are arguments too, the last ones.
    draw: Makes samples from a generator, the same ones from the same seed.
    reference: What is right, as ordinary differentiable PyTorch; None if there is none.
    supports: Capabilities that must work. Others may be refused, but never silently wrong.
    in_dims: As for `torch.vmap`: which dimension of which argument counts the samples.
    labels: What the arguments are called in messages.
    expected_failures: Names of checks that are known to fail, with the reason.
    factory, reference_factory: What makes the module and its reference, for a module.
    place: Where the case was found, as package.module:Name, if it was named so.
    """

    name: str
    call: Callable[..., Any]
    draw: Callable[[torch.Generator], Sequence[Sample]]
    reference: Callable[..., Any] | None
    supports: frozenset[str]
    in_dims: tuple[int | None, ...] | None
    device: torch.device
    seed: int
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    factory: Callable[[], nn.Module] | None = None
    reference_factory: Callable[[], nn.Module] | None = None
    place: str = ""

    def label(self, position: int) -> str:
        """What an argument is called in messages."""
        return self.labels[position] if position < len(self.labels) else f"argument {position}"


@pytorchs_own_left_out()
def function_case(
    fn: Any,
    samples: Samples,
    reference: Callable[..., Any] | None = None,
    *,
    name: str = "",
    supports: Iterable[str] = (),
    in_dims: tuple[int | None, ...] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
) -> Case:
    """A case of a callable, or of an `autograd.Function` class.

    Args:
        fn: What is judged.
        samples: A list of argument tuples, or a function of a generator that makes one.
        reference: What is right, as ordinary differentiable PyTorch.
        name: What to call the case; that of fn if empty.
        supports: Capabilities that must work.
        in_dims: As for `torch.vmap`: which dimension of which argument counts the samples.
        device: Where to run.
        seed: What all random numbers start from.
        expected_failures: Names of checks that are known to fail, with the reason.

    Raises:
        TypeError: fn or reference cannot be called, or samples are no tuples.
        ValueError: A capability is unknown, or in_dims does not fit the samples.
    """
    draw = _as_draw(samples)
    _check_in_dims(in_dims, draw)
    is_function = isinstance(fn, type) and issubclass(fn, Function)
    call = fn.apply if is_function else fn
    _require_callable("fn", call)
    if reference is not None:
        _require_callable("reference", reference)
    return Case(
        name=name or getattr(fn, "__name__", type(fn).__name__),
        call=call,
        draw=draw,
        reference=reference,
        supports=_checked_capabilities(supports),
        in_dims=in_dims,
        device=torch.device(device or "cpu"),
        seed=seed,
        expected_failures=dict(expected_failures or {}),
        labels=_argument_names(fn.forward if is_function else fn, is_function),
    )


@pytorchs_own_left_out()
def module_case(
    factory: Callable[[], nn.Module],
    samples: Samples,
    reference: Callable[[], nn.Module] | None = None,
    *,
    name: str = "",
    supports: Iterable[str] = (),
    in_dims: tuple[int | None, ...] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
) -> Case:
    """A case of a module, its parameters lifted to arguments, so that their gradients count.

    Args:
        factory: Makes the module.
        samples: Arguments of its forward.
        reference: Makes a module that is trusted, with the same parameter names.
        name: What to call the case; the module's class if empty.
        supports: Capabilities that must work.
        in_dims: As for `torch.vmap`, for the arguments of forward.
        device: Where to run.
        seed: What all random numbers start from.
        expected_failures: Names of checks that are known to fail, with the reason.

    Raises:
        TypeError: factory or reference does not make modules, or samples are no tuples.
        ValueError: A capability is unknown, or the parameters of module and reference differ.
    """
    module = _made("factory", factory, seed, device)
    parameters = dict(module.named_parameters())
    reference_call = None
    if reference is not None:
        trusted = _made("reference", reference, seed, device)
        if set(dict(trusted.named_parameters())) != set(parameters):
            raise ValueError(
                f"reference must have the parameters of the module, {sorted(parameters)}; "
                f"got {sorted(dict(trusted.named_parameters()))}"
            )
        reference_call = _lifted(trusted, list(parameters))
    draw_inputs = _as_draw(samples, need_floats=not parameters)
    _check_in_dims(in_dims, draw_inputs)

    def draw(generator: torch.Generator) -> list[Sample]:
        values = tuple(
            p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            for p in parameters.values()
        )
        return [(*sample, *values) for sample in draw_inputs(generator)]

    count = len(draw_inputs(torch.Generator().manual_seed(seed))[0])
    return Case(
        name=name or type(module).__name__,
        call=_lifted(module, list(parameters)),
        draw=draw,
        reference=reference_call,
        supports=_checked_capabilities(supports),
        in_dims=None if in_dims is None else (*in_dims, *[None] * len(parameters)),
        device=torch.device(device or "cpu"),
        seed=seed,
        expected_failures=dict(expected_failures or {}),
        labels=(*[f"input {i}" for i in range(count)], *parameters),
        factory=factory,
        reference_factory=reference,
    )


def _argument_names(fn: Any, is_forward: bool) -> tuple[str, ...]:
    """What the arguments are called in the signature, as far as it says."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # what is written in C has none
        return ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[1:] if is_forward and names[:1] == ["ctx"] else names)


def _lifted(module: nn.Module, names: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        count = len(arguments) - len(names)
        values = dict(zip(names, arguments[count:], strict=True))
        floats = [t.dtype for t in arguments if is_differentiable(t) and not t.is_complex()]
        buffers = {
            name: buffer.to(floats[0] if buffer.is_floating_point() and floats else buffer.dtype)
            for name, buffer in module.named_buffers()
        }
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(module, values | copies, arguments[:count])

    return call


def _made(name: str, factory: Any, seed: int, device: torch.device | str | None) -> nn.Module:
    _require_callable(name, factory)
    torch.manual_seed(seed)
    module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must make an nn.Module; got {type(module).__name__}")
    return module.to(device or "cpu").double()


def _check_in_dims(in_dims: Any, draw: Callable[[torch.Generator], Sequence[Sample]]) -> None:
    if in_dims is None:
        return
    counts = {len(sample) for sample in draw(torch.Generator().manual_seed(0))}
    if not isinstance(in_dims, tuple) or {len(in_dims)} != counts:
        raise ValueError(f"in_dims must be a tuple with an entry for each argument; got {in_dims}")


def _as_draw(
    samples: Any, *, need_floats: bool = True
) -> Callable[[torch.Generator], Sequence[Sample]]:
    drawn = samples(torch.Generator().manual_seed(0)) if callable(samples) else samples
    if not isinstance(drawn, Sequence) or not drawn:
        raise TypeError(f"samples must be a sequence of argument tuples; got {drawn!r:.80}")
    for sample in drawn:
        if not isinstance(sample, tuple):
            raise TypeError(
                f"samples must be a sequence of argument tuples; got a {type(sample).__name__}"
            )
        for value in sample:
            if not isinstance(value, Tensor) and any(map(is_differentiable, tree_leaves(value))):
                raise TypeError(
                    f"samples must hold each floating or complex tensor as an argument of its own, "
                    f"for only those are judged; got one in a {type(value).__name__}, which "
                    f"lambda *tensors: call(list(tensors)) would make"
                )
    if need_floats and not all(any(map(is_differentiable, sample)) for sample in drawn):
        raise TypeError("samples must each hold a floating or complex tensor; got none")
    return samples if callable(samples) else lambda _: drawn


def _checked_capabilities(supports: Iterable[str]) -> frozenset[str]:
    if isinstance(supports, str):
        raise TypeError(f"supports must be names in a list or tuple; got {supports!r}")
    unknown = sorted(set(supports) - CAPABILITIES)
    if unknown:
        raise ValueError(f"supports must be of {sorted(CAPABILITIES)}; got {unknown}")
    return frozenset(supports)


def _require_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable; got {type(value).__name__}")


def is_differentiable(value: object) -> bool:
    """Whether autograd can give a gradient for it."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
