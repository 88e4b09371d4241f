"""Which linear layers a block records."""

from typing import Any

import pytest
import torch
from torch import nn

from manual_bp import (
    Linear,
    record,
)


class TestChoosingLayers:
    @pytest.fixture
    def model(self) -> nn.Module:
        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Linear(4, 4))

        return nn.ModuleDict({"encoder": block(), "decoder": block()})

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            (None, ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]),
            (["decoder.0"], ["decoder.0"]),
            ("decoder.0", ["decoder.0"]),
            (["encoder.*"], ["encoder.0", "encoder.2"]),
            ([Linear], ["encoder.2", "decoder.2"]),
            (["decoder.2", "encoder.?"], ["encoder.0", "encoder.2", "decoder.2"]),
            (iter([Linear, "*.0"]), ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]),
        ],
    )  # fmt: skip
    def test_layers_are_chosen_by_name_pattern_and_type(
        self, model: Any, layers: Any, expected: list[str]
    ) -> None:
        with record(model, layers=layers) as trace:
            model["decoder"](model["encoder"](torch.randn(3, 4))).square().sum(-1).mean().backward()
        assert [layer.name for layer in trace.layers] == expected
        assert trace.chosen == (layers is not None)

    def test_choices_that_fit_no_layer_are_refused(self, model: Any) -> None:
        with pytest.raises(
            ValueError, match=r"must choose linear layers .* 'encoder.0', .*; got 'e'"
        ):
            record(model, layers=["e"])
        with pytest.raises(ValueError, match=r"got <class .*Bilinear'>"):
            record(model, layers=[nn.Bilinear])
        with pytest.raises(TypeError, match="layers must be names or types; got int"):
            record(model, layers=[3])  # type: ignore[list-item]


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"layers must choose at least one linear layer, .* got none"
    ):
        record(nn.Linear(3, 2), layers=[])


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must have linear layers, .*; got Conv1d, which"):
        record(nn.Conv1d(3, 2, 1))


def test_compiled_models_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"model must not be compiled, .* got OptimizedModule ''"):
        record(torch.compile(net))  # type: ignore[arg-type]
    net[0].compile()
    with pytest.raises(TypeError, match="got Linear '0'"):
        record(net)
