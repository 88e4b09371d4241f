"""What autograd's graph shows of a cost: what it uses, how often, and how it was reduced."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Nodes that hand on a leaf as it is, in another shape or dtype, and may do so to several others:
# autocast makes its cast once, and double backward uses the transposed weight of forward again.
_HANDING_ON = ("ToCopy", "T", "Transpose", "Permute", "View", "Alias")


class Graph:
    """What autograd's graph shows of how a cost was computed.

    nodes: All of its nodes.
    uses: How often it uses each leaf: as it is, transposed, or cast to another dtype.
    has_hidden_parts: Whether it has a reentrant checkpoint, whose inside is not to be seen.
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
        self.uses: Counter[Tensor] = Counter()
        for node in self.nodes:
            if node.name() == "torch::autograd::AccumulateGrad":
                self.uses[node.variable] += self.ways_to(node)
        self.has_hidden_parts = any("CheckpointFunction" in node.name() for node in self.nodes)

    def ways_to(self, node: Any) -> int:
        """How often the output of a node is used, as it is or handed on in another shape."""
        return sum(
            self.ways_to(user) or 1 if user.name().removesuffix("Backward0") in _HANDING_ON else 1
            for user in self._users.get(node, ())
        )


# What is between the z of a last layer and a cost that is nothing but a sum over its samples.
_ELEMENTWISE = (
    "Pow", "Abs", "Sub", "Sum", "View", "UnsafeView", "Sigmoid", "Tanh", "Relu", "LeakyRelu",
    "Softplus", "LogSoftmax",
)  # fmt: skip


def reduction_of(node: Any, products: set[Any]) -> str | None:
    """How a cost was made of those of its samples, where its last step plainly says so.

    That is PyTorch's and our own loss functions; and mean() and sum() of losses of samples that
    were made of the output of a layer without scaling.
    """
    while _is_of_one_number(node):
        node = node.next_functions[0][0]
    reduction = _of_loss(node)
    if reduction in ("mean", "sum"):
        return reduction
    name = {"MeanBackward0": "mean", "SumBackward0": "sum"}.get(node.name())
    if name is None:
        return None
    below = node.next_functions[0][0]
    if _of_loss(below) == "none":
        return name
    while below not in products:
        if below is None or not below.name().startswith(_ELEMENTWISE) or _is_over_samples(below):
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


def _of_loss(node: Any) -> str | None:
    """The reduction of a loss function; None for any other node."""
    of_ours = getattr(node, "reduction", None)
    if isinstance(of_ours, str):
        return of_ours
    return {0: "none", 1: "mean", 2: "sum"}.get(getattr(node, "_saved_reduction", -1))


def _is_of_one_number(node: Any) -> bool:
    """Whether it casts a number, or is the mean or sum of what is one number already."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    is_reduced = sizes is not None and math.prod(sizes) == 1
    return bool(node.next_functions) and (is_reduced or node.name() == "ToCopyBackward0")
