"""The other forms that a step can take: captured, compiled, exported."""

from collections.abc import Callable
from os import PathLike

from torch import Tensor
from torch.export import ExportedProgram

from manual_bp import _net, _require
from manual_bp.training_step import _checks, _export
from manual_bp.training_step._captured import CapturedStep
from manual_bp.training_step._compiled import CompiledStep, compile_step
from manual_bp.training_step._plan import Plan


class Forms:
    """The methods of a `TrainingStep` that return it, or write it, in another form."""

    _plan: Plan

    def _refresh(self) -> Plan:
        """The plan for network and cost as they are now."""
        raise NotImplementedError

    def cuda_graph(self, x: Tensor, y: Tensor) -> CapturedStep:
        """The step captured for batches of one shape: all its kernels in one launch.

        Args:
            x: A batch on a CUDA device, of the shape that all are to have.
            y: Its targets. The step does not learn from this batch.

        Returns:
            An object that is called as the step is. It updates the same parameters and velocities,
            with the `lr` that the step has at the time, as long as nothing else of the step and its
            network changes.

        Raises:
            TypeError, ValueError: x or y does not fit, or is not on a CUDA device; or the
                parameters are of float16.
            RuntimeError: autocast is on.
        """
        plan = self._refresh()
        _checks.refuse_autocast()
        _net.require_input(x, plan.computation.layers[0])
        _require.tensor("y", y)
        if x.device.type != "cuda":
            raise ValueError(f"x must be on a CUDA device to be captured; got {x.device}")
        _checks.require_tensor_rate("captured", x.dtype)
        return self._capture(x, y)

    def _capture(self, x: Tensor, y: Tensor, **options: bool) -> CapturedStep:
        return CapturedStep(self._plan, x, y, self._keeps(self._plan), **options)

    def _keeps(self, plan: Plan) -> Callable[[], bool]:
        """Whether network, cost and velocities are still those of this plan."""
        return lambda: self._plan is plan and plan.is_current()

    def compile(
        self, x: Tensor, y: Tensor, *, path: str | PathLike[str] | None = None
    ) -> CompiledStep | CapturedStep:
        """The step as machine code, which is faster for small networks; compiling takes seconds.

        Args:
            x: A batch, (N, in). On the CPU, the code takes batches of any size and is tuned for
                this one. On a CUDA device all must have its shape, since the kernels are captured
                in a CUDA graph: see `cuda_graph`.
            y: Its targets. The step does not learn from this batch.
            path: Where to keep the code as a package, which `CompiledStep.load` reads; it ends in
                .pt2, and is only for the CPU. An existing file is replaced once the new one is
                complete.

        Returns:
            An object that is called as the step is. It updates the same parameters and velocities,
            with the `lr` that the step has at the time, as long as nothing else of the step and its
            network changes.

        Raises:
            TypeError, ValueError: x or y does not fit, path is no path, does not end in .pt2 or is
                given on a CUDA device, or the parameters are of float16.
            OSError: The folder of path does not exist, or path exists and is not a file.
            RuntimeError: There is no C++ compiler (on the CPU), or autocast is on.
        """
        plan = self._refresh()
        _checks.refuse_autocast()
        _net.require_input(x, plan.computation.layers[0])
        _require.tensor("y", y)
        _checks.require_tensor_rate("compiled", x.dtype)
        if x.is_cuda:
            if path is not None:
                raise ValueError(f"path must be None on a CUDA device; got {str(path)!r}")
            return self._capture(x, y, compiled=True)
        return compile_step(plan, x, y, path, self._keeps(plan))

    def export(self, path: str | PathLike[str], *, y: Tensor | None = None) -> None:
        """Write the step as a `torch.export` program, which needs neither this nor its network.

            program = torch.export.load(path).module()
            cost, parameters = program(x, y, lr, parameters)

        x is (N, in) with any N from 1 on, lr a tensor of shape () in the parameters' dtype, and
        parameters a dict by the names of `net.state_dict()`. With momentum, a dict of velocities of
        the parameters that learn, at first all 0, is the last argument and the last result; with
        Adam, so are dicts of m, of v and of the numbers of steps (of float64, shape ()), in this
        order; with dampening, velocities and numbers of steps. Nothing is changed in place. Which
        parameters are frozen is fixed at the export, and so are all numbers but lr.

        Args:
            path: Where to. An existing file is replaced once the new one is complete.
            y: An example of a target, of any number of samples; needed if targets do not have the
                output's shape and dtype, as class indices.

        Raises:
            TypeError, ValueError: path is no path, y does not suit the cost, or the parameters are
                of float16.
            OSError: The folder of path does not exist, or path exists and is not a file.
        """
        _export.require_path(path)
        _export.save_program(self._program(y), path)

    def export_onnx(self, path: str | PathLike[str], *, y: Tensor | None = None) -> None:
        """Write the step as an ONNX model, with which an inference runtime can train.

        Inputs are x, y, lr, and each parameter by its name in `net.state_dict()`; outputs are
        cost, and the new value of each as new.<name>. With momentum, velocity.<name> of each
        parameter that learns is an input as well, at first all 0, and new.velocity.<name> an
        output; likewise exp_avg.<name> (m), exp_avg_sq.<name> (v) and step.<name> with Adam.
        Shapes are as for `export`.

        Needs the extra `onnx`.

        Args:
            path: Where to. An existing file is replaced once the new one is complete.
            y: An example of a target: see `export`.

        Raises:
            TypeError, ValueError, OSError: See `export`.
            ImportError: onnx or onnxscript is missing.
        """
        _export.require_path(path)
        _export.save_onnx(self._program(y), self._plan, path)

    def _program(self, y: Tensor | None) -> ExportedProgram:
        plan = self._refresh()
        _checks.require_tensor_rate("exported", plan.dtype)
        if y is not None:
            _require.tensor("y", y)
        return _export.as_program(plan, y)
