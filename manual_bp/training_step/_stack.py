"""Networks of one shape as one: their parameters in common memory, and numbers for each of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from manual_bp import _net
from manual_bp.costs._cost import Cost
from manual_bp.layers._activation import Activation
from manual_bp.training_step import _checks
from manual_bp.training_step._overlap import overlapping
from manual_bp.training_step._pass import Computation
from manual_bp.training_step._plan import Plan
from manual_bp.training_step._rules import STEPS, Descent, State
from manual_bp.training_step._snapshot import Snapshot

# The numbers in which networks may differ, besides the learning rate.
NUMBERS = ("momentum", "weight_decay", "dampening", "max_norm")


class Parsed(NamedTuple):
    """A network, and what it consists of."""

    net: nn.Sequential
    input_activations: Sequence[Activation]
    layers: Sequence[_net.Layer]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By their names in the network."""
        return {name: p for layer in self.layers for name, p in layer.parameters.items()}


class EnsemblePlan(Plan):
    """The plan of K networks of one shape, whose parameters it moves into common memory.

    Parameters and state have K in front. Row k of a parameter is the memory of that of network k.

    Args:
        nets: The networks.
        cost: That of each network.
        lr: A number for all of them, or K.
        descent: Likewise its momentum, weight_decay, dampening and max_norm.
        state: What the rule has kept so far.

    Attributes:
        rates: The K learning rates; see `set_rates`.
        each: The descent of each network.
        learned: The parameters of the networks that learn, sharing memory and version.
    """

    def __init__(
        self, nets: Sequence[nn.Sequential], cost: Cost, lr: Any, descent: Descent, state: State
    ) -> None:
        _net.require_cost(cost)
        parsed = [_parse(k, net) for k, net in enumerate(nets)]
        _require_alike(parsed)
        owned = [each.parameters for each in parsed]
        _require_movable(owned)
        first, names = parsed[0], list(owned[0])
        dtype = first.layers[0].w.dtype
        _checks.require_tensor_rate("trained in an ensemble", dtype)
        rates, self.each = _numbers_of_each(len(nets), dtype, lr, descent, names)
        with torch.inference_mode(False), torch.no_grad():
            stacked = {name: torch.stack([p[name].detach() for p in owned]) for name in names}
            for name, values in stacked.items():
                for parameters, value in zip(owned, values, strict=True):
                    # Not the view itself: with a view, torch.save writes all of the memory.
                    parameters[name].data = from_dlpack(value)
            together = _together(self.each, stacked[names[0]])
            computation = Computation(first.input_activations, first.layers, cost, together)
            self._prepare(computation, stacked, None, state)
            self._use_rates(rates)
            learned = computation.learned
            self.learned = [parameters[name].detach() for parameters in owned for name in learned]
            snapshot = Snapshot([(each.net, each.layers) for each in parsed], cost)
            self.is_current = snapshot.is_unchanged

    def set_rates(self, lr: Any) -> None:
        """Set the learning rate of all networks, or of each; refuse what is none."""
        rates = spread("lr", lr, len(self.each))
        if rates == self.rates:
            return
        for k, descent in enumerate(self.each):
            with naming(k):
                rates[k] = _checks.checked_number("lr", rates[k])
                _checks.require_within(self.dtype, rates[k], descent)
        self._use_rates(rates)

    def _use_rates(self, rates: list[float]) -> None:
        self.rates = rates
        # Always a new tensor: by that, a pass notices.
        self.lr = _of_each(self.rates, next(iter(self.parameters.values())))

    @property
    def given(self) -> tuple[Descent, State]:
        """The last two arguments, with which another plan continues this one."""
        return gathered(self.each), self.state


def networks(nets: Any) -> tuple[nn.Sequential, ...]:
    """The networks as a tuple; refuse anything but a sequence of some."""
    if isinstance(nets, nn.Sequential | Mapping | Set) or not isinstance(nets, Iterable):
        raise TypeError(f"nets must be a sequence of networks; got {type(nets).__name__}")
    if not (found := tuple(nets)):
        raise ValueError("nets must hold at least one network; got none")
    return found


@contextmanager
def naming(k: int) -> Iterator[None]:
    """Have errors say which network they are about."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"nets[{k}]: {error.args[0]}") from error


def spread(name: str, value: Any, networks: int) -> list[Any]:
    """A number for each network, from one for all or a sequence of them. They are not checked."""
    if hasattr(value, "tolist"):  # a tensor, or an array of NumPy
        value = value.tolist()
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set):
        value = list(value)
    if not isinstance(value, list):
        return [value] * networks
    if len(value) != networks:
        raise ValueError(
            f"{name} must be a number, or one for each of {networks} networks; got {len(value)}"
        )
    return value


def gathered(each: Sequence[Descent]) -> Descent:
    """The descents of all networks as the arguments of an ensemble."""
    for k, descent in enumerate(each):
        for name, value in descent._asdict().items():
            if name not in NUMBERS and value != getattr(each[0], name):
                raise ValueError(
                    f"{name} must be the same for all networks; got {value} for nets[{k}] and "
                    f"{getattr(each[0], name)} for nets[0]"
                )
    numbers: dict[str, Any] = {name: [getattr(d, name) for d in each] for name in NUMBERS}
    return each[0]._replace(**numbers)


def stacked(states: Sequence[State]) -> dict[str, dict[str, Tensor]]:
    """What the rule has kept of all networks, with K in front; the numbers of steps are shared."""
    found: dict[str, dict[str, Tensor]] = {}
    for slot, kept in states[0].items():
        for k, state in enumerate(states):
            if state.keys() != states[0].keys() or state[slot].keys() != kept.keys():
                raise ValueError(
                    f"{slot} of nets[{k}] must be of the parameters of nets[0]; got others"
                )
            if slot == STEPS and any(state[slot][name] != t for name, t in kept.items()):
                raise ValueError(
                    f"nets[{k}] must have taken as many steps as nets[0]; got another number"
                )
        found[slot] = {
            name: t if slot == STEPS else torch.stack([state[slot][name] for state in states])
            for name, t in kept.items()
        }
    return found


def _numbers_of_each(
    networks: int, dtype: torch.dtype, lr: Any, descent: Descent, names: Sequence[str]
) -> tuple[list[float], list[Descent]]:
    """The learning rate and the descent of each network, checked as those of a single one."""
    rates = spread("lr", lr, networks)
    numbers = {name: spread(name, getattr(descent, name), networks) for name in NUMBERS}
    if len({limit is None for limit in numbers["max_norm"]}) > 1:
        raise ValueError("max_norm must be None for all networks or for none; got both")
    found: list[tuple[float, Descent]] = []
    for k in range(networks):
        own: dict[str, Any] = {name: values[k] for name, values in numbers.items()}
        with naming(k):
            found.append(_checks.checked_numbers(dtype, rates[k], descent._replace(**own), names))
    return [lr for lr, _ in found], [descent for _, descent in found]


def _together(each: Sequence[Descent], like: Tensor) -> Descent:
    """The descents of all networks as one: numbers that differ become tensors (K,)."""
    numbers: dict[str, Any] = {}
    for name in NUMBERS:
        values = [getattr(descent, name) for descent in each]
        if name == "dampening":  # which has no meaning without momentum
            values = [d.dampening if d.momentum else 0.0 for d in each]
        numbers[name] = values[0] if len(set(values)) == 1 else _of_each(values, like)
    return each[0]._replace(**numbers)


def _of_each(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A tensor (K,) of numbers that multiply others like these: of at least 32 bits."""
    dtype = like.dtype if like.itemsize >= 4 else torch.float32
    return torch.tensor(numbers, dtype=dtype, device=like.device)


def _parse(k: int, net: nn.Sequential) -> Parsed:
    with naming(k):
        parsed = Parsed(net, *_net.parse(net))
        _checks.require_trainable(parsed.layers)
        for name, p in parsed.parameters.items():
            if p.is_inference():
                raise ValueError(f"{name} of net must be made outside of inference mode; got one")
            if p.device.type == "cpu" and p.untyped_storage().is_shared():
                raise ValueError(
                    f"{name} of net must not be in shared memory, which an ensemble would leave; "
                    f"got one that is"
                )
    return parsed


def _require_alike(parsed: Sequence[Parsed]) -> None:
    wanted = _description(parsed[0])
    for k, each in enumerate(parsed):
        for part, other in zip_longest(_description(each), wanted, fillvalue="nothing more"):
            if part != other:
                raise ValueError(
                    f"nets[{k}] must be like nets[0] in all but values; got {part} instead of "
                    f"{other}"
                )


def _description(parsed: Parsed) -> list[str]:
    """All that must be the same in each network: modules, options, and kinds of parameters."""
    found = [f"{activation} at the input" for activation in parsed.input_activations]
    for layer in parsed.layers:
        for name, p in layer.parameters.items():
            kind = f"{p.dtype} on {p.device}, {'learned' if p.requires_grad else 'frozen'}"
            found.append(f"{name} of shape {tuple(p.shape)}, {kind}")
        found += [f"{activation} after {layer.name}" for activation in layer.activations]
    return found


def _require_movable(owned: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse parameters that share memory, between networks or within one: they get their own."""
    everything = {f"{n} of nets[{k}]": p for k, own in enumerate(owned) for n, p in own.items()}
    for other, name in overlapping(everything):
        raise ValueError(
            f"{name} must share no memory with another parameter, because each gets memory of its "
            f"own; got some that it shares with {other}"
        )
