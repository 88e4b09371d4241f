"""Every test with the argument `device` runs on each available device."""

import os
from typing import Any

# Before torch is imported. Each of several processes uses one core, as do those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

# Before Triton is imported, by whatever test: its own functions, too, are either interpreted or
# compiled from then on.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch.manual_seed would format a stack for each kind of device that is missing, in case one turns
# up: half a millisecond each time.
devices: list[Any] = [torch.cuda, torch.mtia, torch.xpu]
for kind in devices:
    if not kind.is_available():
        kind.manual_seed_all = lambda _: None

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"
            ),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
