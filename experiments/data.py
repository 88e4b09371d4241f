"""Datasets that come with scikit-learn, as tensors; nothing is downloaded."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor

Dataset = Literal["digits", "iris", "wine", "breast_cancer"]

_LOAD = {
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
}
assert set(_LOAD) == set(get_args(Dataset))


@dataclass(frozen=True)
class Data:
    """A classification task with a fifth of its samples held out for testing.

    x_train, x_test: (N, features), float32, scaled to 0 to 1 over the training samples.
    label_train, label_test: (N,), int64, class indices.
    image_shape: Height and width if samples are images, else None.
    """

    x_train: Tensor
    label_train: Tensor
    x_test: Tensor
    label_test: Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int] | None

    @property
    def features(self) -> int:
        """The number of inputs per sample."""
        return self.x_train.shape[1]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def to(self, device: torch.device) -> "Data":
        """The same data on a device."""
        return Data(
            self.x_train.to(device),
            self.label_train.to(device),
            self.x_test.to(device),
            self.label_test.to(device),
            self.class_names,
            self.image_shape,
        )


def load(dataset: Dataset) -> Data:
    """Load a dataset; the split does not depend on the seed, so that runs can be compared."""
    bunch = _LOAD[dataset]()
    x_train, x_test, label_train, label_test = train_test_split(
        bunch.data, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target
    )
    scaler = MinMaxScaler().fit(x_train)
    return Data(
        x_train=torch.tensor(scaler.transform(x_train), dtype=torch.float32),
        label_train=torch.tensor(label_train),
        x_test=torch.tensor(scaler.transform(x_test), dtype=torch.float32),
        label_test=torch.tensor(label_test),
        class_names=tuple(str(name) for name in bunch.target_names),
        image_shape=bunch.images.shape[1:] if "images" in bunch else None,
    )
