"""A training step for other runtimes: a `torch.export` program, or an ONNX model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
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


def save_program(program: ExportedProgram, path: str | PathLike[str]) -> None:
    """Write a program to a file."""
    _write(path, lambda file: torch.export.save(program, file))


def save_onnx(program: ExportedProgram, state: Sequence[str], path: str | PathLike[str]) -> None:
    """Write a program to a file, as an ONNX model; state names parameters and velocities."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it itself, and then is less clear)
    except ImportError as error:
        raise ImportError(
            "export_onnx needs onnx and onnxscript: pip install 'manual-bp[onnx]'"
        ) from error
    with warnings.catch_warnings():
        # The exporter's own, of packages that it uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.onnx.export(
            program.run_decompositions(_TRANSLATED),
            input_names=["x", "y", "lr", *state],
            output_names=["cost", *(f"new.{name}" for name in state)],
            dynamo=True,
            verbose=False,
        )
    assert model is not None
    _write(path, model.save)


def _write(path: str | PathLike[str], save: Callable[[str], object]) -> None:
    """Save to a file beside it first, so that at no time there is half a file."""
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        save(str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    # As a product of matrices: of a transposed matrix and a vector, onnxruntime 1.31 makes a wrong
    # one (it takes the matrix as it was before it was transposed).
    return (matrix @ vector.unsqueeze(1)).squeeze(1)


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    # The form that is right for an end of 0, which is the only one here. PyTorch's own has two
    # forms, for two halves of the weights, both of which ONNX would compute everywhere.
    return end + (start - end) * (1 - weight)


def _leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Tensor:
    # onnxruntime has no LeakyRelu of float64.
    return torch.where(z > 0, z, z * negative_slope)


_TRANSLATED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mv.default: _mv,
    torch.ops.aten.lerp.Tensor: _lerp,
    torch.ops.aten.leaky_relu.default: _leaky_relu,
}
