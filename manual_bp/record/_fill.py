"""Fills the Trace from a pass: its layers, those missed, and what came from elsewhere."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from manual_bp.record._calls import PendingCall, SeenCalls
from manual_bp.record._choose import Names
from manual_bp.record._graph import Arrivals, Graph
from manual_bp.record._losses import Reduction
from manual_bp.record._samples import InputAndOutput
from manual_bp.trace import LayerTrace, Trace
from manual_bp.trace._layer import learns


class Pass(NamedTuple):
    """A backward pass that has run.

    cost: What was differentiated, as one number.
    is_backward: Whether it was a call of backward(), and not of autograd.grad().
    graphs: Its own, and those of the passes that it ran within itself.
    arrivals: What arrived for each parameter that learns, by its id.
    names: The names of the parameters.
    """

    cost: Tensor
    is_backward: bool
    graphs: Sequence[Graph]
    arrivals: Mapping[int, Arrivals]
    names: Mapping[Tensor, str]

    def has_learned(self, parameter: Tensor) -> bool:
        """Whether a gradient arrived for a parameter; if none was counted, whether it learns."""
        arrival = self.arrivals.get(id(parameter)) if self.is_backward else None
        return learns(parameter) if arrival is None else arrival.count > 0


class Filling:
    """A Trace that is empty until a pass fills it.

    Args:
        calls: The calls of the layers.
        in_and_out: What went into the model and came out of it.
        reduction, is_chosen: How the cost is reduced; whether the user chose the layers.
        without_samples: The layers without samples; None if they are to be recognised.
    """

    def __init__(
        self,
        calls: SeenCalls,
        in_and_out: InputAndOutput,
        reduction: Reduction,
        is_chosen: bool,
        without_samples: Names | None,
    ) -> None:
        self.trace = Trace.__new__(Trace)
        self._calls, self._in_and_out, self._reduction = calls, in_and_out, reduction
        self._is_chosen, self._without_samples = is_chosen, without_samples
        self._missed: dict[str, str] = {}
        self._others: set[Tensor] = set()  # what other calls of backward() brought gradients to

    @property
    def is_filled(self) -> bool:
        return "layers" in vars(self.trace)

    def add_elsewhere(
        self, parameters: Iterable[Tensor], names: Mapping[Tensor, str] | None = None
    ) -> None:
        """Note that another pass brought gradients; with names, also in the filled trace."""
        self._others.update(parameters)
        if names is not None:
            more = {p for p, name in names.items() if name in self.trace.elsewhere}
            self.trace.elsewhere = _named(names, self._others | more)

    def fill(self, passed: Pass) -> bool:
        """Fill the trace from the δ that have arrived; returns whether there were any.

        If there were none, the trace is empty: what it held is from a pass that does not count.
        """
        vars(self.trace).clear()
        # Passes within autograd.grad() add to `.grad`, and not to what that returns.
        graphs = passed.graphs if passed.is_backward else passed.graphs[:1]
        self._missed = dict.fromkeys(self._calls.names.values(), "it did not run")
        layers: list[tuple[int, LayerTrace]] = []
        seen: list[PendingCall] = []
        nodes = set[Any]().union(*(graph.users for graph in graphs))
        for layer, calls in self._calls.by_layer.items():
            of_pass = [call for call in calls if call.node in nodes]
            reached = [call for call in of_pass if call.gradient is not None]
            reason = self._reason_to_miss(layer, reached)
            if reason is None:
                del self._missed[self._calls.names[layer]]
                layers.append((reached[0].number, self._layer(layer, reached, graphs, passed)))
            else:
                self._missed[self._calls.names[layer]] = reason
            # Calls that no δ reached use the weights as well, unless the layer is missed for
            # another reason.
            if layers[-1][1].has_samples if reason is None else not reached:
                seen += of_pass
        if not layers:
            return False
        if len(graphs) == 1:  # layers of inner passes run in another order
            layers.sort(key=lambda item: item[0])
        vars(self.trace).update(
            cost=passed.cost,
            output=self._in_and_out.output,
            layers=tuple(layer for _, layer in layers),
            parameter_names=passed.names,
            missed=self._missed,
            elsewhere=_named(passed.names, _elsewhere(passed, graphs, seen) | self._others),
            chosen=self._is_chosen,
            is_assigned=passed.is_backward,
            batch=self._in_and_out.batch,
        )
        return True

    def _reason_to_miss(self, layer: nn.Module, reached: Sequence[PendingCall]) -> str | None:
        if layer in self._calls.unseen:
            return (
                "it ran, but its output was not its product w a + b: a hook, or a custom forward, "
                "changed it"
            )
        if not reached:
            return "it ran, but no error reached it"
        if any(call.w is not reached[0].w or call.b is not reached[0].b for call in reached[1:]):
            return "it ran with several weights"
        return None

    def _layer(
        self,
        layer: nn.Module,
        calls: Sequence[PendingCall],
        graphs: Sequence[Graph],
        passed: Pass,
    ) -> LayerTrace:
        complete = tuple(
            call.complete(uses=sum([graph.ways_to(call.node) for graph in graphs]))
            for call in calls
        )
        if self._without_samples is not None:
            has_samples = layer not in self._without_samples
        else:  # a model that is given nothing but its own tensors makes its samples itself
            has_samples = not (self._in_and_out.is_fed and any(call.is_own for call in calls))
        w, b = calls[0].w, calls[0].b
        return LayerTrace(
            name=self._calls.names[layer],
            w=w,
            b=b,
            calls=complete,
            scale=complete[0].samples if self._reduction == "mean" else 1,
            w_version=calls[0].w_version,
            learns_w=passed.has_learned(w),
            learns_b=b is not None and passed.has_learned(b),
            has_samples=has_samples,
        )

    def require_filled(self) -> None:
        """Refuse to leave the block with an empty trace.

        Raises:
            RuntimeError: It is empty; the message says why.
        """
        if self.is_filled:
            return
        if self._missed:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in self._missed.items())
            raise RuntimeError(
                f"a backward pass must reach a layer that can be recorded; got one through the "
                f"model's parameters that has none ({reasons})"
            )
        if self._calls.all:
            raise RuntimeError(
                "backward() must run within the block of record, in its thread; it did not"
            )
        if self._calls.unseen:
            raise RuntimeError(
                "a linear layer of the model must return its product w a + b; none did: their "
                "outputs were changed, by a hook or by a custom forward"
            )
        raise RuntimeError(
            "a linear layer of the model must run within the block of record, in its thread, with "
            "gradients on; none did: call the model there, forward and backward (one that is "
            "compiled does not show its layers: record the model that was compiled)"
        )


def _elsewhere(passed: Pass, graphs: Sequence[Graph], seen: Iterable[PendingCall]) -> set[Tensor]:
    """The parameters with gradients that the calls that were seen do not account for.

    That is, where the graphs use a parameter more often than calls were seen, or where more
    gradients arrived than there are graphs to bring them.
    """
    uses_seen = Counter([id(p) for call in seen for p in (call.w, call.b)])
    found = set()
    for key, arrival in passed.arrivals.items():
        count = arrival.count
        ends = [(graph, graph.ends[key]) for graph in graphs if key in graph.ends]
        if passed.is_backward and not count:
            continue
        is_used_more = sum([graph.ways_to(end) for graph, end in ends]) > uses_seen[key]
        if is_used_more or count > (len(ends) if passed.is_backward else 0):
            found.add(arrival.parameter)
    return found


def _named(names: Mapping[Tensor, str], parameters: Collection[Tensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for p, name in names.items() if p in parameters))
