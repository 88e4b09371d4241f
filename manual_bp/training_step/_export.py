"""A training step for other runtimes: a `torch.export` program, or an ONNX model."""

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from manual_bp.training_step._pass import Pass, Plan, fresh_buffers

State = dict[str, Tensor]


class Function(nn.Module):
    """The step as a function: it changes nothing, and gives the new values back."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        # Behind a lambda, lest the network's parameters become this module's own.
        self._plan: Any = lambda: plan

    def forward(
        self, x: Tensor, y: Tensor, lr: Tensor, parameters: State, velocities: State | None = None
    ) -> tuple[Tensor, State] | tuple[Tensor, State, State]:
        """The cost before the step, the new parameters and, if there are any, velocities."""
        parameters = {name: value.clone() for name, value in parameters.items()}
        new_velocities = {name: value.clone() for name, value in (velocities or {}).items()}
        run = Pass(
            self._plan(),
            parameters,
            new_velocities,
            x.shape[:-1],
            fresh_buffers(x),
            rate_is_tensor=True,
        )
        before = run(x, y, lr)
        return (before, parameters) if velocities is None else (before, parameters, new_velocities)


@torch.no_grad()
def as_program(
    function: Function, parameters: Mapping[str, Tensor], velocities: State | None, y: Tensor | None
) -> ExportedProgram:
    """The step for batches (N, in) of any N, with targets like y."""
    values = [value.detach() for value in parameters.values()]
    weights = [value for value in values if value.ndim == 2]
    samples = 2  # any number but those that PyTorch takes for constants
    x = weights[0].new_zeros(samples, weights[0].shape[1])
    if y is None:
        y = x.new_zeros(samples, len(weights[-1]))
    else:
        y = y.detach().new_zeros(samples, *y.shape[1:])
    arguments: list[Any] = [x, y, x.new_zeros(()), dict(zip(parameters, values, strict=True))]
    batch = {0: Dim("batch", min=1)}
    shapes: list[Any] = [batch, batch, None, dict.fromkeys(parameters)]
    if velocities is not None:
        arguments.append(velocities)
        shapes.append(dict.fromkeys(velocities))
    function(*arguments)  # so that what does not fit is refused in our words
    return torch.export.export(function, tuple(arguments), dynamic_shapes=tuple(shapes))


def require_path(path: str | PathLike[str]) -> None:
    """Refuse a path that no file can be written to, before all the work."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path must lead into a folder that is there; got {str(path)!r}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"path must lead to a file; got a folder, {str(path)!r}")
    if Path(path).exists() and not Path(path).is_file():
        raise FileExistsError(f"path must lead to a file; got a device or pipe, {str(path)!r}")


def save_program(program: ExportedProgram, path: str | PathLike[str]) -> None:
    """Write a program to a file."""
    # Not straight to the file: if that fails, PyTorch's writer ends the process.
    content = BytesIO()
    torch.export.save(program, content)
    _write(path, content.getbuffer())


def save_onnx(
    program: ExportedProgram,
    state: Sequence[str],
    dtype: torch.dtype,
    path: str | PathLike[str],
) -> None:
    """Write a program to a file, as an ONNX model; state names parameters and velocities."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it itself, and then is less clear)
    except ImportError as error:
        raise ImportError(
            "export_onnx needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    with warnings.catch_warnings():
        # The exporter's own, of packages that it uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.onnx.export(
            program.run_decompositions(_DECOMPOSED),
            input_names=["x", "y", "lr", *state],
            output_names=["cost", *(f"new.{name}" for name in state)],
            dynamo=True,
            verbose=False,
            custom_translation_table=_in_float64() if dtype is torch.float64 else None,
        )
    assert model is not None
    _write(path, model.model_proto.SerializeToString())


def _write(path: str | PathLike[str], content: bytes | memoryview) -> None:
    """Write it beside the file first, so that at no time there is half a file."""
    path = Path(path)
    # In a folder of its own, so that it meets no other file, and is made as any file is.
    with TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
        unfinished = Path(folder, "step")
        unfinished.write_bytes(content)
        unfinished.replace(path)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    # As a product of matrices: onnxruntime 1.31 multiplies a transposed matrix with a vector as if
    # it were not transposed.
    return (matrix @ vector.unsqueeze(1)).squeeze(1)


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    # The form that is right for an end of 0, which is the only one here. PyTorch's own has two
    # forms, for two halves of the weights, both of which ONNX would compute everywhere.
    return end + (start - end) * (1 - weight)


def _leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Tensor:
    # onnxruntime has no LeakyRelu of float64.
    return torch.where(z > 0, z, z * negative_slope)


def _mul(t: Tensor, number: Any) -> Any:
    # A number of the step's dtype, where torch.onnx would take it for one of float32.
    if isinstance(number, Tensor):
        return NotImplemented
    return t * torch.scalar_tensor(number, dtype=t.dtype)


def _add(t: Tensor, other: Any, *, alpha: float = 1) -> Any:
    # So that alpha is a factor like any other.
    return NotImplemented if alpha == 1 else t + other * alpha


def _expm1(x: Tensor) -> Tensor:
    # torch.onnx would write e^x − 1, which loses its digits where x is small.
    t = torch.tanh(x / 2)
    return 2 * t / (1 - t)


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.mul.Tensor: _mul,
    torch.ops.aten.mv.default: _mv,
    torch.ops.aten.lerp.Tensor: _lerp,
    torch.ops.aten.leaky_relu.default: _leaky_relu,
}


def _in_float64() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx would write with numbers rounded to float32."""
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
