"""The step as machine code: exported in place, compiled by AOTInductor, kept in a package.

A package holds no network, only a function of flat tensors,

    cost = run([x, y, lr, *parameters, *state])

which updates parameters and state, such as velocities, in place. Its metadata say what they must
look like.
"""

import json
import math
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from manual_bp import _require
from manual_bp._torch import compile_ahead, load_compiled
from manual_bp.costs._cost import Cost
from manual_bp.costs.softmax_cross_entropy import SoftmaxCrossEntropyCost
from manual_bp.training_step import _lowering
from manual_bp.training_step._clip import norm_dtype
from manual_bp.training_step._export import trace, write
from manual_bp.training_step._layer import fresh_buffers
from manual_bp.training_step._pass import Pass
from manual_bp.training_step._plan import Plan

# The name of our metadata in a package.
KEY = "manual_bp"


class Signature(NamedTuple):
    """What the function in a package takes.

    origin: The PyTorch that compiled it, and the kind of machine.
    largest_lr: Above it, a product of the rate is out of the range of dtype.
    inputs: The size of a sample of x.
    dtype: Of x, as "float32".
    target: The shape of one sample of y.
    target_dtype: Of y.
    classes: If y holds class indices, how many classes there are; else 0.
    clips: Whether the last tensor receives the norm of the gradient.
    parameters: Shape, strides and dtype of each, by its name.
    state: The same of what the rule keeps, by the kind of it and then by those names.
    """

    origin: str
    largest_lr: float
    inputs: int
    dtype: str
    target: list[int]
    target_dtype: str
    classes: int
    clips: bool
    parameters: dict[str, list[Any]]
    state: dict[str, dict[str, list[Any]]]

    def new_state(self) -> dict[str, dict[str, Tensor]]:
        """What the rule keeps, at its start."""
        return {
            slot: {
                name: torch.empty_strided(
                    shape, strides, dtype=getattr(torch, dtype), device="cpu"
                ).zero_()
                for name, (shape, strides, dtype) in wanted.items()
            }
            for slot, wanted in self.state.items()
        }

    def new_norm(self) -> Tensor:
        """Where the norm of the gradient goes."""
        dtype = norm_dtype(getattr(torch, self.dtype))
        return torch.full((), math.nan, dtype=dtype, device="cpu")


class InPlaceStep(nn.Module):
    """The step as a function that changes its arguments: parameters, what is kept, the norm."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._computation, self._clips = plan.computation, plan.descent.max_norm is not None
        self._names = list(plan.parameters)

    def forward(self, x: Tensor, y: Tensor, lr: Tensor, *state: Tensor) -> Tensor:
        """The cost before the step."""
        learned, rest = self._computation.learned, iter(state)
        values = {name: next(rest) for name in self._names}
        slots = self._computation.descent.chosen.slots
        kept = {slot: {name: next(rest) for name in learned} for slot in slots}
        norm = next(rest) if self._clips else x.new_empty((), dtype=norm_dtype(x.dtype))
        samples, allocate = x.shape[:-1], fresh_buffers(x)
        run = Pass(self._computation, values, kept, samples, allocate, norm, rate_is_tensor=True)
        return run(x, y, lr)


def state_of(plan: Plan) -> list[Tensor]:
    """All tensors that the function changes, as it takes them."""
    kept = [t for each in plan.learned_state.values() for t in each.values()]
    norm = [] if plan.descent.max_norm is None else [plan.norm]
    return [*(p.detach() for p in plan.parameters.values()), *kept, *norm]


@torch.no_grad()
def in_place_program(plan: Plan, x: Tensor, y: Tensor, *, any_size: bool) -> ExportedProgram:
    """The step for batches like x and y, or with any number of samples, if they are matrices."""
    state, lr, module = state_of(plan), x.new_zeros(()), InPlaceStep(plan)
    module(x, y, lr, *(t.clone() for t in state))  # so that bad batches are refused in our words
    if not any_size:
        return trace(module, (x, y, lr, *state), None, plan.computation.cost)
    samples = max(len(x), 2)  # PyTorch would take 1 for a constant
    x, y = (t.new_zeros(samples, *t.shape[1:]) for t in (x, y))
    batch = {0: Dim("batch", min=1)}
    shapes = (batch, batch, None, (None,) * len(state))
    return trace(module, (x, y, lr, *state), shapes, plan.computation.cost)


def require_compiler() -> None:
    """Refuse to compile where the C++ compiler that PyTorch would call is missing."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"compile needs a C++ compiler: install {compiler}, or set the environment variable "
            f"CXX to another; got none of that name"
        )


def require_suffix(path: str | PathLike[str]) -> None:
    """Refuse a name that PyTorch would not load."""
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path must end in .pt2; got {str(path)!r}")


def require_checkable(cost: Cost, y: Tensor) -> None:
    """Refuse indices for a cost of the user's: a wrong one would leave half a step behind."""
    if not (y.is_floating_point() or isinstance(cost, SoftmaxCrossEntropyCost)):
        raise TypeError(
            f"y must be of a floating-point dtype for a {type(cost).__name__} to be compiled, "
            f"because machine code cannot refuse an index before it updates; got {y.dtype}"
        )


def build(plan: Plan, x: Tensor, y: Tensor, path: str | PathLike[str]) -> None:
    """Compile the step for batches (N, in) of any N, tuned for that of x, and write a package."""
    samples = len(x)
    program = in_place_program(plan, x, y, any_size=True)
    options = {
        "aot_inductor.metadata": {KEY: json.dumps(signature(plan, y)._asdict())},
        "cpp.threads": _lowering.threads(plan, samples),
    } | _lowering.call_products(program, samples)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about its own code
        built = str(Path(folder, "step.pt2"))
        compile_ahead(program, built, options)
        write(path, Path(built).read_bytes())


def signature(plan: Plan, y: Tensor) -> Signature:
    """What a package for this plan, and targets like y, takes."""
    layers = plan.computation.layers
    return Signature(
        origin=_origin(),
        largest_lr=_largest_lr(plan),
        inputs=layers[0].w.shape[1],
        dtype=_name(plan.dtype),
        target=list(y.shape[1:]),
        target_dtype=_name(y.dtype),
        classes=0 if y.is_floating_point() else len(layers[-1].w),
        clips=plan.descent.max_norm is not None,
        parameters=_layouts(plan.parameters),
        state={slot: _layouts(kept) for slot, kept in plan.learned_state.items()},
    )


def load(
    path: str | PathLike[str],
) -> tuple[Callable[[list[Tensor]], list[Tensor]], Signature]:
    """The function in a package, and what it takes."""
    _require.path("path", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must lead to a compiled step; got {str(path)!r}")
    require_suffix(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run, metadata = load_compiled(str(path)) if is_zipfile(path) else (None, {})
    except RuntimeError as error:
        raise ValueError(
            f"path must lead to a compiled step for {_origin()}; got {str(path)!r}, which cannot "
            f"be loaded"
        ) from error
    if run is None or KEY not in metadata:
        raise ValueError(f"path must lead to a compiled step; got {str(path)!r}")
    of = json.loads(metadata[KEY])
    if of.get("origin") != _origin():
        raise ValueError(
            f"path must lead to a compiled step for {_origin()}; got one for {of.get('origin')}: "
            f"compile again"
        )
    return run, Signature(**of)


def _origin() -> str:
    """What must be the same where machine code is compiled and where it runs."""
    instructions = torch.backends.cpu.get_cpu_capability()
    version = torch.__version__.partition("+")[0]
    return f"PyTorch {version} on {sys.platform}, {platform.machine()} with {instructions}"


def _largest_lr(plan: Plan) -> float:
    options = [plan.descent.options(name) for name in plan.computation.learned]
    factors = [scale * max(1.0, decay) for scale, decay in options]
    return float(torch.finfo(plan.dtype).max / max(1.0, *factors, 1.0))


def require_fitting(name: str, tensors: Mapping[str, Tensor], wanted: dict[str, Any]) -> None:
    """Refuse tensors that the machine code would misread: it looks at their memory only."""
    if set(tensors) != set(wanted):
        raise KeyError(
            f"{name} must have the names {', '.join(wanted) or 'of none'}; got "
            f"{', '.join(map(str, tensors)) or 'none'}"
        )
    for key, (shape, strides, dtype) in wanted.items():
        place, tensor = f"{name}[{key!r}]", tensors[key]
        _require.real(place, tensor)
        _require.shape(place, tensor, tuple(shape), "as compiled")
        if _name(tensor.dtype) != dtype or tensor.device.type != "cpu":
            raise TypeError(
                f"{place} must be of {dtype} on the CPU, as compiled; got {_name(tensor.dtype)} on "
                f"{tensor.device}"
            )
        if tensor.is_neg():
            raise ValueError(f"{place} must hold its values themselves; got a negated view")
        if list(tensor.stride()) != strides:
            raise ValueError(
                f"{place} must have the strides {tuple(strides)}, as compiled; got "
                f"{tensor.stride()}"
            )


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {n: [list(t.shape), list(t.stride()), _name(t.dtype)] for n, t in tensors.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
