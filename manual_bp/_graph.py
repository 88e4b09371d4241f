"""What autograd shows of a pass: what the cost uses, how it was reduced, which gradients came."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from manual_bp._torch import is_foreign, version

# Nodes that hand on a leaf as it is, in another shape or dtype, and may do so to several others:
# autocast makes its cast once, and double backward uses the transposed weight of forward again.
_HANDING_ON = ("ToCopy", "T", "Transpose", "Permute", "View", "Alias")


class Graph:
    """What autograd's graph shows of how a cost was computed.

    nodes: All of its nodes.
    uses: How often it uses each leaf: as it is, transposed, or cast to another dtype.
    ends: The node of each leaf, which adds to its `.grad`.
    foreign: The nodes whose backward is Python code of somebody else's.
    """

    def __init__(self, roots: Sequence[Tensor]) -> None:
        self.nodes: set[Any] = {root.grad_fn for root in roots if root.grad_fn is not None}
        self._users: dict[Any, list[Any]] = {}
        queue = list(self.nodes)
        while queue:
            node = queue.pop()
            for below, _ in node.next_functions:
                if below is None:
                    continue
                self._users.setdefault(below, []).append(node)
                if below not in self.nodes:
                    self.nodes.add(below)
                    queue.append(below)
        self.ends: dict[Tensor, Any] = {}
        self.foreign = []
        for node in self.nodes:
            if node.name() == "torch::autograd::AccumulateGrad":
                self.ends[node.variable] = node
            elif is_foreign(node):
                self.foreign.append(node)
        self.uses = Counter({leaf: self.ways_to(node) for leaf, node in self.ends.items()})

    def ways_to(self, node: Any) -> int:
        """How often the output of a node is used, as it is or handed on in another shape."""
        return sum(
            self.ways_to(user) or 1 if user.name().removesuffix("Backward0") in _HANDING_ON else 1
            for user in self._users.get(node, ())
        )


class Arrivals:
    """Counts what arrives in the `.grad` of parameters while it is entered, whoever brings it.

    A pass brings each leaf of its graph one gradient, the sum of all uses. Whatever arrives
    beyond that comes from a pass within the pass, which no node of the graph has to show: a
    custom backward may run a part of the model again, and call backward() there.

    counts: How many gradients arrived for each parameter that learns, once it is left. One that
        was written into `.grad` without autograd counts where it is the first.

    Args:
        parameters: Those to watch.
        graph: That of the pass.
        is_of_pass: Tells whether what arrives now is of the pass, and not of another thread.
    """

    def __init__(
        self, parameters: Iterable[Tensor], graph: Graph, is_of_pass: Callable[[], bool]
    ) -> None:
        self.counts: dict[Tensor, int] = {}
        self._all = [
            _Arrival(p, graph.ends.get(p), is_of_pass)
            for p in parameters
            if p.requires_grad and p.is_leaf
        ]

    def __enter__(self) -> "Arrivals":
        return self

    def __exit__(self, *_: object) -> None:
        self.counts = {arrival.parameter: arrival.stop() for arrival in self._all}


class _Arrival:
    """Counts what arrives in the `.grad` of one parameter."""

    def __init__(self, parameter: Tensor, node: Any, is_of_pass: Callable[[], bool]) -> None:
        self.parameter = parameter
        self.is_of_pass = is_of_pass
        self.is_written_by_others = False
        self.count = 0
        self.before = parameter.grad
        self.version = None if self.before is None else version(self.before)
        # Held because a parameter holds its node only weakly, and the hook goes with the node.
        self.node = node or get_gradient_edge(parameter).node
        self.hook = self.node.register_prehook(self._see)

    def stop(self) -> int:
        self.hook.remove()
        self._see_what_was_written()
        return self.count

    def _see(self, _: object) -> None:
        if not self.is_of_pass():
            self.is_written_by_others = True
            return
        self._see_what_was_written()
        self.count += 1

    def _see_what_was_written(self) -> None:
        # Not after an arrival: optimisers and reducers then write there as they may.
        if self.count or self.is_written_by_others:
            return
        grad = self.parameter.grad
        if grad is None:
            return
        if grad is not self.before or (
            version(grad) != self.version and _has_memory_to_itself(grad)
        ):
            self.count += 1


def _has_memory_to_itself(grad: Tensor) -> bool:
    """Else its version is that of all that share its memory, as gradients in one bucket do."""
    if grad.layout is not torch.strided:
        return True
    return grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


# What is, with activations, between the z of a last layer and a cost that is nothing but a sum over
# its samples.
_ELEMENTWISE = ("Pow", "Abs", "Sub", "Sum", "View", "UnsafeView", "LogSoftmax")


def reduction_of(
    node: Any, products: set[Any], losses: Mapping[Any, str], activations: tuple[str, ...]
) -> str | None:
    """How a cost was made of those of its samples, where its last step plainly says so.

    That is loss functions, and mean() and sum() of losses of samples, which are given by a loss
    function, or made of the output of a layer without scaling.

    Args:
        node: That of the cost.
        products: Those of the outputs of linear layers.
        losses: Those that loss functions gave, each with its reduction.
        activations: How the names of nodes of activations begin.
    """
    while node not in losses and _is_of_one_number(node):
        node = node.next_functions[0][0]
    if losses.get(node) in ("mean", "sum"):
        return losses[node]
    name = {"MeanBackward0": "mean", "SumBackward0": "sum"}.get(node.name())
    if name is None:
        return None
    below = node.next_functions[0][0]
    passed = _ELEMENTWISE + activations
    while below not in products and losses.get(below) != "none":
        if below is None or not below.name().startswith(passed) or _is_over_samples(below):
            return None
        below = below.next_functions[0][0]
    return name


def _is_over_samples(node: Any) -> bool:
    """Whether a sum, or a softmax, is over the first dimension."""
    dims = getattr(node, "_saved_dim", ())
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    count = len(sizes) if sizes is not None else 2
    # A negative one is kept as if it were unsigned.
    signed = [d - 2**64 if d >= 2**63 else d for d in ([dims] if isinstance(dims, int) else dims)]
    return any(d % count == 0 for d in signed)


def _is_of_one_number(node: Any) -> bool:
    """Whether it casts a number, or is the mean or sum of what is one number already."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    is_reduced = sizes is not None and math.prod(sizes) == 1
    return bool(node.next_functions) and (is_reduced or node.name() == "ToCopyBackward0")
