"""Datasets as tensors: those that come with scikit-learn, points that it makes, and MNIST."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils import Bunch
from torch import Tensor

from experiments.mnist import CLASSES, load_mnist

Dataset = Literal["digits", "mnist", "moons", "xor", "iris", "wine", "breast_cancer"]


class Defaults(NamedTuple):
    """The options with which a dataset is learned, unless others are given."""

    hidden: tuple[int, ...] = (30,)
    learning_rate: float = 3.0
    batch_size: int = 10
    epochs: int = 30


# Where these are not enough, or another size is usual.
DEFAULTS: dict[Dataset, Defaults] = {
    "moons": Defaults(hidden=(10,), learning_rate=20.0, batch_size=5, epochs=100),
    "xor": Defaults(hidden=(4,), learning_rate=10.0),
}

_POINTS = 500  # as many as give a smooth boundary in a second


def _moons() -> Any:
    """Two half circles, one in the other."""
    x, labels = datasets.make_moons(_POINTS, noise=0.1, random_state=0)
    return Bunch(data=x, target=labels, target_names=("upper", "lower"))


def _xor() -> Any:
    """Clouds around the corners of a square; the class is the exclusive or of the coordinates."""
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    x, corner = datasets.make_blobs(_POINTS, centers=corners, cluster_std=0.15, random_state=0)
    names = ("equal", "different")
    return Bunch(data=x, target=(corner == 1) | (corner == 2), target_names=names)


_LOAD = {
    "digits": datasets.load_digits,
    "moons": _moons,
    "xor": _xor,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
}
assert {*_LOAD, "mnist"} == set(get_args(Dataset))


@dataclass(frozen=True)
class Data:
    """A classification task, with samples that are held out for testing: a fifth, but for MNIST.

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

    def fingerprint(self) -> str:
        """The SHA-256 of all samples and labels: equal if a run on one can go on with the other."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.label_train, self.x_test, self.label_test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

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


def load(dataset: Dataset, data_dir: Path | None = None) -> Data:
    """Load a dataset; the split does not depend on the seed, so that runs can be compared.

    Args:
        dataset: Which one.
        data_dir: Where the files of MNIST are; None downloads them.

    Raises:
        OSError: A file of MNIST is missing, or cannot be read or downloaded.
        ValueError: A file of MNIST is damaged, or is not what it should be.
    """
    if dataset == "mnist":
        return _mnist(data_dir)
    bunch = _LOAD[dataset]()
    x_train, x_test, label_train, label_test = train_test_split(
        bunch.data, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target
    )
    scaler = MinMaxScaler().fit(x_train)
    return Data(
        x_train=torch.tensor(scaler.transform(x_train), dtype=torch.float32),
        label_train=torch.tensor(label_train, dtype=torch.int64),
        x_test=torch.tensor(scaler.transform(x_test), dtype=torch.float32),
        label_test=torch.tensor(label_test, dtype=torch.int64),
        class_names=tuple(str(name) for name in bunch.target_names),
        image_shape=bunch.images.shape[1:] if "images" in bunch else None,
    )


def _mnist(folder: Path | None) -> Data:
    splits = load_mnist(folder)
    x_train, x_test = (
        torch.tensor(split.images).flatten(1).float().div_(255)  # as usual: 255 becomes 1
        for split in splits
    )
    label_train, label_test = (torch.tensor(split.labels).long() for split in splits)
    names = tuple(map(str, range(CLASSES)))
    height, width = splits[0].images.shape[1:]
    return Data(x_train, label_train, x_test, label_test, names, (height, width))
