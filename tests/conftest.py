"""Every test with the argument `device` runs on each available device."""

import os

# Before torch is imported. Each of several processes uses one core, as do those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from manual_bp.verify._global_state import seed_pytorch

# Before Triton is imported, by whatever test: its own functions, too, are either interpreted or
# compiled from then on.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    seed_pytorch(0)
