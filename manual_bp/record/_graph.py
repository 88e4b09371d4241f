"""What autograd shows of a pass: which nodes it has, and which gradients arrive where."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from manual_bp._torch import is_user_function, leaf_of, version

# Nodes that pass a leaf on, in another shape or dtype, and may do so to several others: autocast
# casts once, and double backward uses the transposed weight of forward again.
_PASSING_ON = {
    f"{name}Backward0" for name in ("ToCopy", "T", "Transpose", "Permute", "View", "Alias")
}


class Graph:
    """What autograd's graph shows of how a cost was computed.

    roots: The nodes of what is differentiated.
    users: From each of its nodes to those that use its output.
    ends: The node that adds to the `.grad` of each leaf, by the leaf's id.
    foreign: The nodes whose backward is Python code from outside this package.

    Raises:
        RuntimeError: No node shows that it belongs to a leaf.
    """

    def __init__(self, roots: Sequence[Tensor]) -> None:
        self.ends: dict[int, Any] = {}
        self.foreign: list[Any] = []
        self.users: dict[Any, list[Any]] = {r.grad_fn: [] for r in roots if r.grad_fn is not None}
        self.roots = list(self.users)
        queue = list(self.users)
        for node in queue:
            leaf = leaf_of(node)
            if leaf is not None:
                self.ends[id(leaf)] = node
            elif is_user_function(node):
                self.foreign.append(node)
            for below, _ in node.next_functions:
                if below in self.users:
                    self.users[below].append(node)
                elif below is not None:
                    self.users[below] = [node]
                    queue.append(below)
        if queue and not self.ends:
            raise RuntimeError(
                "record must find the parameters in autograd's graph; got one that shows none: "
                "this version of PyTorch names its nodes differently"
            )

    def ways_to(self, node: Any) -> int:
        """How often the output of a node is used, directly or passed on in another shape."""
        ways = 0
        for user in self.users.get(node, ()):
            ways += (self.ways_to(user) or 1) if user.name() in _PASSING_ON else 1
        return ways


# The counters that are active, by the id of their parameter.
_counting: "dict[int, list[Arrivals]]" = {}
_lock = threading.Lock()


class Arrivals:
    """Counts what arrives in the `.grad` of one parameter during a pass, from any source.

    A pass brings each leaf of its graph one gradient, the sum over all uses. Anything that arrives
    beyond that comes from a pass within the pass, which the graph may not show: a custom backward
    may run a part of the model again, and call backward() there.

    Args:
        parameter: The parameter.
        graph: The graph of the pass.
        is_of_pass: Tells whether what arrives now belongs to the pass, and not to another thread.
    """

    def __init__(self, parameter: Tensor, graph: Graph, is_of_pass: Callable[[], bool]) -> None:
        self.parameter = parameter
        self.count = 0
        self._is_of_pass = is_of_pass
        self._is_written_by_others = False
        self._thread = threading.get_ident()
        self._tell_other_threads()
        self._before = parameter.grad
        self._version = None if self._before is None else version(self._before)
        # Held because a parameter holds its node only weakly, and the hook goes with the node.
        self._node = graph.ends.get(id(parameter)) or get_gradient_edge(parameter).node
        with _lock:  # else PyTorch may give the hooks of two threads one number, and lose one
            self._hook = self._node.register_prehook(self._see)

    def stop(self) -> None:
        """Stop counting. A gradient that was written by hand counts if it was the first."""
        self._hook.remove()
        self._see_what_was_written()
        with _lock:
            counting = _counting[id(self.parameter)]
            counting.remove(self)
            if not counting:
                del _counting[id(self.parameter)]

    def _tell_other_threads(self) -> None:
        # A gradient of theirs may already be on its way, past the hook of this pass.
        with _lock:
            counting = _counting.setdefault(id(self.parameter), [])
            counting.append(self)
            if any(each._thread != self._thread for each in counting):
                for each in counting:
                    each._is_written_by_others = True

    def _see(self, _: object) -> None:
        if not self._is_of_pass():
            self._is_written_by_others = True
            return
        self._see_what_was_written()
        self.count += 1

    def _see_what_was_written(self) -> None:
        # Not after an arrival, when optimisers and reducers may write there.
        if self.count or self._is_written_by_others:
            return
        grad = self.parameter.grad
        is_new = grad is not None and grad is not self._before
        if is_new or (
            grad is not None and version(grad) != self._version and _has_memory_to_itself(grad)
        ):
            self.count += 1


def _has_memory_to_itself(grad: Tensor) -> bool:
    """Otherwise its version is shared by all in the same memory, as by gradients in one bucket."""
    if grad.layout is not torch.strided:
        return True
    return grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
