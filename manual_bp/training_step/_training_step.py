"""A network, its cost and its learning rate: all that one step of training needs, kept ready."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn, strided
from torch.compiler import is_compiling, is_exporting
from torch.export import ExportedProgram

from manual_bp import _net, _require
from manual_bp._torch import any_autocast_is_on, below_autograd, transforms_are_active
from manual_bp.costs._cost import Cost, bind_fits
from manual_bp.training_step import _export
from manual_bp.training_step._captured import CapturedStep
from manual_bp.training_step._overlap import memory_of, overlapping, overlaps_itself
from manual_bp.training_step._pass import Allocate, Descent, Pass, Plan, fresh_buffers
from manual_bp.training_step._snapshot import Snapshot

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# For how many shapes of x a pass is kept: each is mere views, but there may be ever more of them.
MOST_PASSES = 100


class TrainingStep:
    """Backpropagation and gradient descent in one, in place, close to the speed of its products.

        step = TrainingStep(net, QuadraticCost(), lr=3.0)
        for x, y in batches:
            cost = step(x, y)

    does what `cost = QuadraticCost()(net(x), y)`, `cost.backward()` and a step of
    `torch.optim.SGD(net.parameters(), lr)` do, up to rounding, without a graph and without
    gradients: `.grad` is neither read nor written.

    Args:
        net: As `backprop` takes it: linear layers and activations, ours or `torch.nn`'s own, or
            `LinearSigmoid`s, in an `nn.Sequential`; no parameter that learns shares memory with
            another. Its parameters are updated where they are, so it can be used and saved between
            any two steps. Frozen ones stay as they are.
        cost: A `Cost` reduced by "mean" or "sum".
        lr: The learning rate η, at least 0.
        momentum: μ, at least 0.
        weight_decay: λ, at least 0; for weights and biases alike.

    Attributes:
        net, cost, momentum, weight_decay: As given.
        lr: As given; it may be set anew between any two steps, as schedules do.

    A step, in the formulas of SGD, of each parameter p with the gradient g of the cost:

        p ← p − η (g + λ p)                            without momentum
        v ← μ v + g + λ p,  then  p ← p − η v          with momentum, from v = 0 on

    Memory beside the parameters, and the velocities v under momentum: the activations of the
    largest batch so far, and two δ, each as wide as a layer. They are made at the first batch,
    and again at a larger one.

    Two threads must not call it at once. Modules and parameters that are replaced, moved, cast,
    loaded, frozen or set otherwise between two steps are seen (what takes a parameter's place, and
    has its shape, takes its velocity); hooks that are registered later are not, and do not run.

    Raises:
        TypeError: net, cost or a number is of the wrong kind (see `backprop`), or a parameter is
            not of float16, bfloat16, float32 or float64.
        ValueError: The sizes do not fit each other; a parameter that learns shares memory with
            another, overlaps itself, or was made in inference mode; the cost is not reduced; a
            number is below 0 or beyond the parameters' dtype; or a Softplus has a threshold below
            20.

    Source: Nielsen, Neural Networks and Deep Learning, chapter 2 for the algorithm, chapter 3 for
    momentum and weight decay.
    """

    def __init__(
        self,
        net: nn.Sequential,
        cost: Cost,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self._net, self._cost = net, cost
        self._read(_not_negative("lr", lr), _descent(momentum, weight_decay), {})

    @property
    def net(self) -> nn.Sequential:
        """What is trained."""
        return self._net

    @property
    def cost(self) -> Cost:
        """What is to become smaller."""
        return self._cost

    @property
    def lr(self) -> float:
        """The learning rate η."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        lr = _not_negative("lr", value)
        _require_within(self._dtype, lr, self._descent)
        self._lr: float = lr

    @property
    def momentum(self) -> float:
        """How much of a velocity is kept, μ."""
        return self._descent.momentum

    @property
    def weight_decay(self) -> float:
        """How strongly parameters are drawn to 0, λ."""
        return self._descent.weight_decay

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of gradient descent on a batch.

        Args:
            x: Inputs, shape (N, in); also (in,) and (..., in). Of the parameters' dtype, on their
                device.
            y: Targets, as the cost wants them.

        Returns:
            The cost of the batch before the step, shape (), of no graph; a tensor of its own, and
            for an accelerator nothing is waited for.

        Raises:
            TypeError, ValueError: x or y does not fit; or the network, the cost or the numbers no
                longer do (see `TrainingStep`).
            RuntimeError: autocast is on, or a transform of `torch.func`, or `torch.export` traces.

        After one of these errors, or one that the cost raises, neither parameters nor velocities
        have changed. In code that `torch.compile` compiles, the step is a graph break and runs as
        it does outside.
        """
        if is_compiling() or transforms_are_active():
            return self._untraced(x, y)
        self._look()
        run = self._passes.get(x.shape) if self._fits(x) else None
        if run is None:
            run = self._prepare(x)
        with self._guard():
            if self._may_share_memory(x):
                x = x.clone()  # it is read until the first layer's BP4, when others have learned
            return run(x, y, self._lr)

    def _untraced(self, x: Tensor, y: Tensor) -> Tensor:
        """The step outside of what the compiler makes, where neither can see into the other."""
        if transforms_are_active():
            raise RuntimeError(
                "a TrainingStep must be called outside of torch.func's transforms (vmap, grad, "
                "jvp ...), for it updates parameters in place and has no derivative"
            )
        if is_exporting():
            raise RuntimeError(
                "a TrainingStep must not be traced by torch.export; its own export() and "
                "export_onnx() write it"
            )
        outside: Callable[[Tensor, Tensor], Tensor]
        outside = torch.compiler.disable(self)  # type: ignore[no-untyped-call]
        return outside(x, y)

    def cuda_graph(self, x: Tensor, y: Tensor) -> CapturedStep:
        """The step captured for batches of one shape: all its kernels in one launch.

        Args:
            x: A batch on a CUDA device, of the shape that all are to have.
            y: Its targets. The batch is not learned from.

        Returns:
            What is called as this is. It updates the same parameters and velocities, by the `lr`
            that this has at the time, as long as nothing else of this and its network changes.

        Raises:
            TypeError, ValueError: x or y does not fit, or is not on a CUDA device; or the
                parameters are of float16.
            RuntimeError: autocast is on.
        """
        self._look()
        _net.require_input(x, self._plan.layers[0])
        _require.tensor("y", y)
        if x.device.type != "cuda":
            raise ValueError(f"x must be on a CUDA device to be captured; got {x.device}")
        _refuse_float16("captured", x.dtype)
        return self._capture(x, y)

    def _capture(self, x: Tensor, y: Tensor) -> CapturedStep:
        run = self._new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
        return CapturedStep(self, run, x, y)

    def export(self, path: str | PathLike[str], *, y: Tensor | None = None) -> None:
        """Write the step as a `torch.export` program, which needs neither this nor its network.

            program = torch.export.load(path).module()
            cost, parameters = program(x, y, lr, parameters)

        with x (N, in) of any N from 1 on, lr a tensor of shape () in the parameters' dtype, and
        parameters a dict by the names of `net.state_dict()`. With momentum, a dict of velocities
        of the parameters that learn, at first all 0, goes in and comes out last. Nothing is
        changed in place. Which parameters are frozen is settled here.

        Args:
            path: Where to; a file that is there is replaced, once the new one is whole.
            y: A target like those to come, of any number of samples, if it is not of the output's
                shape and dtype, as with class indices.

        Raises:
            TypeError, ValueError: y does not suit the cost, or the parameters are of float16.
            OSError: path leads into no folder, or to what is there and no file.
        """
        _export.require_path(path)
        _export.save_program(self._program(y), path)

    def export_onnx(self, path: str | PathLike[str], *, y: Tensor | None = None) -> None:
        """Write the step as an ONNX model, with which an inference runtime can train.

        Inputs are x, y, lr, and each parameter by its name in `net.state_dict()`; outputs are
        cost, and the new value of each as new.<name>. With momentum, velocity.<name> of each that
        learns goes in as well, at first all 0, and new.velocity.<name> comes out. Shapes are as
        for `export`.

        Needs the extra `onnx`.

        Args:
            path: Where to; a file that is there is replaced, once the new one is whole.
            y: A target like those to come: see `export`.

        Raises:
            TypeError, ValueError, OSError: See `export`.
            ImportError: What the extra installs is missing.
        """
        _export.require_path(path)
        program = self._program(y)
        velocities = self._exported_velocities or {}
        names = [*self._parameters, *(f"velocity.{name}" for name in velocities)]
        _export.save_onnx(program, names, self._dtype, path)

    def state_dict(self) -> dict[str, Any]:
        """What to save beside `net.state_dict()` to go on later as if nothing had been.

        The numbers by their names, and velocities by the names of their parameters, as copies.
        """
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "velocities": {name: v.clone() for name, v in self._velocities.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        A parameter that it has no velocity of starts from v = 0.

        Raises:
            KeyError: Something is missing, or is too much, or a velocity belongs to no parameter
                of net.
            TypeError, ValueError: It is no mapping, a number is none, or a velocity is not shaped
                as its parameter. Nothing has been taken over then.
        """
        _require_mapping("state", state)
        if state.keys() != set(_STATE):
            raise KeyError(
                f"state must have the keys {', '.join(_STATE)}, and no others; "
                f"got {', '.join(map(str, state)) or 'none'}"
            )
        _require_mapping("velocities", state["velocities"])
        self._see_changes()
        velocities = {}
        for name, velocity in state["velocities"].items():
            if name not in self._parameters:
                raise KeyError(f"velocities: net has no parameter {name!r}")
            _require.real(f"velocities[{name!r}]", velocity)
            _require.shape(
                f"velocities[{name!r}]", velocity, self._parameters[name].shape, "its parameter's"
            )
            if velocity.is_meta:
                raise ValueError(f"velocities[{name!r}] must have values; got a meta tensor")
            with torch.inference_mode(False):
                velocities[name] = velocity.detach().clone()
        descent = _descent(state["momentum"], state["weight_decay"])
        self._read(_not_negative("lr", state["lr"]), descent, velocities)

    def __getstate__(self) -> dict[str, Any]:
        # Without the buffers: in a copy, their calls would go on writing to those of the original.
        return {name: value for name, value in vars(self).items() if name not in _MADE_ANEW}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._read(self._lr, self._descent, self._velocities)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(net={self.net!r}, cost={self.cost!r}, lr={self.lr}, "
            f"momentum={self.momentum}, weight_decay={self.weight_decay})"
        )

    def _look(self) -> None:
        """Before each step: what has changed is read anew."""
        self._see_changes()
        if any_autocast_is_on():
            raise RuntimeError(
                "a TrainingStep must be called outside of autocast; it trains in its parameters' "
                "own dtype"
            )

    def _see_changes(self) -> None:
        if not self._snapshot.is_as_it_was():
            self._read(self._lr, self._descent, self._velocities)

    def _read(self, lr: float, descent: Descent, velocities: Mapping[str, Tensor]) -> None:
        """Read network and cost as they are now, and let go of all that was made for them.

        Numbers and velocities are taken over, unless anything is refused: then all stays as it was.
        There is a new snapshot each time.
        """
        _net.require_cost(self.cost)
        input_activations, layers = _net.parse(self.net)
        _require_trainable(layers)
        w = layers[0].w
        _require_within(w.dtype, lr, descent)
        parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
        kept: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in parameters.items():
                velocity = velocities.get(name)
                if velocity is not None and velocity.shape == parameter.shape:
                    # The network may have moved, or been cast.
                    kept[name] = velocity.to(parameter)
                elif descent.momentum and parameter.requires_grad:
                    kept[name] = torch.zeros_like(parameter)
            snapshot = Snapshot(self.net, layers, self.cost)
        self._lr = lr
        self._descent: Descent = descent
        self._velocities: dict[str, Tensor] = kept
        self._plan = Plan(input_activations, layers, self.cost, descent)
        self._parameters = parameters
        self._snapshot: Snapshot = snapshot
        self._dtype: torch.dtype = w.dtype
        self._device: torch.device = w.device
        self._memories = [memory_of(p) for p in parameters.values() if p.requires_grad]
        # A cost that has only forward and gradient of its own may use autograd in them.
        self._guard: Any = below_autograd if bind_fits(self.cost) else torch.no_grad
        self._forget()

    def _forget(self) -> None:
        self._passes: dict[torch.Size, Pass] = {}
        self._memory: dict[str, Tensor] = {}
        self._capacity = 0

    def _fits(self, x: Any) -> bool:
        """Whether x is like the network's parameters."""
        return (
            isinstance(x, Tensor)
            and x.dtype is self._dtype
            and x.device == self._device
            and x.layout is strided
            and not x.is_nested
        )

    def _may_share_memory(self, x: Tensor) -> bool:
        """Whether x may be a part of a parameter that learns."""
        start, end = memory_of(x)
        return any(start < last and first < end for first, last in self._memories)

    def _prepare(self, x: Tensor) -> Pass:
        """A pass for x, kept for all batches of its shape."""
        _net.require_input(x, self._plan.layers[0])
        samples = prod(x.shape[:-1])
        if samples > self._capacity or len(self._passes) == MOST_PASSES:
            self._forget()
            self._capacity = samples
        run = self._new_pass(x.shape[:-1], partial(self._buffer, samples))
        self._passes[x.shape] = run
        return run

    def _buffer(self, samples: int, name: str, columns: int) -> Tensor:
        """The first rows of a buffer that the largest batch fits into."""
        if name not in self._memory:
            widest = max(len(layer.w) for layer in self._plan.layers)
            most = widest if name.startswith("delta") else columns
            self._memory[name] = torch.empty(
                self._capacity * most, dtype=self._dtype, device=self._device
            )
        return self._memory[name][: samples * columns].view(samples, columns)

    def _new_pass(self, samples: torch.Size, allocate: Allocate, **options: bool) -> Pass:
        with torch.inference_mode(False), torch.no_grad():
            # Not the parameters themselves: a view of one, as Pass makes them, would hold on to it,
            # and torch.utils.swap_tensors, by which modules may be moved, refuses what is held.
            values = {name: p.detach() for name, p in self._parameters.items()}
            velocities = self._velocities if self.momentum else {}
            return Pass(self._plan, values, velocities, samples, allocate, **options)

    def _program(self, y: Tensor | None) -> ExportedProgram:
        self._see_changes()
        _refuse_float16("exported", self._dtype)
        if y is not None:
            _require.tensor("y", y)
        function = _export.Function(self._plan)
        return _export.as_program(function, self._parameters, self._exported_velocities, y)

    @property
    def _exported_velocities(self) -> dict[str, Tensor] | None:
        if not self.momentum:
            return None
        learned = [name for name, p in self._parameters.items() if p.requires_grad]
        return {name: self._velocities[name] for name in learned}


# What a state_dict holds.
_STATE = ("lr", "momentum", "weight_decay", "velocities")

# What is made anew from the rest of a TrainingStep whenever that changes.
_MADE_ANEW = {
    "_capacity",
    "_device",
    "_dtype",
    "_guard",
    "_memories",
    "_memory",
    "_parameters",
    "_passes",
    "_plan",
    "_snapshot",
}


def _refuse_float16(what: str, dtype: torch.dtype) -> None:
    if dtype is torch.float16:
        raise TypeError(
            f"a step to be {what} must be of float64, float32 or bfloat16, for it multiplies δ by "
            f"a rate in a tensor, and float16 lacks the range for that; got float16"
        )


def _require_trainable(layers: Sequence[_net.Layer]) -> None:
    parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
    for name, parameter in parameters.items():
        if type(parameter.data) is not Tensor:
            kind = type(parameter.data).__name__
            raise TypeError(f"{name} of net must be a plain tensor; got {kind}")
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"{name} of net must be of float16, bfloat16, float32 or float64; "
                f"got {parameter.dtype}"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} of net must have values to train; got a meta tensor")
        if not parameter.requires_grad:
            continue
        if overlaps_itself(parameter):
            kind = "an expanded tensor" if 0 in parameter.stride() else "one that overlaps itself"
            raise ValueError(
                f"{name} of net must have memory for each of its elements; got {kind}, "
                f"strides {parameter.stride()}"
            )
        if parameter.is_inference():
            raise ValueError(
                f"{name} of net must be made outside of inference mode, for a step cannot "
                f"change it; got an inference tensor"
            )
    for other, name in overlapping(parameters):
        one, two = parameters[other], parameters[name]
        if one.requires_grad or two.requires_grad:
            got = "the parameter" if one.data_ptr() == two.data_ptr() else "a part of the parameter"
            raise ValueError(
                f"{name} of net must be in no other place, for the update in one place would come "
                f"before BP2 has read it in the other; got {got} that is {other} as well"
            )
    for activation in (a for layer in layers for a in layer.activations):
        activation.bind(torch.empty(0))  # refuses an activation whose a does not tell σ'


def _descent(momentum: object, weight_decay: object) -> Descent:
    return Descent(_not_negative("momentum", momentum), _not_negative("weight_decay", weight_decay))


def _require_within(dtype: torch.dtype, lr: float, descent: Descent) -> None:
    """Refuse numbers that PyTorch would refuse in the middle of a step."""
    most = torch.finfo(dtype).max
    numbers = {"lr": lr} | descent._asdict() | {"lr * weight_decay": lr * descent.weight_decay}
    for name, number in numbers.items():
        if number > most:
            raise ValueError(f"{name} must be at most {most}, all that {dtype} holds; got {number}")


def _require_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping, as state_dict() gives it; got {type(value).__name__}"
        )


def _not_negative(name: str, value: object) -> float:
    number = _require.number(name, value)
    _require.at_least(name, number, 0)
    if number == math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return number
