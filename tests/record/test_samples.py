"""Which layers have samples, and how many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manual_bp import (
    Trace,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    assert_gradients_are_those_of_autograd,
    assert_per_sample_follows,
    recorded,
)


class Towers(nn.Module):
    """Logits between N samples and C classes that the model describes."""

    def __init__(self, classes: int, kind: str) -> None:
        super().__init__()
        self.img, self.txt = nn.Linear(4, 6), nn.Linear(3, 6)
        self.kind = kind
        self.register_buffer("described", torch.randn(classes, 2, 3))
        self.register_buffer("indices", torch.randint(9, (classes,)))
        self.embed, self.norm = nn.Embedding(9, 3), nn.LayerNorm(3)
        self.context = nn.Parameter(torch.randn(1, 2, 3))
        self.double()

    def classes(self) -> Tensor:
        described: Any = self.described
        if self.kind == "buffer":
            return described[:, 0]  # type: ignore[no-any-return]
        if self.kind == "computed":
            return self.norm(described.mean(1) / 2)  # type: ignore[no-any-return]
        if self.kind == "embedded":
            return F.dropout(self.embed(self.indices), 0.0)
        shared = self.context.expand(len(described), -1, -1)  # a prompt, learned for all classes
        return torch.cat([described, shared], dim=1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.img(x) @ self.txt(self.classes()).mT  # type: ignore[no-any-return]


class Held(NamedTuple):
    x: Tensor


@dataclass
class Given:
    x: Tensor


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Positions(nn.Module):
    """Adds to (N, T, 4) what a layer makes of T positions, or of T prompts."""

    WAYS: ClassVar[dict[str, Callable[[Any, int], Tensor]]] = {
        "arange": lambda self, rows: self.embed(torch.arange(rows)),
        "sinusoids": lambda self, rows: torch.outer(torch.arange(rows), self.scales).sin(),
        "linspace": lambda self, rows: torch.linspace(0, 1, rows)[:, None] * self.scales,
        "one hot": lambda _, rows: F.one_hot(torch.arange(rows), 4).double(),
        "eye": lambda _, rows: torch.eye(rows, 4),
        "indexed": lambda self, rows: self.embed.weight[torch.arange(rows)],
        "joined": lambda self, rows: torch.cat([p[None] for p in self.embed.weight[:rows]]),
        "chunks": lambda self, rows: torch.cat(self.embed.weight[:rows].chunk(2)),
        "stacked": lambda self, rows: torch.stack(list(self.embed.weight[:rows])),
        "scaled": lambda self, rows: self.embed.weight[:rows] * torch.tensor(2.0),
        "scaled from the left": lambda self, rows: torch.tensor(2.0) * self.embed.weight[:rows],
        "in place": lambda self, rows: self.embed.weight[:rows].clone().mul_(2).tanh_(),
        "own function": lambda self, rows: Twice.apply(self.embed.weight[:rows]),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.pos, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scales", torch.rand(4))
        self.double()

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else x.x
        positions = self.WAYS[self.way](self, x.shape[1]).to(x.dtype)
        return torch.tanh(self.fc(x) + self.pos(positions)).mean(1)


class TestRowsThatAreNoSamples:
    @staticmethod
    def run(model: nn.Module, x: Tensor, **options: Any) -> Trace:
        y = torch.zeros(len(x), dtype=torch.long)
        return recorded(model, x, lambda z: F.cross_entropy(z, y), **options)

    @pytest.mark.parametrize("kind", ["buffer", "computed", "embedded", "prompt"])
    @pytest.mark.parametrize("classes", [5, 6])
    def test_layers_fed_with_the_models_own_tensors_have_no_samples(
        self, kind: str, classes: int
    ) -> None:
        model, x = Towers(classes, kind), torch.randn(6, 4, dtype=torch.float64)
        trace = self.run(model, x)
        assert [layer.has_samples for layer in trace] == [True, False]
        assert trace.samples == 6
        assert_gradients_are_those_of_autograd(trace)
        assert {"txt.weight", "txt.bias"} <= set(trace.elsewhere)
        assert "txt.weight" not in str(trace.diagnostics())  # since its layer is in the table
        found = trace.per_sample_grads()
        assert list(found) == ["img.weight", "img.bias"]
        for i in range(6):
            alone = self.run(model, x[i : i + 1])["img"]
            assert_same([found["img.weight"][i]], [alone.grad_w])  # type: ignore[list-item]
        assert [len(list(part)) for part in trace.split(4)] == [1, 1]
        with pytest.raises(ValueError, match=r"got a model where that of .*txt.weight"):
            trace.clipped_grads(1.0)
        with pytest.raises(ValueError, match="layer 'txt' must have samples in its input's first"):
            trace["txt"].per_sample_grad_w()
        assert list(self.run(model, x, layers="img").clipped_grads(1.0)) == list(found)
        with pytest.raises(ValueError, match=r"chosen must have samples .* got 'txt', named"):
            self.run(model, x, layers=["img", "txt"]).per_sample_norms()

    @pytest.mark.parametrize("way", Positions.WAYS)
    @pytest.mark.parametrize("wrap", [lambda x: x, Held, Given], ids=["tensor", "tuple", "object"])
    def test_as_many_positions_or_prompts_as_samples_are_not_samples(
        self, way: str, wrap: Any
    ) -> None:
        model, x = Positions(way), torch.randn(4, 4, 4, dtype=torch.float64)
        trace = recorded(model, wrap(x))
        assert {layer.name: layer.has_samples for layer in trace} == {"fc": True, "pos": False}
        found = trace.per_sample_grads()
        assert list(found) == ["fc.weight", "fc.bias"]
        for i in range(4):
            alone = recorded(model, wrap(x[i : i + 1]))["fc"].grad_w
            assert alone is not None
            assert_same([found["fc.weight"][i]], [alone])

    def test_an_optimiser_that_steps_within_backward_hides_no_prompt(self) -> None:
        model: Any = Towers(6, "buffer")
        model.context = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
        model.classes = lambda: model.context
        x = torch.randn(6, 4, dtype=torch.float64)

        def step(p: Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad)  # type: ignore[arg-type]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        trace = self.run(model, x)
        assert [layer.has_samples for layer in trace] == [True, False]
        assert list(trace.per_sample_grads()) == ["img.weight", "img.bias"]

    def test_a_count_that_the_model_is_given_is_of_samples(self) -> None:
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        with record(net) as trace:
            net(torch.linspace(0, 1, 6)[:, None]).square().sum(-1).mean().backward()
        assert trace.per_sample_norms().shape == (6,)

    def test_a_buffer_that_samples_were_written_to_has_samples(self) -> None:
        class Buffered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("held", torch.zeros(6, 4))
                self.fc = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                held: Any = self.held
                return self.fc(held.copy_(x).mul_(2))  # type: ignore[no-any-return]

        trace = recorded(Buffered(), torch.randn(6, 4))
        assert trace["fc"].has_samples
        assert trace.per_sample_norms().shape == (6,)

    def test_the_index_of_a_single_sample_is_not_a_factor(self) -> None:
        """It is the id of a sample without a batch dimension."""
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        trace = recorded(net, torch.tensor(3))
        assert trace["1"].has_samples

    def test_layers_named_in_no_samples_have_none(self) -> None:
        class Experts(nn.Module):
            """The expert takes as many rows as it has slots, from any samples."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)
                self.out, self.slots = nn.Linear(4, 2), 3

            def forward(self, x: Tensor) -> Tensor:
                h = self.first(x)
                taken = h.norm(dim=1).topk(self.slots, dim=0).indices
                return self.out(h.index_add(0, taken, self.expert(h[taken])))  # type: ignore[no-any-return]

        model = Experts()
        for slots in (6, 3):
            model.slots = slots
            trace = recorded(model, torch.randn(6, 4), no_samples="exp*")
            assert [layer.has_samples for layer in trace] == [True, False, True]
            assert trace.elsewhere == ("expert.weight", "expert.bias")
            assert list(trace.per_sample_grads()) == [
                "first.weight", "first.bias", "out.weight", "out.bias",
            ]  # fmt: skip
        with pytest.raises(ValueError, match=r"got 6 in 'first' and 3 in 'expert': name layers"):
            recorded(model, torch.randn(6, 4)).per_sample_norms()

    def test_no_samples_that_fit_no_layer_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no_samples must choose linear layers .* got 'txt'"):
            record(nn.Linear(3, 2), no_samples=["txt"])
        with pytest.raises(TypeError, match="no_samples must be names or types; got int"):
            record(nn.Linear(3, 2), no_samples=[3])  # type: ignore[list-item]

    @pytest.mark.parametrize("kind", ["expanded", "repeated", "zeros", "joined", "stacked"])
    def test_the_models_own_tensors_repeated_for_each_sample_are_samples(self, kind: str) -> None:
        """Such as the first state of a recurrent network, or the queries of an attention."""

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.outer = nn.Linear(5, 5), nn.Linear(4, 5)
                self.start = nn.Parameter(torch.randn(1, 5))

            def forward(self, x: Tensor) -> Tensor:
                starts = {
                    "expanded": lambda: self.start.expand(len(x), -1),
                    "repeated": lambda: self.start.repeat(len(x), 1),
                    "joined": lambda: torch.cat([self.start] * len(x)),
                    "stacked": lambda: torch.stack([self.start[0] * 1] * len(x)),
                    "zeros": lambda: torch.zeros(len(x), 5, dtype=x.dtype),
                }
                h = starts[kind]()
                for _ in range(2):
                    h = torch.tanh(self.inner(h) + self.outer(x))
                return h

        model = Recurrent().double()
        model.start.requires_grad_(False)
        for n in (6, 5):
            assert_per_sample_follows_but_frozen(recorded(model, torch.randn(n, 4).double()))

    def test_an_empty_list_says_that_all_have_samples(self) -> None:
        """Such as the codes of an auto-decoder, one for each sample."""

        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.codes, self.fc = nn.Parameter(torch.randn(6, 3)), nn.Linear(3, 4)

            def forward(self, *noise: Tensor) -> Tensor:
                return sum(noise, self.fc(self.codes))

        model, x = Decoder().double(), torch.randn(6, 4).double()
        with pytest.raises(ValueError, match="must have samples in their input; got 'fc'"):
            recorded(model, x).per_sample_grads()
        assert list(recorded(model, x, no_samples=[]).per_sample_grads()) == [
            "fc.weight",
            "fc.bias",
        ]
        model.zero_grad()
        with record(model) as trace:  # a model that is given nothing has no other samples
            model().square().sum(-1).mean().backward()
        assert trace.per_sample_norms().shape == (6,)

    @pytest.mark.parametrize("shape", [(3, 5, 4), (1, 5, 4)], ids=str)
    def test_samples_flattened_into_rows_are_noticed(self, shape: tuple[int, ...]) -> None:
        class Flat(nn.Module):
            def __init__(self, comes_back: bool) -> None:
                super().__init__()
                self.fc, self.comes_back = nn.Linear(4, 2), comes_back

            def forward(self, x: Tensor) -> Tensor:
                z = self.fc(x.flatten(0, 1))
                return z.unflatten(0, x.shape[:2]) if self.comes_back else z  # type: ignore[no-any-return]

        trace = recorded(Flat(comes_back=True), torch.randn(shape))
        n, rows = shape[0], shape[0] * shape[1]
        with pytest.raises(ValueError, match=f"got {rows} in 'fc' and {n} in the model"):
            trace.per_sample_norms()
        trace = recorded(Flat(comes_back=False), torch.randn(shape))
        assert trace.samples == rows  # the output has one row for each row of the input

    @pytest.mark.parametrize("out", ["cost", "object", "one number a sample", "one a row"])
    def test_n_is_found_in_outputs_of_any_kind(self, out: str) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Any:
                z = self.fc(x.flatten(0, 1)).square().sum(-1)
                return {
                    "cost": z.mean(),
                    "object": Given(z.view(x.shape[:2])),
                    "one number a sample": z.view(x.shape[:2]).sum(1),
                    "one a row": z,
                }[out]

        model, x = Flat(), torch.randn(3, 5, 4)
        with record(model) as trace:
            z = model(x)
            (z.x if isinstance(z, Given) else z).mean().backward()
        if out == "one a row":
            assert trace.samples == 15
        else:
            with pytest.raises(ValueError, match="got 15 in 'fc' and 3 in the model's input and"):
                trace.per_sample_norms()

    def test_n_is_found_in_the_output_if_the_input_does_not_show_it(self) -> None:
        class Bag(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.fc, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, words: Tensor) -> Tensor:
                return self.out(self.fc(self.embed(words)).unflatten(0, (-1, 3)).mean(1))  # type: ignore[no-any-return]

        trace = recorded(Bag(), torch.arange(6) % 5, layers="fc")
        with pytest.raises(ValueError, match="got 6 in 'fc' and 2 in the model's input and"):
            trace.per_sample_norms()

    def test_n_is_unknown_if_input_and_output_disagree(self) -> None:
        """Time comes first in the input, samples come first within and in the output."""

        class Swaps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.transpose(0, 1)).sum(1)  # type: ignore[no-any-return]

        trace = recorded(Swaps(), torch.randn(7, 5, 4))
        assert trace.samples == 5
        assert trace.per_sample_norms().shape == (5,)


def assert_per_sample_follows_but_frozen(trace: Trace) -> None:
    assert trace.elsewhere == ()
    assert all(layer.has_samples for layer in trace)
    assert_per_sample_follows(trace)
