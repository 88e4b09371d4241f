"""State of the process that a forward or backward must leave as it is."""

import gc
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.backends import cudnn


@dataclass(frozen=True)
class State:
    """One part of the global state: how to read it, and how to set it to what was read."""

    get: Callable[[], Any]
    put: Callable[[Any], object]


@dataclass(frozen=True)
class RandomNumbers(State):
    """A global generator of random numbers, and how to seed it."""

    seed: Callable[[int], object]


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _set_default_device(value: torch.device) -> None:
    torch.set_default_device(None if value.type == "cpu" else value)  # None is the default


def _set_cudnn(value: tuple[bool, bool, bool]) -> None:
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = value


def _set_filters(value: list[Any]) -> None:
    warnings.filters[:] = value  # type: ignore[index]


def _autocast(kind: str) -> State:
    def get() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def put(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(kind, value[0])
        torch.set_autocast_dtype(kind, value[1])

    return State(get, put)


_CPU = torch.device("cpu")

STATES: dict[str, State] = {
    "the default dtype": State(torch.get_default_dtype, torch.set_default_dtype),
    "the grad mode": State(torch.is_grad_enabled, torch.set_grad_enabled),
    "the default device": State(torch.get_default_device, _set_default_device),
    "autocast": _autocast("cpu"),
    "cuDNN's settings": State(
        lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic), _set_cudnn
    ),
    "the use of deterministic algorithms": State(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    "the number of threads": State(torch.get_num_threads, torch.set_num_threads),
    "the precision of float32 products": State(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "anomaly detection": State(torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "the warning filters": State(lambda: list(warnings.filters), _set_filters),
    "NumPy's handling of errors": State(np.geterr, lambda value: np.seterr(**value)),
    "the garbage collector": State(
        gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()
    ),
}


def seed_pytorch(seed: int) -> None:
    """Seed PyTorch's generators of all devices."""
    # With no device but the CPU, `torch.manual_seed` formats a stack for each kind of device, in
    # case one turns up later: half a millisecond.
    has_others = torch.accelerator.is_available()
    (torch.manual_seed if has_others else torch.default_generator.manual_seed)(int(seed))


def random_numbers(device: torch.device) -> dict[str, RandomNumbers]:
    """The global generators of PyTorch (the CPU's, and that of a device), NumPy and Python."""
    # NumPy's legacy functions share this one; a candidate that uses them is what is looked for.
    legacy: Any = np.random
    found = {
        "PyTorch's random numbers": RandomNumbers(
            torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed
        ),
        "NumPy's random numbers": RandomNumbers(legacy.get_state, legacy.set_state, legacy.seed),
        "Python's random numbers": RandomNumbers(random.getstate, random.setstate, random.seed),
    }
    if device.type in ("cuda", "xpu"):
        of_device = torch.get_device_module(device)
        found[f"the random numbers of {device}"] = RandomNumbers(
            lambda: of_device.get_rng_state(device),
            lambda state: of_device.set_rng_state(state, device),
            of_device.manual_seed,
        )
    return found


def changed(before: Any, now: Any) -> bool:
    """Whether two states that were read differ."""
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, now)
    if isinstance(before, np.ndarray):
        return not np.array_equal(before, now)
    if isinstance(before, tuple) and any(isinstance(part, np.ndarray) for part in before):
        return any(changed(one, other) for one, other in zip(before, now, strict=True))
    return bool(before != now)


@contextmanager
def restored(device: torch.device = _CPU) -> Iterator[None]:
    """Set the global state back afterwards, whatever the code inside did to it."""
    parts: list[State] = [*STATES.values(), *random_numbers(device).values()]
    before = [part.get() for part in parts]
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            if changed(value, part.get()):
                part.put(value)


@contextmanager
def filled_memory() -> Iterator[None]:
    """A region in which new memory, as of torch.empty, is filled with nan."""
    with restored(), warnings.catch_warnings(action="ignore"):
        # PyTorch fills it while it is asked for deterministic algorithms.
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
