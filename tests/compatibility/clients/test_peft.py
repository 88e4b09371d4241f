"""PEFT: low-rank adapters over converted layers, and layers converted under adapters."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manual_bp
from manual_bp import convert, restore
from tests.compatibility.clients.side_by_side import (
    EXACT,
    NEEDS,
    assert_learns,
    assert_same_parameters,
    changes,
    identities,
    train,
    twins,
)
from tests.helpers import assert_same, nodes

peft: Any = pytest.importorskip("peft", reason=NEEDS)
transformers: Any = pytest.importorskip("transformers", reason=NEEDS)

pytestmark = [
    pytest.mark.clients,
    # PEFT uses a deprecated name of transformers.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 20
WORDS = 64
LINEARS = 2 * 7 + 1  # two layers of Llama and its head
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTED = 2 * len(TARGETS)


def causal() -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def adapted(model: Any, **options: Any) -> Any:
    """The model with adapters, initialised from a given seed."""
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": TARGETS} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def words(step: int) -> Tensor:
    return torch.randint(WORDS, (4, 12), generator=torch.Generator().manual_seed(step % 4))


def loss_of(model: Any, step: int) -> Tensor:
    return model(input_ids=words(step), labels=words(step)).loss  # type: ignore[no-any-return]


def losses(model: Any, steps: int = STEPS) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return train(wanted, [partial(loss_of, model.train(), i) for i in range(steps)])


def assert_trains_the_same(ours: Any, theirs: Any) -> None:
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    seen = losses(ours)
    assert_same(seen, losses(theirs), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    assert_learns(seen)
    assert frozen
    for name, parameter in ours.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def converted_first(**options: Any) -> tuple[Any, Any]:
    ours, theirs, report = twins(causal())
    assert changes(report) == {"Linear": LINEARS}
    return adapted(ours, **options), adapted(theirs, **options)


def converted_after(**options: Any) -> tuple[Any, Any]:
    ours, theirs, report = twins(adapted(causal(), **options))
    linears = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    assert changes(report) == {"Linear": len(linears)}
    return ours, theirs


either_order = pytest.mark.parametrize("make", [converted_first, converted_after])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"use_dora": True},
        {"bias": "lora_only", "use_rslora": True, "modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@either_order
def test_training(make: Any, options: dict[str, Any]) -> None:
    assert_trains_the_same(*make(**options))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # The adapters' own two products are PyTorch's layers.
        (converted_first, {"LinearFunctionBackward": LINEARS - 3, "MmBackward0": 2 * ADAPTED}),
        (converted_after, {"LinearFunctionBackward": LINEARS - 3 + 2 * ADAPTED}),
    ],
)
def test_every_converted_linear_is_ours_in_the_graph(make: Any, expected: dict[str, int]) -> None:
    # The first layer's queries, keys and values are frozen and get their input from frozen
    # embeddings, so only their adapters need gradients: these 3 have no node.
    ours, _ = make()
    found = nodes(loss_of(ours, 0))
    assert {name: found[name] for name in found if "Linear" in name or "Mm" in name} == expected
    bases = [m.base_layer for m in ours.modules() if hasattr(m, "base_layer")]
    assert [type(base) for base in bases] == [manual_bp.Linear] * ADAPTED


@either_order
def test_merge_and_unload(make: Any) -> None:
    ours, theirs = make()
    losses(ours)
    losses(theirs)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert_same_parameters(merged, expected, **EXACT)
    assert_same([merged(words(0)).logits], [expected(words(0)).logits], **EXACT)
    assert not torch.equal(merged(words(0)).logits, causal()(words(0)).logits)
    assert list(merged.state_dict()) == list(causal().state_dict())
    linears = [m for m in merged.modules() if isinstance(m, nn.Linear)]
    assert [type(module) for module in linears] == [manual_bp.Linear] * LINEARS
    restore(merged)
    assert [type(module) for module in linears] == [nn.Linear] * LINEARS


@either_order
def test_an_adapter_merged_disabled_and_unmerged_matches_pytorchs(make: Any) -> None:
    ours, theirs = make()
    for model in (ours, theirs):
        losses(model, 5)
        model.eval()
    seen = []
    for model in (ours, theirs):
        apart = model(words(0)).logits
        with model.disable_adapter():
            without = model(words(0)).logits
        model.merge_adapter()
        merged = model(words(0)).logits
        model.unmerge_adapter()
        seen.append([apart, without, merged, model(words(0)).logits])
    assert_same(seen[0], seen[1], **EXACT)
    assert not torch.equal(seen[0][0], seen[0][1])


@either_order
def test_restore(make: Any) -> None:
    ours, theirs = make()
    restore(ours)
    before = identities(ours)
    linears = [m for m in ours.modules() if isinstance(m, nn.Linear)]
    assert {type(module) for module in linears} == {nn.Linear}
    keys = list(ours.state_dict())
    assert changes(convert(ours)) == {"Linear": len(linears)}
    assert list(ours.state_dict()) == keys == list(theirs.state_dict())
    assert_same(losses(ours, 5), losses(theirs, 5), **EXACT)
    restore(ours)
    assert identities(ours) == before
    assert_same(losses(ours, 5), losses(theirs, 5), **EXACT)


@either_order
def test_an_adapter_can_be_loaded_over_layers_of_the_other_kind(make: Any, tmp_path: Path) -> None:
    ours, _ = make()
    losses(ours, 5)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(causal(), tmp_path, is_trainable=True)
    assert_same_parameters(ours, theirs, **EXACT)
    assert_same(losses(ours, 5), losses(theirs, 5), **EXACT)


def with_a_sigmoid() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))


def test_fused_pairs_are_refused_by_name_and_skipped_by_kind() -> None:
    model = with_a_sigmoid()
    convert(model, fuse=True)
    message = r"Target module LinearSigmoid\(in_features=5, .*\) is not supported. Currently, only"
    with pytest.raises(ValueError, match=message):
        adapted(model, target_modules=["0"])

    model = with_a_sigmoid()
    convert(model, fuse=True)
    seen = adapted(model, target_modules="all-linear").base_model.model
    assert type(seen[0]) is manual_bp.LinearSigmoid
    assert type(seen[2].base_layer) is manual_bp.Linear


def test_an_adapted_pair_is_not_fused() -> None:
    ours, theirs, report = twins(adapted(with_a_sigmoid(), target_modules=["0"]), fuse=True)
    # The adapter adds its part between the Linear and the Sigmoid.
    assert changes(report) == {"Linear": 4, "Sigmoid": 1}
    x = torch.randn(6, 5)
    assert torch.equal(ours(x), theirs(x))
