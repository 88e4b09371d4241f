"""What autograd's graph shows of a cost: what it uses, how often, and how it was reduced."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
        self.nodes = {root.grad_fn for root in roots if root.grad_fn is not None}
        users: dict[Any, list[Any]] = {}
        queue = list(self.nodes)
        while queue:
            node = queue.pop()
            for below, _ in node.next_functions:
                if below is None:
                    continue
                users.setdefault(below, []).append(node)
                if below not in self.nodes:
                    self.nodes.add(below)
                    queue.append(below)
        self.uses: Counter[Tensor] = Counter()
        for node in self.nodes:
            if hasattr(node, "variable"):
                self.uses[node.variable] += sum(_ways_to(user, users) for user in users[node])
        self.has_hidden_parts = any("CheckpointFunction" in node.name() for node in self.nodes)


def _ways_to(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    if node.name().removesuffix("Backward0") not in _HANDING_ON:
        return 1
    return sum(_ways_to(user, users) for user in users.get(node, ())) or 1


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
        if below is None or not below.name().removesuffix("0").startswith(_ELEMENTWISE):
            return None
        below = below.next_functions[0][0]
    return name


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
