"""A training whose batches several processes share: the same trajectory, up to rounding.

The cost of a batch is the mean over its N samples, (1/N) Σ_x C_x. Each process sums over its own
samples, and the sums are added. So it does not matter whether all have the same number of samples,
or some of them none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from experiments import checkpoint, shards
from experiments.checkpoint import Shards
from experiments.data import Data
from experiments.distributed import Processes
from experiments.networks import build_cost, build_net
from experiments.training import Config, Training
from manual_bp import Trace, backprop
from manual_bp.trace import Call


class SharedTraining(Training):
    """A `Training` for several processes, which all make the same calls with the same batches.

    Args:
        config: The options.
        data: All of the data, in every process.
        processes: Those that share the work.
    """

    def __init__(self, config: Config, data: Data, processes: Processes) -> None:
        super().__init__(config, data)
        self._group, self.processes = processes, processes.size
        self._total = build_cost(config.cost, "sum")
        self._model: nn.Module = self.net
        self._new_net = partial(build_net, self.sizes, config.activation, config.cost)
        self._is_sharded = config.shard
        if self._is_sharded:
            _shard(self.net, self.device.type, processes.size)
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=config.learning_rate)
        elif config.method == "autograd":
            self._model = DistributedDataParallel(self.net)
            # After its first pass, PyTorch arranges gradients in another order. Then the sums over
            # three processes and more are rounded differently. So that a run that goes on has the
            # same bits, the first pass is one over no samples.
            self._total(self._model(self.data.x_train[:0]), self.y_train[:0]).backward()
            self.optimizer.zero_grad()

    def _update(self, x: Tensor, y: Tensor, look: Callable[[Trace], None] | None) -> Tensor:
        if look is not None:
            look(self.trace(x, y))
        count, x, y = len(x), self._group.share(x), self._group.share(y)
        with self._group.connected():
            if self.step is not None:
                total = self._step_and_average(x, y, len(x) / count)
            elif self.explicit:
                total = self._explicit_step(x, y, count)
            else:
                self.optimizer.zero_grad()
                total = self._total(self._model(x), y)
                # PyTorch averages gradients over processes; what is wanted is their sum.
                (total * (self._group.size / count)).backward()
                self.optimizer.step()
        (whole,) = self._group.add(total.item())
        return torch.tensor(whole / count)

    def _explicit_step(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        self.optimizer.zero_grad()
        trace = backprop(self.net, x, y, self._total)
        trace.assign_grads()
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        self._group.add_up(grads)
        for grad in grads:
            grad.div_(count)
        self.optimizer.step()
        return trace.cost

    @torch.no_grad()
    def _step_and_average(self, x: Tensor, y: Tensor, share: float) -> Tensor:
        """Take a step on each share, and average the weights, which gives the same weights.

        w - η Σ_r s_r g_r = Σ_r s_r (w - η g_r), where g_r is the mean gradient over the share s_r.
        """
        assert self.step is not None
        total = self.step(x, y) * len(x) if len(x) else torch.zeros(())
        weights = list(self.net.parameters())
        for w in weights:
            w.mul_(share)
        self._group.add_up(weights)
        return total

    @torch.no_grad()
    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """Run the algorithm on a batch, each process on its share; all get the whole Trace."""
        net = self.net
        if self._is_sharded:
            net = self._new_net().to(self.device)
            net.load_state_dict(self.whole_weights())
        mine = backprop(net, self._group.share(x), self._group.share(y), self._total)
        return self._joined(mine, len(x))

    def _joined(self, mine: Trace, count: int) -> Trace:
        """The Trace of the batch from those of the shares: the one that one process would get.

        Only z, a and δ are exchanged: the weights are the same everywhere, the gradients follow.
        """
        of_layers = [(layer.z.cpu(), layer.a.cpu(), layer.delta.cpu()) for layer in mine]
        parts = self._group.gather((mine.cost.item(), mine.layers[0].a_prev.cpu(), of_layers))
        costs, inputs, of_layers_of_all = zip(*parts, strict=True)
        a = torch.cat(inputs).to(self.device)
        layers = []
        for layer, shares in zip(mine, zip(*of_layers_of_all, strict=True), strict=True):
            a_prev = a  # the same tensor, from which the diagnostics see which layer reads which
            z, a, delta = (torch.cat(t).to(self.device) for t in zip(*shares, strict=True))
            call = Call(a_prev, z, a, delta / count, layer.activations)
            layers.append(replace(layer, calls=(call,), scale=count, given=None))
        cost = torch.tensor(sum(costs) / count)
        return replace(mine, cost=cost, output=a, layers=tuple(layers))

    def _measured(self, x: Tensor, y: Tensor, labels: Tensor) -> tuple[float, float]:
        share = self._group.share
        with self._group.connected():
            output = self.net(share(x))
        total = self._total(output, share(y)).item()
        right = (output.argmax(-1) == share(labels)).sum().item()
        cost, accuracy = (torch.tensor(self._group.add(total, right)) / len(x)).tolist()
        return cost, accuracy

    def is_finite(self) -> bool:
        """Whether all weights and biases are finite, in all processes."""
        counts = [(~_local(p).isfinite()).sum().item() for p in self.net.parameters()]
        return self._group.add(sum(counts)) == [0]

    def agreed(self, received: Sequence[KeyboardInterrupt]) -> KeyboardInterrupt | None:
        """The first of the signals that any process received; None if none did."""
        if self._group.add(len(received)) == [0]:
            return None
        return next(first for first in self._group.gather(received[:1]) if first)[0]

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights and biases, whole, in every process."""
        with self._group.connected():
            return {name: _whole(p) for name, p in self.net.state_dict().items()}

    def pack(self, state: Mapping[str, Any], run: Path) -> bytes:
        """The bytes of a checkpoint, whose weights all processes write to a new folder in `run`.

        Raises:
            OSError: One of the processes cannot write its part, or has ended.
        """
        place = self._group.from_first(lambda: checkpoint.new_shards(run))
        with self._group.connected():
            shards.write(state["training"]["net"], place)
        found = self._group.gather(shards.checksums(place, self._part(shards.names(place))))
        sha256 = {name: checksum for each in found for name, checksum in each.items()}
        training = {**state["training"], "net": None}
        return checkpoint.pack({**state, "training": training, "shards": (place.name, sha256)})

    def _load_weights(self, weights: Mapping[str, Tensor] | Shards) -> None:
        if not isinstance(weights, Shards):
            are_whole = not any(isinstance(w, DTensor) for w in weights.values())
            options = StateDictOptions(full_state_dict=are_whole)
            set_model_state_dict(self.net, dict(weights), options=options)
            return
        reason = None
        try:
            shards.require_whole(weights.folder, self._part(weights.sha256), weights.sha256)
        except (OSError, ValueError) as error:
            reason = str(error)
        reasons = [reason for reason in self._group.gather(reason) if reason]
        if reasons:
            raise OSError(reasons[0])
        with self._group.connected():
            shards.read_into(self.net.state_dict(), weights.folder)

    def _part(self, files: Iterable[str]) -> list[str]:
        """The files whose checksums this process computes."""
        return sorted(files)[self._group.rank :: self._group.size]


def _shard(net: nn.Module, device: str, size: int) -> None:
    """Divide each weight and bias over all processes by its first dimension, by FSDP2."""
    mesh = init_device_mesh(device, (size,))
    for module in net.children():
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
