"""What `import manual_bp` costs besides `import torch`."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import requires

import pytest

import manual_bp

# The compiler of PyTorch takes more than a second to import.
COMPILER = {"torch._dynamo", "torch._inductor", "torch.onnx._internal", "sympy"}
# What layers, costs, `backprop`, `record` and `convert` need. Anything else waits until it is used.
AT_ONCE = {"_autocast", "_function", "_fuse", "_net", "_require", "_torch"}
AT_ONCE |= {"backprop", "convert", "costs", "layers", "record", "trace"}


def printed_by(code: str) -> list[str]:
    """The words that a new process prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_the_import_loads_no_optional_package_no_compiler_and_no_room_that_can_wait() -> None:
    loaded = printed_by(
        "import sys, torch; before = set(sys.modules)\n"
        "import manual_bp; print(*set(sys.modules) - before)"
    )
    assert not COMPILER & set(loaded)
    rooms = {name.split(".")[1] for name in loaded if name.startswith("manual_bp.")}
    assert rooms == AT_ONCE
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= {"manual_bp", "numpy", "torch"}
    needed = [need for need in requires("manual-bp") or [] if "extra ==" not in need]
    assert {need.partition(">=")[0] for need in needed} == {"numpy", "tabulate", "torch"}


ASK = r"""
import sys
for ask in [
    "from manual_bp import Adam, AdamW, CapturedStep, CompiledStep, EnsembleStep, TrainingStep",
    "from manual_bp import *",
    "import manual_bp; globals().update({n: getattr(manual_bp, n) for n in dir(manual_bp)})",
    "import manual_bp; TrainingStep = manual_bp.training_step.TrainingStep",
    "import manual_bp.training_step; from manual_bp import TrainingStep",
    r"import pickle; TrainingStep = pickle.loads(b'cmanual_bp\nTrainingStep\n.')",
]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "manual_bp"]:
        del sys.modules[name]
    found = {}
    exec(ask, found)
    print(found["TrainingStep"] is sys.modules["manual_bp.training_step"].TrainingStep)
"""


def test_names_that_wait_are_found_whichever_way_they_are_asked_for() -> None:
    assert printed_by(ASK) == ["True"] * 6


def test_names_that_wait_are_listed_before_they_are_asked_for() -> None:
    listed = printed_by(
        "import sys, manual_bp; print(*dir(manual_bp), 'manual_bp.training_step' in sys.modules)"
    )
    assert listed.pop() == "False"
    assert {*manual_bp.__all__, "__version__", "training_step"} <= set(listed)


@pytest.mark.parametrize("name", ["backprop", "convert", "record"])
def test_a_module_that_has_the_name_of_a_function_does_not_hide_it(name: str) -> None:
    module = import_module(f"manual_bp.{name}")
    assert getattr(manual_bp, name) is getattr(module, name)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"^module 'manual_bp' has no attribute 'Trainer'$"):
        manual_bp.Trainer  # type: ignore[attr-defined]  # noqa: B018
