"""A training step in a CUDA graph: captured once, launched as one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manual_bp import _require
from manual_bp.training_step._pass import Pass

if TYPE_CHECKING:
    from manual_bp.training_step._training_step import TrainingStep


class CapturedStep:
    """One step of gradient descent for batches of one shape: what `TrainingStep.cuda_graph` makes.

    Called as a TrainingStep is; a batch is copied to where the graph reads it. The learning rate
    is that of the TrainingStep at the time, in the parameters' dtype.

    Updates that a graph makes go unseen by autograd: it will not notice that a weight which it
    saved before has changed since.
    """

    def __init__(self, step: "TrainingStep", run: Pass, x: Tensor, y: Tensor) -> None:
        self._step, self._run = step, run
        self._snapshot = step._snapshot
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            self._x, self._y = (
                t.detach().clone(memory_format=torch.contiguous_format) for t in (x, y)
            )
            self._lr = torch.full((), step.lr, dtype=x.dtype, device=x.device)
            self._lr_there = step.lr
            # One for both, so that what libraries keep for a stream is made before the capture.
            stream: Any = torch.cuda.Stream
            stream = stream(x.device)
            self._warm_up(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._cost = run(self._x, self._y, self._lr)

    def _warm_up(self, stream: Any) -> None:
        """Let libraries make what they need at a first call, which must not happen in a capture."""
        before = [tensor.clone() for tensor in self._run.state]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._run(self._x, self._y, self._lr)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, value in zip(self._run.state, before, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of gradient descent on a batch; returns the cost before it, shape ().

        Args:
            x: Inputs, of the shape, dtype and device captured.
            y: Targets, likewise.

        Raises:
            TypeError, ValueError: x or y is not like the one captured.
            RuntimeError: Network, cost, momentum or velocities have changed since (see
                `TrainingStep`); the graph would go on with what was there before.
        """
        for name, value, captured in (("x", x, self._x), ("y", y, self._y)):
            _require.like(name, value, f"the captured {name}", captured)
            _require.shape(name, value, captured.shape, "that of the one captured")
        if self._step._snapshot is not self._snapshot or not self._snapshot.is_as_it_was():
            raise RuntimeError(
                "network, cost and velocities must be what was captured; got others: capture again"
            )
        self._x.copy_(x)
        self._y.copy_(y)
        if self._step.lr != self._lr_there:
            self._lr.fill_(self._step.lr)
            self._lr_there = self._step.lr
        self._graph.replay()
        return self._cost.clone()
