"""A training step in a CUDA graph: captured once, launched as one; its kernels may be compiled."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from manual_bp import _require
from manual_bp.training_step import _epoch
from manual_bp.training_step._layer import fresh_buffers
from manual_bp.training_step._package import in_place_program, state_of
from manual_bp.training_step._plan import Plan
from manual_bp.training_step._snapshot import Frozen


class CapturedStep:
    """One step of gradient descent for batches of one shape, in a CUDA graph.

    `TrainingStep.cuda_graph` makes it, and on a CUDA device `TrainingStep.compile`. It is called
    as a TrainingStep is; a batch is copied to where the graph reads it. The learning rate is the
    current one of the TrainingStep, in the parameters' dtype.

    Autograd does not see updates made by a graph: it will not notice that a weight which it saved
    before has changed since.

    Examples:
        >>> if torch.cuda.is_available():
        ...     net = nn.Sequential(Linear(3, 2), Sigmoid()).cuda()
        ...     x, y = torch.rand(5, 3, device="cuda"), torch.rand(5, 2, device="cuda")
        ...     step = TrainingStep(net, QuadraticCost(), lr=1.0).cuda_graph(x, y)
        ...     cost = step(x, y)
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        y: Tensor,
        is_current: Callable[[], bool],
        *,
        compiled: bool = False,
    ) -> None:
        self._plan, self._state = plan, state_of(plan)
        self._run: Callable[[Tensor, Tensor, Tensor], Tensor]
        if compiled:
            self._run = _compiled_pass(plan, x, y)
        else:
            self._run = plan.new_pass(x.shape[:-1], fresh_buffers(x), rate_is_tensor=True)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            self._x, self._y = (
                t.detach().clone(memory_format=torch.contiguous_format) for t in (x, y)
            )
            self._lr = plan.lr
            self._lr_tensor = torch.full((), plan.lr, dtype=x.dtype, device=x.device)
            # The same stream for both, so that what libraries keep for it exists before capture.
            stream: Any = torch.cuda.Stream
            stream = stream(x.device)
            self._warm_up(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._cost = self._run(self._x, self._y, self._lr_tensor)
        # The graph holds the values that they had in the capture.
        self._frozen = Frozen("captur", is_current, plan.computation.cost)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CapturedStep must not be copied or pickled, since its CUDA graph updates the "
            "tensors captured: copy or pickle the TrainingStep, and capture that again"
        )

    def _warm_up(self, stream: Any) -> None:
        """Make first calls, in which libraries do what must not happen during a capture."""
        before = [tensor.clone() for tensor in self._state]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._run(self._x, self._y, self._lr_tensor)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step of gradient descent on a batch; returns the cost before it, shape ().

        Args:
            x: Inputs, of the shape, dtype and device captured.
            y: Targets, likewise.

        Raises:
            TypeError, ValueError: x or y is not like the one captured.
            RuntimeError: Network, cost, momentum or velocities have changed since (see
                `TrainingStep`); the graph would go on training the old ones.
        """
        for name, value, captured in (("x", x, self._x), ("y", y, self._y)):
            _require.like(name, value, f"the captured {name}", captured)
            _require.shape(name, value, captured.shape, "that of the one captured")
        self._require_ready()
        return self._take_step(x, y)

    @torch.no_grad()
    def epoch(self, x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> Tensor:
        """Take a step for each batch of samples: see `TrainingStep.epoch`.

        Raises:
            ValueError: Not every batch has as many samples as the one captured.
        """
        _epoch.require_epoch(x, y, order, batch_size)
        for name, value, captured in (("x", x, self._x), ("y", y, self._y)):
            _require.like(name, value, f"the captured {name}", captured)
            wanted = (len(value), *captured.shape[1:])
            _require.shape(name, value, wanted, "that of the one captured but for the first")
        if batch_size != len(self._x) or len(order) % batch_size:
            raise ValueError(
                f"batch_size must be {len(self._x)}, as captured, and divide the number of samples "
                f"in order; got {batch_size} for {len(order)} samples"
            )
        self._require_ready()
        x, y = self._plan.apart(x), self._plan.apart(y)
        return _epoch.run_epoch(self._take_step, x, y, order, batch_size)

    def _require_ready(self) -> None:
        self._frozen.require()
        if self._plan.lr != self._lr:
            self._lr = self._plan.lr
            self._lr_tensor.fill_(self._lr)

    def _take_step(self, x: Tensor, y: Tensor) -> Tensor:
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        return self._cost.clone()


def _compiled_pass(plan: Plan, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The pass in kernels that PyTorch's compiler generates, which fuse what lies between products.

    The exported program, because the compiler cannot follow a pass as it is written.
    """
    module = in_place_program(plan, x, y, any_size=False).module()
    run: Any = torch.compile(module, fullgraph=True, dynamic=False)
    state = state_of(plan)
    return lambda x, y, lr: run(x, y, lr, *state)
