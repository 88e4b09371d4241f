"""The Trace of any model that is trained through autograd: hooks collect the pairs (a, δ).

From a forward call to the filled Trace, file by file:

    _choose       which linear layers the block records
    _block        adds the hooks, and the mode that sees every function called; passes calls on
    _hooks        hooks in the modules, which copies of the model do not have
    _samples      whether the rows of a layer are samples: which tensors are the model's own, and N
    _calls        a call of a layer: its a, w, b and z; z is followed to a; δ arrives
    _activations  which activation a function computes
    _losses       how the cost was reduced
    _passes       backward() is called: whether that pass counts, and the passes within it
    _graph        what autograd shows: how often a cost uses a weight, what arrives in `.grad`
    _fill         the Trace: layers, what was missed, and what came from elsewhere

δ is the gradient that backward brings to the node that made z. No product is computed for it, and
nothing that the model computes is changed. A pair is complete when its δ arrives. So what a
checkpoint computes again counts once, whichever of the two calls the gradient goes through.
"""

import sys
from contextlib import AbstractContextManager

from torch import nn

from manual_bp import _require
from manual_bp.record._block import Block
from manual_bp.record._choose import Layers
from manual_bp.record._losses import Reduction
from manual_bp.trace import Trace


def record(
    model: nn.Module,
    reduction: Reduction = "mean",
    layers: Layers | None = None,
    no_samples: Layers | None = None,
) -> AbstractContextManager[Trace]:
    """Record one backward pass through a model as a Trace, like the one that `backprop` returns.

    The trace is filled when `backward()` has run. Weights, gradients and random numbers are the
    same as without `record`. The hooks are removed when the block is left, even by an exception,
    and copies and pickles of the model have none. The trace holds a and δ of every recorded layer
    until it is released. Other threads may use the model meanwhile: what they do is not recorded.

    Args:
        model: Any module that contains linear layers: `nn.Linear`, ours, `LinearSigmoid`. Their
            inputs may have any number of dimensions. They may run several times, share their
            weights, be frozen, or be within checkpoints. A sample is an index of the input's first
            dimension. A sparse input is kept as a dense one.
        reduction: How the cost is made of the costs C_x of its samples: their "mean" or "sum".
            This gives per-sample results their unit, that of C_x.
        layers: Which linear layers to record, by name ("encoder.fc1", or a pattern with * and ?)
            or by type; None for all of them.
        no_samples: Which of them have something other than samples in their input's first
            dimension: class prototypes, prompts, positions or the slots of an expert; named in
            the same way. They are recorded, but have no per-sample results, and their parameters
            are `elsewhere`. None for the layers whose input is made only of the model's
            parameters and buffers, and of `arange` and the like; an empty list for none.

    Returns:
        A context manager that gives the Trace.

    Raises:
        TypeError: model is not an nn.Module, or FSDP has sharded it, which frees the weights that
            a Trace refers to; layers or no_samples are neither names nor types; or, from the
            forward pass, the input of a layer is nested, or its weight is not a dense tensor.
        ValueError: reduction is neither "mean" nor "sum"; the model has no linear layer, or none
            is chosen; or, from backward(), the cost shows that it is reduced in the other way.
        RuntimeError: From backward(), if it is called a second time in one block. On entering a
            block that was entered before. On leaving it, if no backward pass reached a layer, or
            none of the layers that it reached can be recorded.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(3, 2)})
        >>> with record(model) as trace:
        ...     model["encoder"](torch.rand(5, 3)).square().mean().backward()
        >>> trace["encoder"].delta.shape
        torch.Size([5, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    _require_whole(model)
    _require.one_of("reduction", reduction, ("mean", "sum"))
    return Block(model, reduction, layers, no_samples)


def _require_whole(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and needed to shard
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            place = f"module {name!r}" if name else "all of it"
            raise TypeError(
                "model must not be sharded by fully_shard or FullyShardedDataParallel, which free "
                f"the weights that a Trace refers to; got one with {place} sharded"
            )
