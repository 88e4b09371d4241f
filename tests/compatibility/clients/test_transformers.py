"""Hugging Face's transformers: models whose layers are deep inside code that is not ours.

All of them are tiny, made from a configuration, and nothing is downloaded.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import manual_bp
from manual_bp import restore
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

transformers: Any = pytest.importorskip("transformers", reason=NEEDS)

pytestmark = pytest.mark.clients

STEPS = 20
WORDS = 64
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def bert(kind: str, dropout: float) -> Any:
    torch.manual_seed(1)
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **options, num_labels=3))


def encoder(dropout: float = 0.0) -> Any:
    """BERT without a pooler, and so without a Tanh; its last Linear is tied to the embeddings."""
    return bert("BertForMaskedLM", dropout)


def classifier(dropout: float = 0.0) -> Any:
    """BERT with a pooler, which ends with a Tanh."""
    return bert("BertForSequenceClassification", dropout)


def causal(dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    options = {"num_key_value_heads": 2, "attention_dropout": dropout}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def batch(step: int, one_label: bool = False) -> dict[str, Tensor]:
    """One of four batches in turn, of sentences of unequal lengths."""
    generator = torch.Generator().manual_seed(step % 4)
    words = torch.randint(WORDS, (4, 12), generator=generator)
    mask = torch.ones_like(words)
    mask[1, 8:] = 0
    labels = torch.randint(3, (4,), generator=generator) if one_label else words
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


def loss_of(model: Any, step: int, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        one_label = isinstance(model, transformers.BertForSequenceClassification)
        return model(**batch(step, one_label)).loss  # type: ignore[no-any-return]


def losses(model: Any, steps: int = STEPS, dtype: torch.dtype | None = None) -> list[Tensor]:
    model.train()
    return train(model.parameters(), [partial(loss_of, model, i, dtype) for i in range(steps)])


every_exact = pytest.mark.parametrize("make", [encoder, causal])
every_dropout = pytest.mark.parametrize("dropout", [0.0, 0.1])


@every_exact
@every_dropout
def test_training(make: Any, dropout: float) -> None:
    ours, theirs, _ = twins(make(dropout))
    seen = losses(ours)
    assert_same(seen, losses(theirs), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    assert_learns(seen)


@every_dropout
def test_training_with_a_tanh(dropout: float) -> None:
    ours, theirs, report = twins(classifier(dropout).double())
    assert changes(report)["Tanh"] == 1
    seen = losses(ours)
    assert_same(seen, losses(theirs))
    assert_same_parameters(ours, theirs)
    assert_learns(seen)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # A layer of BERT has six: query, key, value, the output of attention, and a feed-forward
        # of two; Llama's has seven, as its feed-forward has three.
        (encoder, {"Linear": 2 * 6 + 2}),
        (classifier, {"Linear": 2 * 6 + 2, "Tanh": 1}),
        (causal, {"Linear": 2 * 7 + 1}),
    ],
)
def test_every_linear_of_the_graph_is_ours(make: Any, expected: dict[str, int]) -> None:
    ours, theirs, report = twins(make())
    assert changes(report) == expected
    linears = [m for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    assert all(type(module) is manual_bp.Linear for module in linears)
    found = nodes(loss_of(ours, 0))
    assert {name: found[f"{name}FunctionBackward"] for name in expected} == expected
    products = {"AddmmBackward0", "MmBackward0", "LinearBackward0"}
    assert products & set(nodes(loss_of(theirs, 0)))
    assert not products & set(found)


@every_exact
def test_restore(make: Any) -> None:
    model = make()
    before, keys = identities(model), list(model.state_dict())
    ours, theirs, report = twins(model)
    assert list(ours.state_dict()) == keys
    assert_same(losses(ours, 5), losses(theirs, 5), **EXACT)
    assert list(ours.state_dict()) == keys
    assert len(restore(ours).changed) == len(report.changed)
    assert list(ours.state_dict()) == keys
    assert identities(ours) == before
    assert_same(losses(ours, 5), losses(theirs, 5), **EXACT)


@every_exact
def test_save_pretrained_and_from_pretrained(make: Any, tmp_path: Path) -> None:
    ours, _, _ = twins(make())
    losses(ours, 2)
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path)
    assert manual_bp.Linear not in {type(module) for module in loaded.modules()}
    assert_same_parameters(loaded, ours, **EXACT)
    assert list(loaded.state_dict()) == list(ours.state_dict())
    again, theirs, report = twins(loaded)
    assert changes(report)["Linear"] > 10
    expected = losses(theirs, 5)
    assert_same(losses(again, 5), expected, **EXACT)
    assert_same(losses(ours, 5), expected, **EXACT)


# PyTorch's two ways: run backward within backward, or recompute what hooks have dropped.
@pytest.mark.parametrize("use_reentrant", [True, False])
# A warning of transformers: since version 5 it has a second name, from 6 on only that.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@every_exact
@every_dropout
def test_gradient_checkpointing(make: Any, dropout: float, use_reentrant: bool) -> None:
    ours, theirs, _ = twins(make(dropout))
    plain, _, _ = twins(make(dropout))
    calls = []
    linear = next(m for m in ours.modules() if type(m) is manual_bp.Linear)
    linear.register_forward_hook(lambda *_: calls.append(1))
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    seen = losses(ours)
    assert len(calls) == 2 * STEPS
    assert_same(seen, losses(theirs), **EXACT)
    assert_same(seen, losses(plain), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)


@every_exact
@every_dropout
def test_autocast(make: Any, dropout: float) -> None:
    ours, theirs, _ = twins(make(dropout))
    reduced = losses(ours, dtype=torch.bfloat16)
    assert_same(reduced, losses(theirs, dtype=torch.bfloat16), **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    full, _, _ = twins(make(dropout))
    assert not torch.equal(torch.stack(losses(full)), torch.stack(reduced))


def test_a_model_in_bfloat16() -> None:
    ours, theirs, _ = twins(causal().bfloat16())
    assert_same(losses(ours), losses(theirs), **EXACT)


def test_generation() -> None:
    ours, theirs, _ = twins(causal().eval())
    prompt = batch(0)["input_ids"]
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    words = ours.generate(prompt, max_new_tokens=8, **options)
    assert words.shape == (4, 20)
    assert torch.equal(words, theirs.generate(prompt, max_new_tokens=8, **options))
    assert torch.equal(ours(words).logits, theirs(words).logits)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason=NEEDS)
    ours, theirs, _ = twins(causal(0.1))
    rows: list[dict[str, Tensor]] = [
        {name: column[i] for name, column in batch(step).items()}
        for step in range(4)
        for i in range(4)
    ]
    for model in (ours, theirs):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=options, train_dataset=rows).train()
    assert_same_parameters(ours, theirs, **EXACT)
    assert not torch.equal(next(ours.parameters()), next(causal(0.1).parameters()))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
# With 12 words, the Gram form of a norm takes fewer multiplications; with 32, in the layers of
# attention, the other form does.
@pytest.mark.parametrize("words", [12, 32])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_the_norms_of_each_samples_gradient(
    words: int, converted: bool, use_reentrant: bool | None
) -> None:
    """In float32, those of an encoder's linear layers match a loop over single samples."""
    model = classifier().train()
    if converted:
        manual_bp.convert(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(WORDS, (6, words), generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    parameters = [parameter for module in linear for parameter in module.parameters()]
    expected = []
    for i in range(6):
        model.zero_grad()
        model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss.backward()
        grads = [p.grad.flatten() for p in parameters if p.grad is not None]
        assert len(grads) == len(parameters)
        expected.append(torch.cat(grads).double().norm())
    model.zero_grad()
    with manual_bp.record(model) as trace:
        model(input_ids=ids, labels=labels).loss.backward()
    assert len(trace.layers) == len(linear) == 14
    assert_same([trace.per_sample_norms().double()], [torch.stack(expected)], rtol=1e-5, atol=0)
    assert "bert.embeddings.word_embeddings.weight" in trace.elsewhere
    assert "bert.encoder.layer.1.output.dense.weight" not in trace.elsewhere
    for layer in trace.layers:
        found, right = layer.per_sample_grad_w(), layer.w.grad
        assert found is not None
        assert right is not None
        assert_same([found.mean(0)], [right], rtol=1e-4, atol=1e-7)
