"""Makes cases of functions and modules, and refuses input that cannot be judged."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp._torch import operator_arguments, operator_of, tree_leaves
from manual_bp.verify._arguments import Structure, dims_of, per_leaf, structure_of
from manual_bp.verify._case import (
    Call,
    Case,
    Draw,
    Dtypes,
    Sample,
    Samples,
    is_differentiable,
)
from manual_bp.verify._domain import Numbers, Project, domains, special_values
from manual_bp.verify._global_state import seed_pytorch
from manual_bp.verify._lifted import lifted
from manual_bp.verify._warnings import without_pytorch_warnings
from manual_bp.verify.checks import CAPABILITIES

# Those in which PyTorch computes; it only stores float8.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# With more, a gradient that is twice or half the right one might pass.
_MOST_RTOL = 0.1


@without_pytorch_warnings()
def function_case(
    fn: Any,
    samples: Samples,
    reference: Call | None = None,
    *,
    name: str = "",
    supports: Iterable[str] = (),
    in_dims: tuple[Any, ...] | None = None,
    dtypes: Iterable[Dtypes] = (torch.float64,),
    rtol: float = 0.0,
    atol: float = 0.0,
    varying: Sequence[tuple[Any, ...]] = (),
    project: Mapping[str, Project] | Mapping[int, Project] | None = None,
    special: Mapping[str, Numbers] | Mapping[int, Numbers] | None = None,
    gradient_of: Call | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
) -> Case:
    """A case of a callable, an `autograd.Function` class or an operator of `torch.library`.

    Args:
        fn: What is judged.
        samples: A list of argument tuples, or a function that makes one from a generator. Arguments
            may be nested in lists, tuples, dicts and registered classes, in all samples alike.
        reference: The same function in ordinary differentiable PyTorch.
        name: The name of the case; by default that of fn.
        supports: Capabilities that must work.
        in_dims: As for `torch.vmap`: the sample dimension of each argument, nested as the argument
            is, or one for all its tensors.
        dtypes: In which dtypes fn works. The floating arguments are converted to each of them in
            turn, complex ones to the complex dtype of the same precision. A tuple has one dtype for
            each argument, or None for one that stays as it is. The reference runs in float64, from
            the same rounded arguments.
        rtol: A relative tolerance in addition to that for rounding, for solvers and the like; at
            most 0.1.
        atol: An absolute one, likewise. Gradients must be larger than that at some sample.
        varying: Other dimensions that may have any size: as in_dims, once for each group of
            dimensions that have the same size.
        project: For arguments with a domain, by name or position: a function that maps a tensor
            into the domain (positive, sorted, symmetric ...). Every check that moves a sample uses
            it.
        special: Special values of arguments, by name or position: where a branch begins, such as 6
            for relu6, or an ignored label.
        gradient_of: For a gradient that is not the derivative on purpose (straight-through,
            surrogate): an ordinary PyTorch function that has the intended one. Its value does not
            matter; that is the reference's.
        device: Where to run.
        seed: The seed of all random numbers.
        expected_failures: Names of checks that are known to fail, with the reason.

    Raises:
        TypeError: fn or reference is not callable, or samples are not argument tuples.
        ValueError: A capability is unknown, a tolerance is negative, in_dims, dtypes, varying or
            project do not fit the samples, special names no argument, or gradient_of was given
            without a reference.

    Examples:
        >>> case = function_case(torch.sin, [(torch.randn(5, 3),)], torch.sin, in_dims=(0,))
        >>> run(case, only=["gradients_match_reference"]).verdict
        'ok'
    """
    is_function = isinstance(fn, type) and issubclass(fn, Function)
    call = _callable("fn", fn.apply if is_function else fn)
    if reference is not None:
        _callable("reference", reference)
    _require_reference(gradient_of, reference)
    drawn = _drawn(samples)
    structure = structure_of(drawn)
    operator = operator_of(fn)
    labels = structure.labels(
        operator_arguments(operator)
        or _argument_names(fn.forward if is_function else fn, is_function)
    )
    own_name = getattr(fn, "__name__", type(fn).__name__) if operator is None else operator.name()
    return Case(
        name=name or own_name,
        call=structure.call(call),
        draw=_as_draw(samples, structure),
        reference=None if reference is None else structure.call(reference),
        supports=_known_capabilities(supports),
        in_dims=dims_of("in_dims", in_dims, drawn),
        dtypes=_known_dtypes(dtypes, drawn[0]),
        rtol=_tolerance("rtol", rtol, _MOST_RTOL),
        atol=_tolerance("atol", atol),
        varying=tuple(dims_of("varying", group, drawn) for group in varying),
        device=torch.device(device or "cpu"),
        seed=seed,
        expected_failures=dict(expected_failures or {}),
        labels=labels,
        operator=operator,
        nested_inputs=structure.unflatten,
        project=domains(project, *_flat(labels, structure, drawn)),
        special=special_values(special, *_flat(labels, structure, drawn)),
        gradient_of=None if gradient_of is None else structure.call(gradient_of),
    )


@without_pytorch_warnings()
def module_case(
    factory: Callable[[], nn.Module],
    samples: Samples,
    reference: Callable[[], nn.Module] | None = None,
    *,
    name: str = "",
    supports: Iterable[str] = (),
    in_dims: tuple[Any, ...] | None = None,
    dtypes: Iterable[Dtypes] = (torch.float64,),
    rtol: float = 0.0,
    atol: float = 0.0,
    varying: Sequence[tuple[Any, ...]] = (),
    project: Mapping[str, Project] | Mapping[int, Project] | None = None,
    special: Mapping[str, Numbers] | Mapping[int, Numbers] | None = None,
    gradient_of: Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    expected_failures: Mapping[str, str] | None = None,
) -> Case:
    """A case of a module. Its parameters become arguments, so their gradients are judged too.

    The arguments are those of `function_case`, except:

    - factory: Makes the module.
    - samples: Arguments of its forward.
    - reference: Makes a module that is trusted, with the same parameter names.
    - gradient_of: Makes a module that has the intended gradient, likewise.
    - dtypes: A tuple has one dtype for each input. Then the parameters stay as they are made.

    Raises:
        TypeError: factory or reference does not make modules, or samples are not tuples.
        ValueError: As for `function_case`, or module and reference have different parameters.

    Examples:
        >>> def layer():
        ...     return nn.Linear(3, 2)
        >>> case = module_case(layer, [(torch.randn(5, 3),)], layer)
        >>> run(case, only=["gradients_match_reference"]).ok  # those of weight and bias, too
        True
    """
    module = _built("factory", factory, seed, device)
    trusted = _built_like("reference", reference, module, seed, device)
    intended = _built_like("gradient_of", gradient_of, module, seed, device)
    _require_reference(gradient_of, reference)
    parameters = dict(module.named_parameters())
    drawn = _drawn(samples, need_floats=not parameters)
    structure = structure_of(drawn)
    inputs = structure.labels([f"input {i}" for i in range(len(drawn[0]))])
    flat = _flat((*inputs, *parameters), structure, drawn, parameters.values())
    nones = (None,) * len(parameters)
    return Case(
        name=name or type(module).__name__,
        call=lifted(module, list(parameters), structure),
        draw=_with_parameters(_as_draw(samples, structure), list(parameters.values())),
        reference=trusted and lifted(trusted, list(parameters), structure),
        supports=_known_capabilities(supports),
        in_dims=None if in_dims is None else dims_of("in_dims", in_dims, drawn) + nones,
        dtypes=tuple(
            entry + nones if isinstance(entry, tuple) else entry
            for entry in _known_dtypes(dtypes, drawn[0])
        ),
        rtol=_tolerance("rtol", rtol, _MOST_RTOL),
        atol=_tolerance("atol", atol),
        varying=tuple(dims_of("varying", group, drawn) + nones for group in varying),
        device=torch.device(device or "cpu"),
        seed=seed,
        expected_failures=dict(expected_failures or {}),
        labels=(*inputs, *parameters),
        project=domains(project, *flat),
        special=special_values(special, *flat),
        gradient_of=intended and lifted(intended, list(parameters), structure),
        nested_inputs=structure.unflatten,
        parameters=len(parameters),
        module=module,
        reference_module=trusted,
        factory=factory,
        reference_factory=reference,
    )


def _argument_names(fn: Any, is_forward: bool) -> tuple[str, ...]:
    """The names of the positional arguments, as far as the signature tells them."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # functions written in C have no signature
        return ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[1:] if is_forward and names[:1] == ["ctx"] else names)


def _built_like(
    name: str, factory: Any, module: nn.Module, seed: int, device: torch.device | str | None
) -> nn.Module | None:
    """A module with the same parameters; None if no factory was given."""
    if factory is None:
        return None
    built = _built(name, factory, seed, device)
    wanted, found = (sorted(dict(m.named_parameters())) for m in (module, built))
    if found != wanted:
        raise ValueError(f"{name} must have the parameters of the module, {wanted}; got {found}")
    return built


def _require_reference(gradient_of: Any, reference: Any) -> None:
    if gradient_of is not None:
        _callable("gradient_of", gradient_of)
        if reference is None:
            raise ValueError("gradient_of must come with a reference, which gives the value")


def _with_parameters(draw: Draw, parameters: list[nn.Parameter]) -> Draw:
    """Samples of a module's inputs, followed by values near those of its parameters."""

    def draw_both(generator: torch.Generator) -> list[Sample]:
        values = tuple(
            p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            if is_differentiable(p)
            else p.detach()
            for p in parameters
        )
        return [(*sample, *values) for sample in draw(generator)]

    return draw_both


def _built(name: str, factory: Any, seed: int, device: torch.device | str | None) -> nn.Module:
    seed_pytorch(seed)
    module = _callable(name, factory)()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must make an nn.Module; got {type(module).__name__}")
    return module.to(device or "cpu")


def _drawn(samples: Any, *, need_floats: bool = True) -> Sequence[Sample]:
    """The first samples, which must be ones that can be judged."""
    drawn = samples(torch.Generator().manual_seed(0)) if callable(samples) else samples
    if not isinstance(drawn, Sequence) or not drawn:
        raise TypeError(f"samples must be a sequence of argument tuples; got {drawn!r:.80}")
    for sample in drawn:
        if not isinstance(sample, tuple):
            kind = type(sample).__name__
            raise TypeError(f"samples must be a sequence of argument tuples; got a {kind}")
    floats = [any(map(is_differentiable, tree_leaves(sample))) for sample in drawn]
    if need_floats and not all(floats):
        raise TypeError("samples must each hold a floating or complex tensor; got none")
    counts = sorted({len(sample) for sample in drawn})
    if len(counts) > 1:
        raise ValueError(f"samples must all have the same number of arguments; got {counts}")
    return drawn


def _as_draw(samples: Any, structure: Structure) -> Draw:
    draw = samples if callable(samples) else lambda _: samples
    return lambda generator: [structure.flatten(sample) for sample in draw(generator)]


def _flat(
    labels: Sequence[str],
    structure: Structure,
    drawn: Sequence[Sample],
    parameters: Iterable[Tensor] = (),
) -> tuple[list[str], list[int], list[Sample]]:
    """The name and the argument of each tensor, and the samples. Parameters follow the inputs."""
    samples = [(*structure.flatten(sample), *parameters) for sample in drawn]
    count = len(samples[0])
    names = [labels[i] if i < len(labels) else f"argument {i}" for i in range(count)]
    return names, structure.owners(count), samples


def _known_dtypes(dtypes: Any, sample: Sample) -> tuple[Dtypes, ...]:
    """The entries of dtypes, the widest first."""

    def eps(entry: Dtypes) -> float:
        members = entry if isinstance(entry, tuple) else (entry,)
        return min([torch.finfo(dtype).eps for dtype in members if dtype], default=0.0)

    entries = tuple(
        per_leaf("dtypes", entry, sample) if isinstance(entry, tuple) else entry
        for entry in (dtypes if isinstance(dtypes, Iterable) else ())
    )
    for entry in entries or (None,):
        for dtype in entry if isinstance(entry, tuple) else (entry,):
            is_none = dtype is None and isinstance(entry, tuple)
            if not is_none and dtype not in _DTYPES:
                raise ValueError(
                    f"dtypes must list float64, float32, bfloat16 or float16, or tuples with one "
                    f"of them or None for each argument; got {dtypes}"
                )
    return tuple(sorted(entries, key=eps))


def _tolerance(name: str, value: float, most: float = sys.float_info.max) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= most:
        limit = f"from 0 to {most:g}" if most < 1 else "that is not negative"
        raise ValueError(f"{name} must be a number {limit}; got {value}")
    return float(value)


def _known_capabilities(supports: Iterable[str]) -> frozenset[str]:
    if isinstance(supports, str):
        raise TypeError(f"supports must be names in a list or tuple; got {supports!r}")
    unknown = sorted(set(supports) - CAPABILITIES)
    if unknown:
        raise ValueError(f"supports must be names from {sorted(CAPABILITIES)}; got {unknown}")
    return frozenset(supports)


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be callable; got {type(value).__name__}")
    return value
