"""A training step as machine code, called as a TrainingStep is."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, strided
from torch.autograd.graph import increment_version

from manual_bp import _require
from manual_bp.training_step import _checks, _epoch, _package
from manual_bp.training_step._export import require_path
from manual_bp.training_step._overlap import memory_of
from manual_bp.training_step._plan import Plan
from manual_bp.training_step._snapshot import Frozen


class CompiledStep:
    """One step of gradient descent as machine code, made by `TrainingStep.compile` or `load`.

    It is called as a TrainingStep is, with batches of any size, and updates parameters and
    velocities in place.

    Attributes:
        lr: The learning rate η. If a TrainingStep was compiled, that of the TrainingStep.
        state: What the rule keeps, as velocities: by the kind of it, and then by the names of the
            parameters. Empty without momentum. Copy values into these tensors to change them.

    Examples:
        >>> step = TrainingStep(nn.Sequential(Linear(3, 2), Sigmoid()), QuadraticCost(), lr=3.0)
        >>> x, y = torch.rand(5, 3), torch.rand(5, 2)
        >>> compiled = step.compile(x, y)  # takes seconds
        >>> cost = compiled(x, y)
    """

    def __init__(
        self,
        path: str | PathLike[str],
        parameters: Mapping[str, Tensor],
        state: Mapping[str, Mapping[str, Tensor]] | None,
        norm: Tensor | None,
        source: Any,
        require_current: Callable[[], None] = lambda: None,
    ) -> None:
        # source: has the current rate as its attribute lr.
        self._source, self._require_current = source, require_current
        self._program, of = _package.load(path)
        with torch.inference_mode(False):
            state = of.new_state() if state is None else state
            norm = of.new_norm() if norm is None else norm
            self._lr_tensor = torch.zeros((), dtype=getattr(torch, of.dtype), device="cpu")
        _package.require_fitting("parameters", parameters, of.parameters)
        if state.keys() != of.state.keys():
            raise KeyError(
                f"state must have the keys {', '.join(of.state) or 'of none'}; got "
                f"{', '.join(map(str, state)) or 'none'}"
            )
        for slot, wanted in of.state.items():
            _checks.require_mapping(slot, state[slot])
            _package.require_fitting(slot, state[slot], wanted)
        self._kept = {
            slot: {n: state[slot][n].detach() for n in of.state[slot]} for slot in of.state
        }
        self._norm = norm if of.clips else None
        self._state = [parameters[name].detach() for name in of.parameters]
        self._state += (t for kept in self._kept.values() for t in kept.values())
        self._state += [] if self._norm is None else [self._norm]
        self._memories = [memory_of(tensor) for tensor in self._state]
        self._dtype: torch.dtype = getattr(torch, of.dtype)
        self._target_dtype: torch.dtype = getattr(torch, of.target_dtype)
        self._inputs, self._target, self._classes = of.inputs, tuple(of.target), of.classes
        self._lr: float | None = None
        self._largest_lr = of.largest_lr

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        parameters: Mapping[str, Tensor],
        lr: float,
        *,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> "CompiledStep":
        """A step from a package that `TrainingStep.compile` wrote; it needs no network.

        Args:
            path: The package.
            parameters: By the names that they had in `net.state_dict()`, of the same shapes,
                strides and dtype. They are updated in place.
            lr: The learning rate.
            state: What the rule keeps, as in `CompiledStep.state`; its start if left out. It is
                updated in place.

        Raises:
            FileNotFoundError, TypeError, ValueError: path does not lead to such a package.
            KeyError, TypeError, ValueError: The tensors do not fit the package, two of them share
                memory, or lr is not a number of at least 0.
        """
        _checks.require_mapping("parameters", parameters)
        if state is not None:
            _checks.require_mapping("state", state)
        step = cls(path, parameters, state, None, SimpleNamespace(lr=0.0))
        kept = state or {}
        given = dict(parameters) | {f"{n} of {s}": t for s in kept for n, t in kept[s].items()}
        _checks.require_all_apart(given)
        step._require_current = partial(
            _require_unmoved, [(name, t, t.detach(), t.data_ptr()) for name, t in given.items()]
        )
        step.lr = lr
        return step

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CompiledStep must not be copied or pickled, since its code updates the tensors that "
            "it was made for: keep the package (path=... of compile), the parameters and state, "
            "and use CompiledStep.load"
        )

    @property
    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the rule keeps: by the kind of it, and then by the names of the parameters."""
        return self._kept

    @property
    def lr(self) -> float:
        """The learning rate η."""
        return float(self._source.lr)

    @lr.setter
    def lr(self, value: float) -> None:
        lr = _checks.checked_number("lr", value)
        if lr > self._largest_lr:
            raise ValueError(
                f"lr must be at most {self._largest_lr}, so that its products with the numbers of "
                f"the rule are in the range of {self._dtype}; got {lr}"
            )
        self._source.lr = lr

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last gradient before it was clipped: see `TrainingStep`."""
        return None if self._norm is None else self._norm.clone()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step of gradient descent on a batch; returns the cost before it, shape ().

        Args:
            x: Inputs, shape (N, in) with N at least 1; also (in,) and (..., in).
            y: Targets, of the dtype compiled, and for each sample of the shape compiled.

        Raises:
            TypeError, ValueError: x or y does not fit.
            RuntimeError: Network, cost, momentum or velocities have changed since (see
                `TrainingStep`); or tensors given to `load` have been moved or cast since; or
                autocast is on, or a transform traces the call.
        """
        if _checks.is_traced():
            return _checks.call_untraced(self, self, x, y)
        self._require_ready()
        if not self._fit(x, y):
            x, y = self._fitting(x, y)
        cost = self._take_step(self._apart(x), self._apart(y))
        increment_version(self._state)
        return cost

    @torch.no_grad()
    def epoch(self, x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> Tensor:
        """Take a step for each batch of samples: see `TrainingStep.epoch`."""
        if _checks.is_traced():
            return _checks.call_untraced(self, self.epoch, x, y, order, batch_size)
        self._require_ready()
        _epoch.require_epoch(x, y, order, batch_size)
        self._fitting(x[:1], y[:1])
        if self._classes and len(y):
            self._require_classes(y)
        x, y = self._apart(x, memory_of(x)), self._apart(y, memory_of(y))
        try:
            return _epoch.run_epoch(self._take_step, x, y, order, batch_size)
        finally:
            increment_version(self._state)

    def _require_ready(self) -> None:
        self._require_current()
        _checks.refuse_autocast()
        if self._source.lr != self._lr:
            self._lr = self._source.lr
            self._lr_tensor.fill_(self._lr)

    def _take_step(self, x: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 2:
            y = y.reshape(-1, *self._target)
            x = x.reshape(-1, self._inputs)
        arguments = [x, y, self._lr_tensor, *self._state]
        return self._program(arguments)[0]

    def _fit(self, x: Any, y: Any) -> bool:
        """Whether `_fitting` would return the same tensors, in a fifth of its time."""
        if not (type(x) is type(y) is Tensor and x.layout is y.layout is strided):
            return False
        if x.is_nested or y.is_nested or self._classes:
            return False
        shape = x.shape
        return (
            x.dtype is self._dtype
            and y.dtype is self._target_dtype
            and x.is_cpu
            and y.is_cpu
            and len(shape) == 2
            and shape[0] > 0
            and shape[1] == self._inputs
            and y.shape == (shape[0], *self._target)
            and x.is_contiguous()
            and y.is_contiguous()
            and not (x.is_neg() or y.is_neg())
        )

    def _fitting(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch that the machine code can read: it looks at the memory only."""
        for name, value, dtype in (("x", x, self._dtype), ("y", y, self._target_dtype)):
            _require.tensor(name, value)
            if value.dtype is not dtype or value.device.type != "cpu":
                raise TypeError(
                    f"{name} must be of {dtype} on the CPU, as compiled; got {value.dtype} on "
                    f"{value.device}"
                )
        _require.components("x", x, self._inputs, "as compiled")
        _require.shape("y", y, (*x.shape[:-1], *self._target), "a target for each sample of x")
        if not x.numel():
            raise ValueError(f"x must have at least one sample; got shape {tuple(x.shape)}")
        if self._classes:
            self._require_classes(y)
        return x.resolve_neg().contiguous(), y.resolve_neg().contiguous()

    def _require_classes(self, y: Tensor) -> None:
        shape = (*y.shape, self._classes)
        _require.indices("y", y, "the output", self._lr_tensor.expand(shape))

    def _apart(self, t: Tensor, reach: tuple[int, int] | None = None) -> Tensor:
        """The values in memory of their own: a step reads them while parameters change."""
        start = t.data_ptr()
        start, end = reach or (start, start + t.nbytes)
        for first, last in self._memories:
            if start < last and first < end:
                return t.clone()
        return t


def _require_unmoved(given: Sequence[tuple[str, Tensor, Tensor, int]]) -> None:
    """Refuse to go on in memory that parameters or state, given by name, have left."""
    for name, tensor, memory, address in given:
        if not tensor.is_set_to(memory) or tensor.data_ptr() != address:
            raise RuntimeError(
                f"parameters and state must be in the memory that they had when the step was "
                f"loaded; got {name} in another: load again"
            )


def compile_step(
    plan: Plan,
    x: Tensor,
    y: Tensor,
    path: str | PathLike[str] | None,
    is_current: Callable[[], bool],
) -> CompiledStep:
    """Compile the step of a plan on the CPU: see `TrainingStep.compile`."""
    _require.matrix("x", x, "(N, in)")
    _package.require_checkable(plan.computation.cost, y)
    if path is not None:
        require_path(path)
        _package.require_suffix(path)
    _package.require_compiler()
    with TemporaryDirectory() as folder:
        file = Path(folder, "step.pt2") if path is None else path
        _package.build(plan, x, y, file)
        return attach(plan, file, is_current)


def attach(plan: Plan, path: str | PathLike[str], is_current: Callable[[], bool]) -> CompiledStep:
    """The code in a package, for the parameters and velocities of a plan."""
    frozen = Frozen("compil", is_current, plan.computation.cost)
    state, norm = plan.learned_state, plan.norm
    return CompiledStep(path, plan.parameters, state, norm, plan, frozen.require)
