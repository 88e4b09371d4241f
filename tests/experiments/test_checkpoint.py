"""Checkpoints: complete or absent, and refused where they cannot be trusted."""

import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import checkpoint
from experiments.data import load
from experiments.training import Config, Training

STATE: dict[str, Any] = {"weights": torch.arange(1000.0), "step": 3, "names": ("a", 0.1)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.pt"
    checkpoint.write(path, checkpoint.pack(STATE))
    return path


def test_what_is_read_is_what_was_packed(path: Path) -> None:
    state = checkpoint.read(path)
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state.pop("versions")["torch"] == torch.__version__.split("+")[0]
    assert state == {"format": checkpoint.FORMAT, "step": 3, "names": ("a", 0.1)}


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"some\.pt is damaged \(\d+ bytes\)"):
        checkpoint.read(path)


def test_a_flipped_bit_in_the_weights_is_noticed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(500.0, 504.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["step"] == 3  # PyTorch does not notice
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (["a list"], "is not a checkpoint of this program"),
        ({"weights": 1}, "is not a checkpoint of this program"),
        (
            {"format": 99, "versions": {"manual_bp": "9.0"}},
            r"has format 99, of manual_bp 9\.0; manual_bp .* reads formats 2 and 3$",
        ),
    ],
)
def test_what_another_program_wrote_is_refused(content: Any, reason: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(ValueError, match=reason):
        checkpoint.read(path)


def test_code_in_a_checkpoint_is_not_run(path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (path.with_name("harm").touch, ())

    torch.save({"format": checkpoint.FORMAT, "harm": Harmful()}, path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(path)
    assert not path.with_name("harm").exists()


def test_a_missing_checkpoint_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.read(tmp_path / "nothing.pt")


def test_a_failed_write_leaves_the_old_file_and_no_other(path: Path) -> None:
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["some.pt"]


def test_a_new_file_is_on_the_disk_before_it_replaces_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = checkpoint.sync, Path.replace

    def note_sync(which: Path) -> None:
        events.append(f"sync {which.name}")
        sync(which)

    def note_replace(old: Path, new: Path) -> Path:
        events.append(f"rename {old.name}")
        return replace(old, new)

    monkeypatch.setattr(checkpoint, "sync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    checkpoint.write(path, b"new")
    unfinished = ".some.pt.unfinished"
    assert events == [f"sync {unfinished}", f"rename {unfinished}", f"sync {path.parent.name}"]


def drawn(device: torch.device) -> list[Any]:
    return [
        random.random(),
        np.random.random(),  # noqa: NPY002
        torch.rand(()).item(),
        torch.rand((), device=device).item(),
    ]


def test_every_random_number_generator_goes_on_where_it_was(
    tmp_path: Path, device: torch.device
) -> None:
    drawn(device)
    checkpoint.write(tmp_path / "x.pt", checkpoint.pack({"random": checkpoint.random_state()}))
    expected = drawn(device)
    assert all(one != other for one, other in zip(drawn(device), expected, strict=True))
    checkpoint.restore_random_state(checkpoint.read(tmp_path / "x.pt")["random"])
    assert drawn(device) == expected


@pytest.mark.parametrize("method", ["autograd", "explicit", "step"])
@pytest.mark.parametrize("done", [4, 15])
def test_a_training_goes_on_with_the_same_bits(
    method: Any, done: int, tmp_path: Path, device: torch.device
) -> None:
    """Within an epoch of 15 updates, and at its end."""
    config = Config(hidden=(8,), batch_size=100, method=method, device=str(device))
    one, other = Training(config, load("digits")), Training(config, load("digits"))

    def train(training: Training, until: int) -> list[float]:
        costs = []
        while training.updates < until:
            for x, y in training.epoch():
                costs.append(training.update(x, y))
                if training.updates == until:
                    break
        return costs

    train(one, done)
    path = tmp_path / "x.pt"
    checkpoint.write(path, checkpoint.pack(one.state_dict()))
    expected, drawn = train(one, 40), torch.rand(3)
    other.load_state_dict(checkpoint.read(path))
    assert train(other, 40) == expected
    assert torch.equal(torch.rand(3), drawn)
    pairs = zip(one.net.parameters(), other.net.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
