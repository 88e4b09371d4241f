"""The backward passes of a block: which of them fills the trace, and what each brings."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manual_bp._torch import running_pass, transforms_are_active
from manual_bp.record._calls import SeenCalls
from manual_bp.record._fill import Filling, Pass
from manual_bp.record._graph import Arrivals, Graph
from manual_bp.record._losses import Losses

BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}

# What a pass is for. One of the highest kind so far fills the trace.
OTHER, GRAD, TRAINING = 0, 1, 2


class Backward(NamedTuple):
    """A call of one of `BACKWARDS`; enter and leave are hooks of a node, for the block's mode."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    enter: Callable[..., None]
    leave: Callable[..., None]

    def __call__(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    @property
    def assigns(self) -> bool:
        """Whether it adds gradients to `.grad`, and does not return them."""
        return self.func is not torch.autograd.grad

    def roots(self) -> list[Tensor]:
        """What is differentiated."""
        roots = [self.args[0]] if isinstance(self.args[0], Tensor) else self.args[0]
        return [root for root in roots if isinstance(root, Tensor)]

    def inputs(self) -> Sequence[Any] | None:
        """The tensors that are to get gradients; None for all leaves."""
        inputs = self.kwargs.get("inputs")
        if inputs is None and not self.assigns:
            inputs = self.args[1]
        return [inputs] if isinstance(inputs, Tensor) else inputs

    def purpose(self, parameters: Iterable[Tensor]) -> int:
        """Whether it trains, only asks for gradients of parameters, or does something else."""
        inputs = self.inputs()
        if inputs is None or any(t is p for p in parameters for t in inputs):
            return TRAINING if self.assigns else GRAD
        return OTHER

    def cost(self) -> Tensor:
        """What is differentiated, as one number: Σ root · gradient."""
        names = ("gradient", "grad_tensors", "grad_outputs")
        given = next((self.kwargs[name] for name in names if name in self.kwargs), None)
        roots = self.roots()
        gradients = [given] if isinstance(given, Tensor) else given or [None] * len(roots)
        terms = [
            (root if gradient is None else root * gradient).detach().sum()
            for root, gradient in zip(roots, gradients, strict=True)
        ]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def run(self, graph: Graph, begin: Callable[..., None]) -> Any:
        """Make the call, with the mode active while foreign code runs, which may call layers.

        Hooks enter it there, since a mode is left while it handles a call, such as backward(). If
        that code fails, autograd itself restores the modes that were active before.
        """
        handles = [root.register_prehook(begin) for root in graph.roots]
        for node in graph.foreign:
            handles += [node.register_prehook(self.enter), node.register_hook(self.leave)]
        try:
            return self()
        finally:
            for handle in handles:
                handle.remove()


class Passes:
    """Runs the backward passes of a block, and fills the trace from the one that counts.

    That is the first call of backward() that reaches a layer. A call of autograd.grad(), or of
    backward() for inputs that are not parameters, counts only if there is no such call, because it
    may be for just a part of the cost, such as a penalty on gradients; of several, the last one
    that is for parameters counts.
    """

    def __init__(
        self, model: nn.Module, calls: SeenCalls, losses: Losses, filling: Filling
    ) -> None:
        self._model, self._calls, self._losses, self._filling = model, calls, losses, filling
        self.thread: int | None = None  # that of the block, once it is entered
        self._purpose = OTHER  # of the pass that filled the trace
        self._graphs: list[Graph] = []  # of the pass that runs, and of those within it
        self._numbers: set[int] = set()  # PyTorch's, of the same passes

    def is_of_block(self) -> bool:
        """Whether what runs now belongs to the block, and not to another thread with the model.

        Autograd may run a pass of the block in threads of its own.
        """
        return threading.get_ident() == self.thread or running_pass() in self._numbers

    def run(self, request: Backward) -> Any:
        """Run a pass, and watch what it brings."""
        if transforms_are_active() or request.kwargs.get("is_grads_batched"):
            return request()
        graph = Graph(request.roots())
        if self._graphs:
            return self._run_within(request, graph)
        names = self._names_of_parameters(graph)
        purpose = request.purpose(names)
        has_trained = self._filling.is_filled and self._purpose == TRAINING
        calls = self._calls.all
        reaches_layers = any(call.node in graph.users for call in calls)
        if reaches_layers and purpose == TRAINING:
            if has_trained:
                raise RuntimeError(
                    "a block of record must run one backward pass; got a second one: open another "
                    "block for it"
                )
            self._losses.require_reduction(request.roots(), calls)
        result, graphs, arrivals = self._run_outermost(request, graph, names)
        arrived = [arrival.parameter for arrival in arrivals.values() if arrival.count]
        is_of_model = reaches_layers or arrived or any(id(p) in graph.ends for p in names)
        is_filled_now = False
        if is_of_model and purpose >= self._purpose and not has_trained:
            self._purpose = purpose
            passed = Pass(request.cost(), request.assigns, graphs, arrivals, names)
            is_filled_now = self._filling.fill(passed)
        if request.assigns and not is_filled_now:
            self._filling.add_elsewhere(arrived, names if has_trained else None)
        return result

    def _names_of_parameters(self, graph: Graph) -> dict[Tensor, str]:
        """The model's parameters, and those that functional_call put in their place."""
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        for layer, calls in self._calls.by_layer.items():
            for call in calls:
                for p, name in ((call.w, "weight"), (call.b, "bias")):
                    if p is not None and id(p) in graph.ends and p not in names:
                        names[p] = f"{self._calls.names[layer]}.{name}".lstrip(".")
        return names

    def _run_outermost(
        self, request: Backward, graph: Graph, parameters: Iterable[Tensor]
    ) -> tuple[Any, list[Graph], dict[int, Arrivals]]:
        """Run a pass; returns its result, the graphs of all passes that it ran, and arrivals."""
        arrivals = {
            id(p): Arrivals(p, graph, self.is_of_block)
            for p in parameters
            if p.requires_grad and p.is_leaf
        }
        graphs = self._graphs = [graph]
        self._calls.begin_pass()
        try:
            result = request.run(graph, self._note_number)
        finally:
            self._calls.end_pass()
            for arrival in arrivals.values():
                arrival.stop()
            self._graphs, self._numbers = [], set()
        return result, graphs, arrivals

    def _note_number(self, _: object) -> None:
        self._numbers.add(running_pass())

    def _run_within(self, request: Backward, graph: Graph) -> Any:
        """Run a pass that backward runs within itself, as a reentrant checkpoint does."""
        if request.assigns:
            self._graphs.append(graph)
            return request.run(graph, self._note_number)
        # It adds nothing to `.grad`, but what it returns may be written there by hand.
        inputs = request.inputs() or ()
        self._filling.add_elsewhere([t for t in inputs if isinstance(t, Tensor)])
        # Gradients that it brings to layers do not belong to the pass.
        before = [(call, call.gradient) for call in self._calls.all]
        handles = [root.register_prehook(self._note_number) for root in graph.roots]
        try:
            return request()
        finally:
            for handle in handles:
                handle.remove()
            for call, gradient in before:
                call.gradient = gradient
