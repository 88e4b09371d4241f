"""Parameters with a gradient that is not, or not wholly, in the pairs: they are elsewhere."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from manual_bp import (
    Linear,
    Softplus,
    Trace,
    record,
)
from manual_bp.record._graph import Graph
from tests.helpers import assert_same
from tests.record.recording import (
    Checkpointed,
    Doing,
    RunsAgain,
    WithHidden,
    assert_gradients_are_those_of_autograd,
    assert_per_sample_follows,
    of,
    recorded,
)


class TestElsewhere:
    """Parameters with a gradient that is not, or not wholly, in the pairs."""

    def test_parameters_of_other_layers_are_elsewhere(self) -> None:
        net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        trace = recorded(net, torch.randn(5, 4))
        assert trace.elsewhere == ("1.weight", "1.bias")
        assert trace.per_sample_norms().shape == (5,)
        with pytest.raises(
            ValueError, match=r"got a model where that of '1.weight', '1.bias' comes"
        ):
            trace.clipped_grads(1.0)
        chosen = recorded(net, torch.randn(5, 4), layers=[nn.Linear])
        assert list(chosen.clipped_grads(1.0)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        net[1].requires_grad_(False)
        assert recorded(net, torch.randn(5, 4)).elsewhere == ()

    def test_a_weight_that_is_also_an_embedding_is_elsewhere(self) -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        model["head"].weight = model["embed"].weight

        words = torch.arange(6)

        def run(**options: Any) -> Trace:
            with record(model, **options) as trace:
                z = model["head"](model["embed"](words))
                F.cross_entropy(z, words).backward()
            return trace

        trace = run()
        assert trace.elsewhere == ("embed.weight",)
        for ask in (trace.per_sample_grads, trace.per_sample_norms):
            with pytest.raises(ValueError, match=r"got 'embed.weight', used elsewhere as well"):
                ask()
        assert list(run(layers="head").per_sample_grads()) == ["embed.weight"]

    def test_a_weight_with_a_penalty_is_elsewhere(self) -> None:
        layer = nn.Linear(4, 3)
        penalty = lambda z: z.square().sum(-1).mean() + layer.weight.square().sum()  # noqa: E731
        assert recorded(layer, torch.randn(5, 4), penalty).elsewhere == ("weight",)

    def test_a_layer_that_attention_never_calls_is_elsewhere(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        trace = recorded(model, torch.randn(3, 5, 8), lambda z: z.square().sum((1, 2)).mean())
        assert [layer.name for layer in trace.layers] == ["linear1", "linear2"]
        assert "self_attn.out_proj.weight" in trace.elsewhere
        assert "linear1.weight" not in trace.elsewhere
        with pytest.raises(
            KeyError, match=r"'self_attn.out_proj' is not in this trace: it did not"
        ):
            trace["self_attn.out_proj"]

    def test_the_original_of_a_pruned_weight_is_elsewhere(self) -> None:
        net: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        prune.l1_unstructured(net[0], "weight", 0.5)
        trace = recorded(net, torch.randn(5, 4))
        assert torch.equal(trace["0"].w, net[0].weight)
        assert trace.elsewhere == ("0.weight_orig",)
        assert list(trace.per_sample_grads()) == ["0.bias", "1.weight", "1.bias"]


class TestUsesOfAWeightElsewhere:
    """Uses of a weight that no pair accounts for are noticed, even if other things ran too."""

    @pytest.mark.parametrize("extra_calls", [0, 1, 3])
    def test_calls_that_the_cost_does_not_use_do_not_count(self, extra_calls: int) -> None:
        layer = nn.Linear(4, 4)
        x = torch.randn(5, 4)
        with record(layer) as trace:
            for _ in range(extra_calls):
                layer(x)
            (layer(x).square().sum(-1).mean() + layer.weight.square().sum()).backward()
        assert trace.elsewhere == ("weight",)
        assert len(trace[""].calls) == 1

    @pytest.mark.parametrize("kind", [nn.Linear, Linear])
    def test_a_cast_that_autocast_makes_once_may_serve_two_uses(
        self, kind: Any, device: torch.device
    ) -> None:
        layer = kind(4, 4, device=device)
        x = torch.randn(5, 4, device=device)
        for uses_again in (False, True):
            layer.zero_grad()
            with record(layer) as trace:
                with torch.autocast(device.type, torch.bfloat16):
                    z = layer(torch.tanh(layer(x)))
                    if uses_again:
                        z = F.linear(torch.tanh(z), layer.weight)
                z.float().square().sum(-1).mean().backward()
            assert trace.elsewhere == (("weight",) if uses_again else ())

    def test_weights_that_a_reentrant_checkpoint_uses_without_their_layer_are_elsewhere(
        self,
    ) -> None:
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("linear" in name or "out_proj" in name)
        x = torch.randn(3, 5, 8, requires_grad=True)
        with record(encoder) as trace:
            y = checkpoint(encoder, x, use_reentrant=True)
            y.square().sum((1, 2)).mean().backward()
        assert trace.elsewhere == ("self_attn.out_proj.weight", "self_attn.out_proj.bias")
        with pytest.raises(ValueError, match=r"got a model where that of 'self_attn.out_proj"):
            trace.clipped_grads(1.0)


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Softplus])
def test_weights_with_a_penalty_on_gradients_are_elsewhere(kind: Any, activation: Any) -> None:
    """Backward through backward uses the weights again without running a layer."""
    net = nn.Sequential(kind(3, 4), activation(), kind(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    net.zero_grad()
    with record(net) as trace:
        y = net(x)[:, 0]
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y + slope.square().sum(1)).mean().backward()
    assert trace.elsewhere == ("0.weight", "2.weight")
    with pytest.raises(ValueError, match=r"got '0.weight', '2.weight', used elsewhere as well"):
        trace.per_sample_norms()


def test_parameters_hidden_by_a_reentrant_checkpoint_are_elsewhere() -> None:
    body = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    model = Checkpointed(body, use_reentrant=True)
    trace = recorded(model, torch.randn(6, 5, requires_grad=True))
    assert trace.elsewhere == ("body.1.weight", "body.1.bias")


def test_a_context_with_a_variable_is_not_taken_for_a_leaf() -> None:
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.variable = x.detach()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    model = Doing(nn.Linear(4, 3), Kept.apply)
    assert recorded(model, torch.randn(5, 4)).elsewhere == ()


def test_a_graph_that_shows_no_leaf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later PyTorch named the nodes that add to `.grad` differently."""
    monkeypatch.setattr(sys.modules[Graph.__module__], "leaf_of", lambda _: None)
    message = "must find the parameters in autograd's graph; got one that shows none"
    with pytest.raises(RuntimeError, match=message):
        recorded(nn.Linear(4, 3), torch.randn(5, 4))


def arrived_but_unsaid(model: nn.Module, trace: Trace) -> list[str]:
    """The parameters with a `.grad` that are neither in the trace nor elsewhere."""
    recorded_ = {p for layer in trace for p in (layer.w, layer.b)}
    return [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p not in recorded_ and name not in trace.elsewhere
    ]


class TestGradientsThatBackwardMakesByItself:
    """The backward of a Function may run a pass within the pass, in any way."""

    X = torch.randn(5, 4, dtype=torch.float64)

    @pytest.mark.parametrize("how", ["backward", "method"])
    @pytest.mark.parametrize(
        "activation", [nn.Tanh(), nn.ReLU(inplace=True), Softplus(), nn.GELU()], ids=str
    )
    def test_layers_within_are_recorded(self, how: str, activation: nn.Module) -> None:
        model = WithHidden(nn.Linear(6, 6), activation, Linear(6, 6), how=how)
        trace = recorded(model, self.X)
        assert trace.elsewhere == ()
        assert trace.missed == {}
        assert_gradients_are_those_of_autograd(trace)
        assert_per_sample_follows(trace)
        model.how = ""
        expected = recorded(model, self.X)
        for one, other in zip(trace, expected, strict=True):
            assert_same(of(one), of(other))
            assert list(map(repr, one.activations)) == list(map(repr, other.activations))
        clipped = trace.clipped_grads(0.1)
        assert_same(list(clipped.values()), list(expected.clipped_grads(0.1).values()))

    @pytest.mark.parametrize("how", ["backward", "engine", "by hand"])
    @pytest.mark.parametrize("with_grad", [False, True])
    def test_other_parameters_within_are_elsewhere(self, how: str, with_grad: bool) -> None:
        model = WithHidden(nn.LayerNorm(6), nn.PReLU(), how=how)
        with record(model) as trace:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if with_grad else None
            model(self.X).square().sum(-1).mean().backward()
        assert arrived_but_unsaid(model, trace) == []
        assert trace.elsewhere == ("block.0.weight", "block.0.bias", "block.1.weight")
        with pytest.raises(ValueError, match="clipped_grads must have the whole gradient"):
            trace.clipped_grads(1.0)

    @pytest.mark.parametrize("how", ["engine", "by hand"])
    def test_layers_of_a_pass_that_cannot_be_seen_are_elsewhere(self, how: str) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh(), how=how)
        trace = recorded(model, self.X)
        assert "block.0" in trace.missed
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")

    @pytest.mark.parametrize("how", ["backward", "engine"])
    def test_a_weight_used_within_and_without_is_recorded_or_refused(self, how: str) -> None:
        model = WithHidden(nn.Linear(6, 6), how=how)
        model.head = model.block[0]  # type: ignore[assignment]
        trace = recorded(model, self.X)
        if how == "backward":
            assert len(trace["head" if "head" in trace else "block.0"].calls) == 2
            assert trace.elsewhere == ()
            assert_per_sample_follows(trace)
        else:
            with pytest.raises(ValueError, match="a parameter's whole gradient must come from"):
                trace.per_sample_norms()

    def test_an_optimiser_that_steps_within_backward_hides_nothing(self) -> None:
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
            parameter.grad = None

        model = WithHidden(nn.LayerNorm(6), how="engine")
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        assert recorded(model, self.X).elsewhere == ("block.0.weight", "block.0.bias")

    def test_gradients_that_share_memory_do_not_count_as_written_by_hand(self) -> None:
        """In the buckets of distributed training, all gradients have the same version."""
        model = WithHidden(nn.Tanh(), how="")
        flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        for p, part in zip(
            model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad = part.view_as(p)
        with record(model) as trace:
            model(self.X).square().sum(-1).mean().backward()
        assert trace.elsewhere == ()
        assert flat.count_nonzero() > 0
        assert_gradients_are_those_of_autograd(trace)

    def test_a_pass_run_by_a_hook_is_elsewhere(self) -> None:
        """It brings gradients of another cost, which belong to no sample."""
        model = WithHidden(nn.Tanh(), how="")

        def penalise(_: Tensor) -> None:
            with torch.enable_grad():
                model.head.weight.square().sum().backward()

        with record(model) as trace:
            h = torch.tanh(model.first(self.X))
            h.register_hook(penalise)
            model.head(h).square().sum(-1).mean().backward()
        assert trace.elsewhere == ("head.weight",)

    def test_passes_within_passes_within_passes_are_recorded(self) -> None:
        inner = WithHidden(nn.Linear(6, 6), nn.Tanh())

        class Outer(WithHidden):
            def forward(self, x: Tensor) -> Tensor:
                return RunsAgain.apply(inner, "backward", x)  # type: ignore[no-any-return]

        model = Outer(inner)
        x = self.X.clone().requires_grad_()
        trace = recorded(model, x)
        assert {layer.name for layer in trace} == {
            "block.0.first",
            "block.0.block.0",
            "block.0.head",
        }
        assert trace.elsewhere == ()
        assert_gradients_are_those_of_autograd(trace)

    def test_with_some_inputs_only_every_gradient_is_accounted_for(self) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh())
        with record(model) as trace:
            cost = model(self.X).square().sum(-1).mean()
            cost.backward(inputs=[model.first.weight])
        assert arrived_but_unsaid(model, trace) == []
        assert set(trace.per_sample_grads()) == {
            name for name, p in model.named_parameters() if p.grad is not None
        }

    def test_within_autograd_grad_layers_are_elsewhere(self) -> None:
        model = WithHidden(nn.Linear(6, 6), nn.Tanh())
        with record(model) as trace:
            cost = model(self.X).square().sum(-1).mean()
            torch.autograd.grad(
                cost, list(model.head.parameters()) + list(model.first.parameters())
            )
        assert "block.0" not in trace
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")

    @pytest.mark.parametrize("how", ["by hand", "engine"])
    def test_a_block_that_also_runs_after_it_is_elsewhere(self, how: str) -> None:
        """What is written into .grad by hand then comes after what autograd adds there."""

        class Again(WithHidden):
            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.block(RunsAgain.apply(self.block, how, self.first(x))))  # type: ignore[no-any-return]

        trace = recorded(Again(nn.Linear(6, 6), nn.Tanh()), self.X)
        assert trace.elsewhere == ("block.0.weight", "block.0.bias")
        with pytest.raises(ValueError, match="used elsewhere as well"):
            trace.per_sample_norms()

    def test_a_weight_that_a_checkpoint_uses_twice_is_elsewhere(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) @ self.fc.weight  # type: ignore[no-any-return]

        model, x = Tied(), torch.randn(5, 4, requires_grad=True)
        trace = recorded(Checkpointed(nn.Sequential(model, nn.Linear(4, 3)), True), x)
        assert trace.elsewhere == ("body.0.fc.weight",)

    def test_a_penalty_on_parameters_of_functional_call_is_noticed(self) -> None:
        net = nn.Linear(4, 3)
        fast = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        with record(net) as trace:
            z = torch.func.functional_call(net, fast, (torch.randn(5, 4),))
            (z.square().sum(-1).mean() + fast["weight"].square().sum()).backward()
        assert trace.elsewhere == ("weight",)
