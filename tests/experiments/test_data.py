from typing import get_args

import pytest
import torch

from experiments.data import Dataset, load


@pytest.mark.parametrize("dataset", get_args(Dataset))
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
