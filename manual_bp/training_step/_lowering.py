"""How PyTorch's compiler turns an exported step into fast machine code for the CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from manual_bp._torch import writes_call
from manual_bp.training_step._plan import Plan

# Up to how many multiplications a product is compiled into a loop: a call of the library for
# products takes longer.
MOST_LOOPED = 2**18
# From how many elements of a layer's output on the loops between products use several threads.
LEAST_SHARED = 2**15


def threads(plan: Plan, samples: int) -> int:
    """How many threads the loops between the products use: for little work, waking more costs time.

    The products use as many as PyTorch has when they run.
    """
    widest = max(len(layer.w) for layer in plan.computation.layers)
    return torch.get_num_threads() if samples * widest >= LEAST_SHARED else 1


def loops(samples: int) -> dict[Any, Callable[..., Any]]:
    """Decompositions of the products of forward and of BP2 into loops, if they are small.

    Args:
        samples: The size of a batch. It is a symbol in the program.
    """

    def is_small(b: Tensor) -> bool:
        return samples * b.numel() <= MOST_LOOPED

    def _mm(a: Tensor, b: Tensor) -> Any:
        # Vectors run along the output, which is contiguous in b.
        return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1) if is_small(b) else NotImplemented

    def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        if c.ndim != 1 or not is_small(b) or (beta, alpha) != (1, 1):
            return NotImplemented
        # Here b is wᵀ, and vectors run along the input. A loop for several outputs at a time reads
        # a vector of the input once for all of them, and adds to several sums, none of which must
        # wait for another.
        rows = b.mT.chunk(_divisor(b.shape[1]))
        return c + torch.cat([(a.unsqueeze(1) * w.unsqueeze(0)).sum(2) for w in rows], 1)

    return {torch.ops.aten.mm.default: _mm, torch.ops.aten.addmm.default: _addmm}


def _divisor(outputs: int) -> int:
    """By how much to divide the outputs of a layer: at most 8, without remainder."""
    return max(n for n in range(1, 9) if outputs % n == 0)


def update_in_place(program: ExportedProgram) -> dict[str, Any]:
    """Let BP4 update weights in place in the machine code too; returns the options for that.

    PyTorch's compiler would have the product write to a new buffer, and then copy that to w.
    """
    operator = in_place_product()
    if operator is None:
        return {}
    graph = program.graph_module.graph
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in places:
        if node.target is torch.ops.aten.addmm_.default:
            w, delta_t, a_prev = node.args
            factors = [float(node.kwargs.get(name, 1)) for name in ("beta", "alpha")]
            earlier = [reader for reader in _readers(w) if places[reader] < places[node]]
            with graph.inserting_before(node):
                graph.call_function(operator, (w, w, delta_t, a_prev, *factors, earlier))
            node.replace_all_uses_with(w)
            graph.erase_node(node)
    program.graph_module.recompile()
    return {"aot_inductor.custom_ops_to_c_shims": {operator: []}, "reorder_for_locality": False}


def _readers(w: Any) -> list[Any]:
    """The nodes that compute something from a tensor, or from a transposed view of it."""
    views = (torch.ops.aten.mT.default, torch.ops.aten.transpose.int, torch.ops.aten.t.default)
    found: list[Any] = []
    for user in w.users:
        found += _readers(user) if user.target in views else [user]
    return found


@cache
def in_place_product() -> Any:
    """An operator that calls the C function of `torch.addmm(out=)`; None if that cannot be."""
    # `earlier` is what was computed from the old w. The compiler computes the arguments of a call
    # before it, but it may move anything else that reads w to after it.
    torch.library.define(
        "manual_bp::addmm_out",
        "(Tensor(a!) out, Tensor b, Tensor mat1, Tensor mat2, float beta, float alpha, "
        "Tensor[] earlier) -> ()",
    )
    torch.library.register_fake("manual_bp::addmm_out", lambda *_: None)
    operator = torch.ops.manual_bp.addmm_out.default
    return operator if writes_call(operator, "aoti_torch_cpu_addmm_out", 6) else None
