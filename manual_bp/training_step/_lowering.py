"""How PyTorch's compiler turns an exported step into fast machine code for the CPU."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from manual_bp._torch import adding_cpp, writes_call
from manual_bp.training_step._plan import Plan

# The C++ that is compiled with each step, and its function for products.
SOURCE = Path(__file__).with_name("small_products.cpp")
FUNCTION = "::manual_bp::addmm_out"
# As in SOURCE: up to how many multiplications a product is small.
MOST_SMALL = 262144
# From how many elements of a layer's output on the loops between products use several threads.
LEAST_SHARED = 2**15


def threads(plan: Plan, samples: int) -> int:
    """How many threads the loops between the products use: for little work, waking more costs time.

    The products use as many as PyTorch has when they run.
    """
    widest = max(len(layer.w) for layer in plan.computation.layers)
    return torch.get_num_threads() if samples * widest >= LEAST_SHARED else 1


def call_products(program: ExportedProgram, samples: int) -> dict[str, Any]:
    """Make products calls of our function in the machine code too; returns the options for that.

    The product of BP4 is one at any size, because PyTorch's compiler would have it write to a new
    buffer, and then copy that to w. The other products are, if they are small.

    Args:
        program: A step that updates in place.
        samples: The size of a batch. It is a symbol in the program.
    """
    operator = product()
    if operator is None:
        return {}
    graph = program.graph_module.graph
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(places):
        updates = node.target is torch.ops.aten.addmm_.default
        if not updates and not _is_small(node, samples):
            continue
        out = node.args[0] if updates else node.kwargs["out"]
        # A product without c is one with beta = 0, where c is not read.
        c, a, b = node.args if len(node.args) == 3 else (out, *node.args)
        beta = node.kwargs.get("beta", len(node.args) == 3)
        alpha = node.kwargs.get("alpha", 1)
        readers = [each for each in _readers(out) if places[each] < places[node]] if updates else []
        # One of our calls returns nothing, but writes to its first argument.
        earlier = [each.args[0] if each.target is operator else each for each in readers]
        with graph.inserting_before(node):
            call = graph.call_function(operator, (out, c, a, b, float(beta), float(alpha), earlier))
        places[call] = places[node]
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    program.graph_module.recompile()
    return adding_cpp(operator, SOURCE.read_text()) | {"reorder_for_locality": False}


def _is_small(node: Any, samples: int) -> bool:
    """Whether a node is a product of forward or of BP2 that our function computes."""
    if node.target not in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out):
        return False
    b = node.args[-1].meta["val"]
    return samples * b.numel() <= MOST_SMALL and b.dtype in (torch.float32, torch.float64)


def _readers(w: Any) -> list[Any]:
    """The nodes that compute something from a tensor, or from a transposed view of it."""
    views = (torch.ops.aten.mT.default, torch.ops.aten.transpose.int, torch.ops.aten.t.default)
    found: list[Any] = []
    for user in w.users:
        found += _readers(user) if user.target in views else [user]
    return found


@cache
def product() -> Any:
    """An operator that calls our function for out = beta c + alpha a b; None if that cannot be."""
    # `earlier` is what was computed from the old w. The compiler computes the arguments of a call
    # before it, but it may move anything else that reads w to after it.
    torch.library.define(
        "manual_bp::addmm_out",
        "(Tensor(a!) out, Tensor c, Tensor a, Tensor b, float beta, float alpha, "
        "Tensor[] earlier) -> ()",
    )
    torch.library.register_fake("manual_bp::addmm_out", lambda *_: None)
    operator = torch.ops.manual_bp.addmm_out.default
    return operator if writes_call(operator, FUNCTION, 6) else None
