"""Lightning: a LightningModule around a converted net, trained by its Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from manual_bp import convert, restore
from tests.activations import TABLE
from tests.compatibility.clients.side_by_side import (
    EXACT,
    NEEDS,
    assert_learns,
    assert_same_parameters,
    changes,
    every_activation,
    identities,
    twins,
)
from tests.helpers import assert_same, nodes

lightning: Any = pytest.importorskip("lightning", reason=NEEDS)

pytestmark = [
    pytest.mark.clients,
    # Lightning's hints about speed, and its use of deprecated parts of PyTorch.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

FEATURES, CLASSES, ROWS, EPOCHS = 8, 3, 20, 6
BATCHES = 5


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[Tensor] = []
        self.kinds: set[str] = set()

    def training_step(self, rows: list[Tensor], _: int) -> Tensor:
        x, y = rows
        loss = cross_entropy(self.net(x), y)
        self.losses.append(loss.detach())
        self.kinds |= set(nodes(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def with_relu() -> Classifier:
    torch.manual_seed(1)
    return Classifier(
        nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(16, 16, bias=False),
            nn.LayerNorm(16),
            # A power of 2, exact in bfloat16: ours rounds the slope, PyTorch the product.
            nn.LeakyReLU(0.125),
            nn.Linear(16, CLASSES),
        )
    )


def fit(model: Classifier, resume: Path | None = None, **options: Any) -> Any:
    """The trainer after its run, or after that many more epochs; the model has the losses."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    if options.get("precision") == "64-true":
        x = x.double()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS if resume is None else 2 * EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(3)  # for dropout
    trainer.fit(
        model, DataLoader(TensorDataset(x, y), batch_size=ROWS // BATCHES), ckpt_path=resume
    )
    assert len(model.losses) == EPOCHS * BATCHES
    return trainer


OPTIONS: dict[str, dict[str, Any]] = {
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
    "both": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


def test_training() -> None:
    ours, theirs, report = twins(with_relu())
    assert changes(report) == {"Linear": 3, "ReLU": 1, "LeakyReLU": 1}
    fit(ours)
    fit(theirs)
    assert_same(ours.losses, theirs.losses, **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    assert_learns(ours.losses)
    assert {"LinearFunctionBackward", "ReLUFunctionBackward"} <= ours.kinds
    assert {"AddmmBackward0", "ReluBackward0"} <= theirs.kinds - ours.kinds


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_the_trainer_match_pytorchs(options: dict[str, Any]) -> None:
    ours, theirs, _ = twins(with_relu())
    plain, _, _ = twins(with_relu())
    fit(ours, **options)
    fit(theirs, **options)
    fit(plain)
    assert_same(ours.losses, theirs.losses, **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    assert [loss.item() for loss in ours.losses] != [loss.item() for loss in plain.losses]


@pytest.mark.parametrize("fuse", [False, True])
def test_every_layer(fuse: bool) -> None:
    ours, theirs, report = twins(Classifier(every_activation(FEATURES, CLASSES)), fuse=fuse)
    assert len(report.changed) == 2 * len(TABLE) + 1
    fit(ours, precision="64-true")
    fit(theirs, precision="64-true")
    assert_same(ours.losses, theirs.losses)
    assert_same_parameters(ours, theirs)
    assert_learns(ours.losses)
    names = {activation.module.__name__ for activation in TABLE}
    if fuse:
        names = names - {"Sigmoid"} | {"LinearSigmoid"}
    assert {f"{name}FunctionBackward" for name in names} <= ours.kinds


def test_a_model_converted_between_two_runs_goes_on_as_before() -> None:
    ours, theirs = with_relu(), with_relu()
    before = identities(ours)
    for change in (convert, restore):
        change(ours)
        for model in (ours, theirs):
            model.losses.clear()
            fit(model)
        assert_same(ours.losses, theirs.losses, **EXACT)
    assert identities(ours) == before


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_checkpoint_can_be_resumed_with_either_layers(ours_first: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    first = with_relu()
    if ours_first:
        convert(first)
    fit(first).save_checkpoint(path)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(first.state_dict())
    ours, theirs, _ = twins(with_relu())
    fit(ours, path)
    fit(theirs, path)
    assert_same(ours.losses, theirs.losses, **EXACT)
    assert_same_parameters(ours, theirs, **EXACT)
    assert torch.stack(ours.losses).mean() < torch.stack(first.losses).mean()
