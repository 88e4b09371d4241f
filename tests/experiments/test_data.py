from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from experiments.data import DEFAULTS, Dataset, load
from experiments.training import Config, Training


@pytest.mark.parametrize("dataset", [name for name in get_args(Dataset) if name != "mnist"])
def test_every_dataset_is_split_and_scaled(dataset: Dataset) -> None:
    data = load(dataset)
    assert data.x_train.dtype is data.x_test.dtype is torch.float32
    assert data.label_train.dtype is data.label_test.dtype is torch.int64
    assert len(data.x_train) == len(data.label_train)
    assert len(data.x_test) == len(data.label_test)
    share = len(data.x_test) / (len(data.x_test) + len(data.x_train))
    assert share == pytest.approx(0.2, abs=0.01)
    assert data.x_train.min() >= 0
    assert data.x_train.max() <= 1 + 1e-6
    classes = set(range(data.classes))
    assert set(data.label_train.tolist()) == set(data.label_test.tolist()) == classes
    if data.image_shape is not None:
        height, width = data.image_shape
        assert data.features == height * width


def test_the_digits_are_images_of_8_by_8() -> None:
    data = load("digits")
    assert data.features == 64
    assert data.image_shape == (8, 8)
    assert data.class_names == tuple("0123456789")


def test_the_split_is_always_the_same() -> None:
    torch.manual_seed(1)
    one = load("iris")
    torch.manual_seed(2)
    other = load("iris")
    assert torch.equal(one.x_test, other.x_test)
    assert torch.equal(one.label_train, other.label_train)


@pytest.mark.parametrize("part", ["x_train", "label_train", "x_test", "label_test"])
def test_the_fingerprint_is_that_of_all_samples_and_labels(part: str) -> None:
    data = load("iris")
    assert data.fingerprint() == load("iris").fingerprint()
    changed = getattr(data, part).clone()
    changed[-1] += 1
    parts: dict[str, Any] = {part: changed}
    assert replace(data, **parts).fingerprint() != data.fingerprint()
    parts = {part: getattr(data, part)[:-1]}
    assert replace(data, **parts).fingerprint() != data.fingerprint()


@pytest.mark.parametrize("dataset", ["moons", "xor"])
@pytest.mark.parametrize("seed", [0, 1])
def test_points_in_the_plane_are_learned_with_their_own_defaults(
    dataset: Dataset, seed: int
) -> None:
    """A line through the plane cannot do that: the hidden layer is needed."""
    options: dict[str, Any] = {**DEFAULTS[dataset]._asdict(), "method": "step", "device": "cpu"}
    accuracy = {}
    for hidden in ((), options.pop("hidden")):
        config = Config(dataset, hidden=hidden, seed=seed, **options)
        training = Training(config, load(dataset))
        for _ in range(config.epochs):
            for x, y in training.epoch():
                training.update(x, y)
        accuracy[hidden] = training.metrics()["test_accuracy"]
    assert accuracy.pop(()) < 0.9
    assert min(accuracy.values()) >= 0.98
