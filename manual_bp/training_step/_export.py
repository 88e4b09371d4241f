"""A training step for other runtimes: a `torch.export` program, or an ONNX model."""

import operator
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from manual_bp import _require
from manual_bp.costs._cost import Cost
from manual_bp.training_step._clip import norm_dtype
from manual_bp.training_step._layer import fresh_buffers
from manual_bp.training_step._pass import Computation, Pass
from manual_bp.training_step._plan import Plan

Values = dict[str, Tensor]


class StepModule(nn.Module):
    """The step as a function: it changes no argument, and returns the new values."""

    def __init__(self, computation: Computation) -> None:
        super().__init__()
        self._computation = computation

    def forward(
        self, x: Tensor, y: Tensor, lr: Tensor, parameters: Values, *state: Values
    ) -> tuple[Any, ...]:
        """The cost before the step, the new parameters, and what the rule keeps, kind by kind."""
        new, *kept = ({n: t.clone() for n, t in each.items()} for each in (parameters, *state))
        slots = self._computation.descent.chosen.slots
        run = Pass(
            self._computation,
            new,
            dict(zip(slots, kept, strict=True)),
            x.shape[:-1],
            fresh_buffers(x),
            x.new_empty((), dtype=norm_dtype(x.dtype)),
            rate_is_tensor=True,
        )
        return (run(x, y, lr), new, *kept)


@torch.no_grad()
def as_program(plan: Plan, y: Tensor | None) -> ExportedProgram:
    """The step for batches (N, in) of any N, with targets like y."""
    layers = plan.computation.layers
    samples = 2  # any number that PyTorch does not take for a constant
    x = layers[0].w.detach().new_zeros(samples, layers[0].w.shape[1])
    if y is None:
        y = x.new_zeros(samples, len(layers[-1].w))
    else:
        y = y.detach().new_zeros(samples, *y.shape[1:])
    parameters = {name: value.detach() for name, value in plan.parameters.items()}
    arguments: list[Any] = [x, y, x.new_zeros(()), parameters]
    batch = {0: Dim("batch", min=1)}
    shapes: list[Any] = [batch, batch, None, dict.fromkeys(parameters)]
    state = list(plan.learned_state.values())
    arguments += state
    shapes += [tuple(dict.fromkeys(kept) for kept in state)] if state else []
    module = StepModule(plan.computation)
    module(*arguments)  # so that bad arguments are refused in our words
    return trace(module, arguments, shapes, plan.computation.cost)


def trace(
    module: nn.Module, arguments: Sequence[Any], shapes: Sequence[Any] | None, cost: Cost
) -> ExportedProgram:
    """The program of a module that makes a step; all of it but the cost is known to be traceable.

    Raises:
        ValueError: The cost is not.
    """
    dynamic_shapes = None if shapes is None else tuple(shapes)
    try:
        return torch.export.export(module, tuple(arguments), dynamic_shapes=dynamic_shapes)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cost must be one that torch.export can trace for batches of any size (with "
            f"y.shape[0], not len(y), and no choice by values); got {type(cost).__name__}: {reason}"
        ) from error


def require_path(path: str | PathLike[str]) -> None:
    """Refuse a path that no file can be written to, before the export begins."""
    _require.path("path", path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path must lead into a folder that exists; got {str(path)!r}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"path must lead to a file; got a folder, {str(path)!r}")
    if Path(path).exists() and not Path(path).is_file():
        raise FileExistsError(f"path must lead to a file; got a device or pipe, {str(path)!r}")


def save_program(program: ExportedProgram, path: str | PathLike[str]) -> None:
    """Write a program to a file."""
    # Not directly to the file: if that fails, PyTorch's writer aborts the process.
    content = BytesIO()
    torch.export.save(program, content)
    write(path, content.getbuffer())


def save_onnx(program: ExportedProgram, plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan's program to a file, as an ONNX model."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it too, but its error is less clear)
    except ImportError as error:
        raise ImportError(
            "export_onnx needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    kept = plan.learned_state
    state = [*plan.parameters, *(f"{_ONE.get(k, k)}.{name}" for k in kept for name in kept[k])]
    with warnings.catch_warnings():
        # From packages that the exporter uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.onnx.export(
            program.run_decompositions(_DECOMPOSED),
            input_names=["x", "y", "lr", *state],
            output_names=["cost", *(f"new.{name}" for name in state)],
            dynamo=True,
            verbose=False,
            custom_translation_table=_in_float64() if plan.dtype is torch.float64 else None,
        )
    assert model is not None
    write(path, model.model_proto.SerializeToString())


_ONE = {"velocities": "velocity", "steps": "step"}


def write(path: str | PathLike[str], content: bytes | memoryview) -> None:
    """Write to a temporary file and then replace path, so that it never holds half a file."""
    path = Path(path)
    # In a new folder, where no other file can have its name. A file from tempfile itself would
    # not have the usual permissions.
    with TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
        unfinished = Path(folder, "step")
        unfinished.write_bytes(content)
        unfinished.replace(path)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    # As a product of matrices: onnxruntime 1.31 multiplies a transposed matrix by a vector as if it
    # were not transposed.
    return (matrix @ vector.unsqueeze(1)).squeeze(1)


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    # The form that is exact for an end of 0, which is the only one here. PyTorch's has two forms,
    # each for half of the weights, and ONNX would compute both everywhere.
    return end + (start - end) * (1 - weight)


def _leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Tensor:
    # onnxruntime has no LeakyRelu of float64.
    return torch.where(z > 0, z, z * negative_slope)


def _mul(t: Tensor, number: Any) -> Any:
    # As a number of the step's dtype, where torch.onnx would round it to float32.
    if isinstance(number, Tensor):
        return NotImplemented
    return t * torch.scalar_tensor(number, dtype=t.dtype)


def _add(t: Tensor, other: Any, *, alpha: float = 1) -> Any:
    # Makes alpha a factor like any other.
    return NotImplemented if alpha == 1 else t + other * alpha


def _addmm(t: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    # The numbers would be attributes, which ONNX holds in float32.
    return NotImplemented if alpha == 1 and beta == 1 else beta * t + alpha * (a @ b)


def _addcmul(t: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return t + a * b * value  # so that value is a factor like any other


def _lerp_by_number(start: Tensor, end: Tensor, weight: float) -> Tensor:
    return start + (end - start) * weight  # likewise


def _power_of_number(number: float, exponent: Tensor) -> Tensor:
    return torch.scalar_tensor(number, dtype=exponent.dtype) ** exponent


def _expm1(x: Tensor) -> Tensor:
    # torch.onnx would write e^x − 1, which loses digits for a small x.
    t = torch.tanh(x / 2)
    return 2 * t / (1 - t)


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.addcmul.default: _addcmul,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.mul.Tensor: _mul,
    torch.ops.aten.mv.default: _mv,
    torch.ops.aten.lerp.Scalar: _lerp_by_number,
    torch.ops.aten.lerp.Tensor: _lerp,
    torch.ops.aten.pow.Scalar: _power_of_number,
    torch.ops.aten.leaky_relu.default: _leaky_relu,
}


def _in_float64() -> dict[Any, Callable[..., Any]]:
    """Translations where those of torch.onnx would round numbers to float32."""
    from onnxscript import ir
    from onnxscript.onnx_opset import opset18

    op: Any = opset18

    def number(value: Any) -> Any:
        is_known = not isinstance(value, ir.Value)
        double = ir.DataType.DOUBLE
        return (
            op.Constant(value=ir.tensor(value, double)) if is_known else op.Cast(value, to=double)
        )

    def scalar_tensor(value: Any, dtype: Any = ir.DataType.DOUBLE, **_: Any) -> Any:
        return op.Cast(number(value), to=dtype)

    def truediv(value: Any, other: Any) -> Any:
        return op.Div(number(value), number(other))

    def softplus(z: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        scaled = op.Mul(z, number(beta))
        curve = op.Div(op.Softplus(scaled), number(beta))
        return op.Where(op.Greater(scaled, number(threshold)), z, curve)

    return {
        operator.truediv: truediv,
        torch.ops.aten.scalar_tensor.default: scalar_tensor,
        torch.ops.aten.softplus.default: softplus,
    }
